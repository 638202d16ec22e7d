"""Tables and commands on terminals that are narrow, poor in letters, or not there any more."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from comit_bench.commands.app import app
from comit_bench.commands.console import Bars, guarded, say
from comit_bench.errors import UsageError
from comit_bench.results.records import load_records
from comit_bench.results.render.layout import measure, number_text, shown_rows
from comit_bench.results.render.terminal import in_encoding, print_terminal
from comit_bench.results.render.text import to_latex
from comit_bench.results.table import Table, build_table

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "comit_bench.commands.app"]


@pytest.fixture(scope="module")
def published() -> Table:
    return build_table(load_records(ROOT / "results" / "paper"))


@pytest.fixture(scope="module")
def mixed() -> Table:
    measured = load_records(ROOT / "results" / "reference")
    return build_table(measured + load_records(ROOT / "results" / "paper"))


def printed(table: Table, width: int) -> list[str]:
    stream = io.StringIO()
    print_terminal(table, Console(file=stream, width=width))
    return stream.getvalue().splitlines()


# ---------------------------------------------------------- published rows


@pytest.mark.parametrize("width", [60, 100, 160, 400])
def test_published_rows_stand_only_where_they_have_a_value(mixed: Table, width: int) -> None:
    for block in measure(mixed, width).blocks(width):
        has = {n: any(row.cells[i] is not None for i in block.columns) for n, row in enumerate(mixed.rows)}
        for number in block.rows:
            row = mixed.rows[number]
            assert has[number] or row.origin != "paper", row.label
        measured = any(has[n] for n, row in enumerate(mixed.rows) if row.origin != "paper")
        for number, row in enumerate(mixed.rows):  # what was measured and is missing here stays a dash
            assert (number in block.rows) is (has[number] or (measured and row.origin != "paper"))


def test_every_value_is_printed_once_and_every_row_has_its_size(mixed: Table) -> None:
    blocks = measure(mixed, 100).blocks(100)
    columns = [index for block in blocks for index in block.columns]
    assert columns == list(range(len(mixed.columns)))
    told: set[int] = set()
    for block in blocks:
        told |= set(block.rows if block.details else ())
        assert set(block.rows) <= told, "a row is first shown without its details"


def test_tables_of_published_numbers_shrink(published: Table) -> None:
    """28 rows in four blocks were 112 lines, most of them dashes."""
    lines = printed(published, 120)
    bodies = [line for line in lines if "§" in line and not line.startswith("§")]
    cells = sum(cell is not None for row in published.rows for cell in row.cells)
    assert len(bodies) < 65 and len(bodies) <= cells
    for line in bodies:
        assert any(letter.isdigit() for letter in line.split("§")[1])
    latex = to_latex(published)
    assert latex.count("titok-sl-256") == sum("titok-sl-256" in line for line in bodies) == 1


def test_no_row_of_chance_without_a_chance(mixed: Table) -> None:
    text = "\n".join(printed(mixed, 100))
    for block in text.split("\n\n"):
        for line in block.splitlines():
            if line.startswith("chance "):
                assert any(letter.isdigit() for letter in line), line


def test_blocks_without_columns_show_all_rows(mixed: Table) -> None:
    own = [number for number, row in enumerate(mixed.rows) if row.origin != "paper"]
    assert list(shown_rows(mixed, ())) == own


# ---------------------------------------------------------- narrow terminals


@pytest.mark.parametrize("width", [44, 60, 80, 100, 120])
def test_lines_are_no_longer_than_the_terminal(mixed: Table, width: int) -> None:
    assert max(map(cell_len, printed(mixed, width))) <= width


def test_where_nothing_fits_numbers_stay_whole(mixed: Table) -> None:
    lines = printed(mixed, 20)
    row = next(row for row in mixed.rows if row.label == "comit-nano")
    told = [number_text(cell, column) for cell, column in zip(row.cells, mixed.columns, strict=True) if cell]
    plain = [" ".join(line.split()) for line in lines]  # spreads are aligned
    assert len(told) > 10 and all(any(text in line for line in plain) for text in told)
    assert any(line.startswith("comit-…") for line in lines)


def test_a_title_may_stand_over_the_labels(mixed: Table) -> None:
    assert "recognition-scenes" in "\n".join(printed(mixed, 44))


def run(*arguments: object, **settings: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings.pop("env", {})}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, env=environment, cwd=ROOT, timeout=120, check=False, **settings
    )


def test_a_narrow_listing_loses_nothing() -> None:
    wide, narrow = (run("ls", "tasks", env={"COLUMNS": width}).stdout.decode() for width in ("200", "50"))
    assert max(map(len, narrow.splitlines())) < 90 < max(map(len, wide.splitlines()))
    for line in wide.splitlines()[3:]:
        for word in line.split():
            assert word in narrow
    assert "\n  dataset: scenes-recognition\n" in narrow


# ---------------------------------------------------------- letters


def test_letters_that_an_encoding_has_not() -> None:
    text = "a ± b ─ † ‡ § – … ↑ é 漢 \udc80"
    assert in_encoding(text, "ascii") == "a + b - + # $ - ~ ^ e ? ?"
    assert in_encoding("a ± §", "latin-1") == "a ± §"
    assert in_encoding("café ↓", "latin-1") == "café v"


@settings(deadline=None)
@given(st.text(), st.sampled_from(["ascii", "latin-1", "cp1252", "utf-8"]))
def test_any_text_can_be_written_and_keeps_its_length(text: str, encoding: str) -> None:
    found = in_encoding(text, encoding)
    assert len(found) == len(text) and found.encode(encoding).decode(encoding) == found


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["table", "results/reference", "--tasks", "recognition-scenes"],
        ["figure", "ls"],
        ["ls", "tasks"],
        ["run", "--overwrite", "é–"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_on_a_poor_terminal(arguments: list[str], encoding: str) -> None:
    done = run(*arguments, env={"PYTHONIOENCODING": f"{encoding}:strict", "TERM": "dumb", "NO_COLOR": "1"})
    said = done.stdout.decode(encoding) + done.stderr.decode(encoding)
    assert done.returncode == (2 if arguments[0] == "run" else 0), said
    assert "Traceback" not in said and "\x1b" not in said
    wanted = {"table": "comit-nano", "figure": "sweeps", "ls": "recognition-scenes", "run": "error: "}
    assert wanted[arguments[0]] in said


def test_bars_on_a_poor_terminal() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)

    def work() -> None:
        with Bars(enabled=True) as bars:
            bars.start("tokenizing – é", 2, "images")(1)

    with_streams(stream, work)
    assert b"tokenizing - e:   0%|" in raw.getvalue()


# ---------------------------------------------------------- closed streams


def with_streams(stderr: TextIO | None, command: Callable[[], object]) -> int:
    """Exit code of a guarded command."""
    before = sys.stderr
    sys.stderr = stderr  # type: ignore[assignment]
    try:
        with pytest.raises(SystemExit) as stop:
            guarded(command)
        assert sys.stderr is stderr
    finally:
        sys.stderr = before
    return int(stop.value.code or 0)


class Gone(io.StringIO):
    """A stream whose reader has left, or whose disk is full."""

    def __init__(self, number: int = errno.EPIPE) -> None:
        super().__init__()
        self.number, self.writes = number, 0

    def write(self, text: str) -> int:
        self.writes += 1
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("stderr", [None, Gone(), Gone(errno.EIO)], ids=["closed", "no reader", "broken"])
def test_the_work_goes_on_without_a_reader(stderr: TextIO | None) -> None:
    done = []

    def work() -> None:
        say("begin")
        with Bars(enabled=True) as bars:
            advance = bars.start("working", 3, "steps")
            for number in range(3):
                advance(1)
                say(f"{number} – é")
                done.append(number)

    assert with_streams(stderr, work) == 0
    assert done == [0, 1, 2]


def test_exit_codes_stay(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> None:
        raise UsageError("no such thing")

    def leave() -> None:
        raise SystemExit(3)

    for stderr in (None, Gone()):
        assert with_streams(stderr, wrong) == 2
        assert with_streams(stderr, leave) == 3
    with pytest.raises(SystemExit) as stop:
        guarded(wrong)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: no such thing\n"


def test_a_bug_is_one_line_and_a_traceback_in_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: 1 / 0)
    told = capsys.readouterr().err
    assert stop.value.code == 1 and told.startswith("error: ") and "Traceback" not in told
    (log,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert str(log) in told and "ZeroDivisionError" in log.read_text()


def test_output_on_a_full_disk_is_an_error_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Gone(errno.ENOSPC))
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: sys.stdout.write("paths"))
    assert stop.value.code == 1 and "No space left" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdout", Gone(errno.EPIPE))
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: sys.stdout.write("paths"))
    assert stop.value.code == 0 and capsys.readouterr().err == ""


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = re.sub(r"\bcomit-bench (?=[a-z-])", " ".join(f"'{part}'" for part in COMMAND) + " ", line)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="bash closes the streams")
@pytest.mark.parametrize(
    ("line", "code", "first"),
    [
        ("comit-bench ls tasks --names | head -1", 0, "codebook-drawings"),
        ("comit-bench ls tasks --names 2>&-", 0, "codebook-drawings"),
        ("comit-bench ls tasks --names >&-", 0, ""),
        ("comit-bench ls tasks --names <&- >&- 2>&-", 0, ""),
        ("comit-bench ls nothing 2>&-", 2, ""),
        ("comit-bench ls nothing 2>&1 | head -c 0", 2, ""),
    ],
)
def test_streams_that_are_closed(line: str, code: int, first: str) -> None:
    done = shell(line)
    assert (done.returncode, done.stdout.split("\n")[0], done.stderr) == (code, first, "")


@pytest.mark.skipif(sys.platform == "win32", reason="bash closes the streams")
def test_processes_that_are_started_have_streams_too(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import subprocess, sys\n"
        "from comit_bench.commands.console import guarded\n"
        "child = [sys.executable, '-c', 'import os; os.fstat(2)']\n"
        "guarded(lambda: sys.exit(subprocess.run(child).returncode))\n"
    )
    assert shell(f"'{sys.executable}' '{script}' 2>&-").returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="bash closes the streams")
def test_tokens_are_made_without_stderr_and_nothing_gets_into_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is opened first after ``2>&-`` would get number 2, and everything that goes to stderr."""
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in" / "é.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"nothing")  # is warned about
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path / "cache"))
    command = ["tokenize", f"{tmp_path}/in", "--out", f"{tmp_path}/a.safetensors"]
    plain = CliRunner().invoke(app, command)
    assert plain.exit_code == 0 and "unreadable images: 1" in plain.stderr
    line = f"comit-bench tokenize '{tmp_path}/in' --out '{tmp_path}/b.safetensors' 2>&-"
    closed = shell(line, PYTHONIOENCODING="ascii", COMIT_BENCH_CACHE=str(tmp_path / "other"))
    assert closed.returncode == 0 and closed.stdout.strip() == f"{tmp_path}/b.safetensors"
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
