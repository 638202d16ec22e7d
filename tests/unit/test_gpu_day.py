"""``scripts/gpu_day.sh`` is ready: with tiny numbers every part runs on the CPU and on a pretended GPU.

A part that fails or hangs stops nothing, and the page is made of what was written so far.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from pretend_cuda import pretend_cuda

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_day.sh"
PARTS = ("environment", "ids", "speed", "training", "probe")
MODULES = ("common", "summary", *(f"part_{name}" for name in (*PARTS, "tests", "tasks")))


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a part in this process and returns what it wrote."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "gpu_day"))
    monkeypatch.delenv("COMIT_BENCH_PARITY", raising=False)
    common = import_module("common")

    def run(part: str, out: Path, device: str) -> list[dict[str, Any]]:
        start = common.Day.begin(part, out, device, seconds=300, tiny=True)
        assert not import_module(f"part_{part}").run(start)
        rows: list[dict[str, Any]] = import_module("summary").read(out)
        return [row for row in rows if row["part"] == part]

    yield run
    for name in MODULES:
        sys.modules.pop(name, None)


def test_every_part_on_the_cpu(day: Any, tmp_path: Path) -> None:
    for part in PARTS:
        rows = day(part, tmp_path, "cpu")
        assert rows and not [row for row in rows if "error" in row], rows
    page = import_module("summary").page(import_module("summary").read(tmp_path))
    for says in (
        "CPU with",
        "tiny numbers",
        "slim | recorded",
        "vq-grid-nano",
        "comit-nano optim",
    ):
        assert says.lower() in page.lower(), page
    assert "A probe fit" in page and "Missing" not in page


def test_every_part_on_a_pretended_gpu(day: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches that only a GPU takes, but for the profiler, which wants a driver."""
    monkeypatch.setattr(import_module("part_training"), "costs", lambda *_: [])
    with pretend_cuda():
        for part in ("environment", "ids", "speed", "training", "probe"):
            rows = day(part, tmp_path, "cuda")
            assert rows and not [row for row in rows if "error" in row], rows
    rows = import_module("summary").read(tmp_path)
    assert {row["precision"] for row in rows if "precision" in row} == {"float32", "tf32", "bfloat16"}
    exact = [row["differ"] for row in rows if row.get("precision") == "float32"]
    assert exact and set(exact) == {0.0}
    probes = [row for row in rows if row["part"] == "probe"]
    assert {row["dtype"] for row in probes if "dtype" in row} == {"warm-up", "float32", "bfloat16"}
    assert {row["scores"] for row in probes if "scores" in row} == {"float32", "bfloat16"}
    assert {row["dtype"] for row in rows if row["part"] == "speed"} == {"bfloat16", "float32"}


ROW = '{"part": "ids", "name": "x", "against": "y", "precision": "tf32", "differ": 0.25, "ids": 4}'


def stand_in(folder: Path) -> Path:
    """A Python that runs the summary only: its parts fail, hang or succeed as their names say."""
    path = folder / "python"
    path.write_text(
        f"""#!/bin/bash
case "$1" in *summary.py) exec {sys.executable} "$@" ;; esac
case "$2" in
  environment) echo '{{"part": "environment", "what": "half' >>"$4/results.jsonl"; exit 3 ;;
  tests) sleep 60 ;;
  *) echo '{ROW}' >>"$4/results.jsonl" ;;
esac
"""
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        timeout=900,
    )


def test_a_part_that_fails_or_hangs_stops_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = script(
        str(out), "--parts", "environment,tests,ids", "--limit", "tests=1", PYTHON=str(stand_in(tmp_path))
    )
    assert done.returncode == 1, done.stderr
    page = (out / "gpu.md").read_text()
    assert (
        "| environment | failed |" in page and "| tests | stopped | 1 |" in page and "| ids | done |" in page
    )
    assert "| x | y | 4 | – | 25 % | – |" in page
    assert "machine is not known" in page  # the line that was cut off is left out
    assert {p.name for p in out.iterdir()} == {"gpu.md", "results.jsonl", "gpu_day.log"}


def test_parts_beyond_the_time_are_left_out(tmp_path: Path) -> None:
    done = script(str(tmp_path / "out"), "--parts", "ids", "--minutes", "0", PYTHON=str(stand_in(tmp_path)))
    assert done.returncode == 1 and "| ids | left-out | 0 |" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--parts", "nonsense"), "no part nonsense"),
        (("--limit", "x=3"), "no part x"),
        (("--what",), "--tiny"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    done = script(str(tmp_path / "out"), *arguments)
    assert done.returncode == 2 and says in done.stderr and not (tmp_path / "out").exists()


def test_missing_packages_are_named(day: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = import_module("part_environment")
    assert environment.missing_packages() == []
    known = environment.version

    def version(name: str) -> str:
        if name == "ijson":
            raise environment.PackageNotFoundError(name)
        return str(known(name))

    monkeypatch.setattr(environment, "version", version)
    assert environment.missing_packages() == ["ijson"]
    facts = {
        "device": "x",
        "memory_gib": 1,
        "driver": "1",
        "torch": "2",
        "python": "3",
        "commit": "c",
        "tiny": False,
    }
    row = {"part": "environment", "what": "machine", **facts, "missing": ["ijson"]}
    assert "**Missing packages: ijson.**" in import_module("summary").page([row])


def test_failed_tests_are_on_the_page(day: Any) -> None:
    rows = [
        {
            "part": "tests",
            "test": "a::b",
            "when": "call",
            "outcome": "failed",
            "seconds": 1,
            "said": "E  wrong",
        },
        {"part": "tests", "test": "a::c", "when": "call", "outcome": "passed", "seconds": 1, "said": None},
    ]
    page = import_module("summary").page(rows)
    assert "1 failed, 1 passed." in page and "- `a::b` (call): E  wrong" in page


def test_the_default_limits_fit_into_the_default_time() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    line = next(part for part in text.splitlines() if part.startswith("declare -A LIMIT"))
    limits = dict(pair.strip("[]").split("]=") for pair in line.split("(")[1].rstrip(")").split())
    assert list(limits) == text.split("\nPARTS=")[1].split("\n")[0].split(",")
    most_valuable = sum(int(seconds) for name, seconds in limits.items() if name != "tasks")
    assert most_valuable <= 9 * 60 - 5


@pytest.mark.slow
def test_the_whole_script_on_the_cpu(tmp_path: Path) -> None:
    done = script(str(tmp_path / "out"), "--device", "cpu", "--minutes", "15")
    assert done.returncode == 0, (done.stdout, (tmp_path / "out" / "gpu_day.log").read_text()[-3000:])
    page = (tmp_path / "out" / "gpu.md").read_text()
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines() if line
    ]
    assert [row["state"] for row in rows if "state" in row] == ["done"] * 7
    assert "skipped." in page and "One training step" in page
