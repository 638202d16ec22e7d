"""Errors that are none of ours: one line that names the log, the other jobs go on, exit 1."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from failing import Broken, OwnError, Sum
from tiny import write_images, write_recipes

import comit_bench
from comit_bench.commands import app as cli
from comit_bench.commands import train as train_command
from comit_bench.commands.console import guarded
from comit_bench.commands.run import finish
from comit_bench.errors import BenchError
from comit_bench.nn.ranks import Ranks
from comit_bench.pipeline.evaluate import run_jobs
from comit_bench.pipeline.failures import unexpected
from comit_bench.pipeline.jobs import Settings, make_jobs
from comit_bench.pipeline.session import Session
from comit_bench.probing.pool import ProbePool
from comit_bench.results.records import load_records
from comit_bench.tokenizers.pixels import PixelOracleTokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a run on tiny data."""
    write_images(tmp_path / "data", train=6, val=3)
    write_recipes(tmp_path / "recipes")
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("comit_bench.probing.pool.usable_cores", lambda: 1)
    return {
        "data_root": tmp_path / "data",
        "include": (tmp_path / "recipes",),
        "cache": tmp_path / "cache",
        "output": tmp_path / "out",
    }


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """An entry point with arguments: exit code, stdout, stderr."""

    def call(entry: Callable[[], None], *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["comit-bench", *(str(a) for a in arguments)])
        with pytest.raises(SystemExit) as ended:
            entry()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def log_of(text: str) -> str:
    """The content of the log that a message names."""
    found = re.search(r"The traceback is in (\S+\.log)", text)
    assert found, text
    return Path(found[1]).read_text(encoding="utf-8")


ERRORS = {
    "division": (ZeroDivisionError("by nothing"), "unexpected ZeroDivisionError: by nothing"),
    "own": (OwnError(), "unexpected OwnError"),
    "memory": (MemoryError(), "out of memory (of this machine). Lower --batch-size"),
    "cuda": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "Lower --batch-size"),
    "cpu": (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "Lower --batch-size"),
    "system": (OSError(errno.EIO, "Input/output error", "/dev/x"), "'/dev/x': Input/output error"),
    "lines": (ValueError("first\nsecond"), "unexpected ValueError: first."),
}


def test_unexpected_errors_are_failures_of_their_jobs_and_the_others_run_on(bench: dict[str, Any]) -> None:
    settings = Settings(**bench, progress=False)
    rows = [*(Broken(error, f"broken-{name}") for name, (error, _) in ERRORS.items()), PixelOracleTokenizer()]
    jobs = make_jobs(rows, ["tiny-colours"], settings)
    outcome = run_jobs(jobs, Session(settings))
    assert [record.tokenizer.name for record in outcome.records] == ["pixel-oracle"]
    assert len(outcome.failures) == len(ERRORS)
    for (name, (error, words)), (job, problem) in zip(ERRORS.items(), outcome.failures, strict=True):
        text = str(problem)
        assert job.label == f"broken-{name}" and text.startswith(f"{job.label} on tiny-colours: ")
        assert words in text and "\n" not in text and problem.__cause__ is error
        assert str(bench["output"]) in text and "Traceback" in log_of(text) and "in encode" in log_of(text)
    assert finish(outcome, jobs, settings) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(7)])
def test_stopping_is_no_failure(bench: dict[str, Any], error: BaseException) -> None:
    with pytest.raises(type(error)):
        comit_bench.evaluate(
            [Broken(error), "pixel-oracle"], ["tiny-colours"], suite="scenes", references=False, **bench
        )
    assert not load_records(bench["output"] / "records")


def test_a_plugin_that_fails_while_it_works(
    bench: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = SimpleNamespace(name="broken", value="broken_plugin:load", dist=None)
    module = SimpleNamespace(load=lambda name, **_: Broken(ZeroDivisionError("by nothing")))
    monkeypatch.setitem(sys.modules, "broken_plugin", module)  # type: ignore[arg-type]
    monkeypatch.setattr(
        "comit_bench.tokenizers.registry.entry_points", lambda group: [point] if "tokenizers" in group else []
    )
    places = ["--data-root", bench["data_root"], "--include-path", bench["include"][0]]
    common = ["--suite", "scenes", "--tasks", "tiny-colours", "--output", bench["output"], "-q"]
    code, out, err = run(
        cli.main, "run", *places, *common, "-t", "broken", "-t", "kmeans-patch", "--option", "vocab=64"
    )
    assert code == 1 and "Traceback" not in err
    assert err.count("by nothing") == 1 and "by nothing" in log_of(err)
    assert "kmeans-patch" in out and "pixel-oracle" in out


def test_a_loader_that_fails_is_one_line(
    bench: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("while loading")

    monkeypatch.setattr("comit_bench.tokenizers.comit.adapter.load", fail)
    for command in (
        ("run", "--dry-run", "-t", "comit-nano"),
        ("sweep", "-q"),
        ("figure", "edit"),
        ("tokenize", bench["data_root"], "--out", "t.safetensors"),
    ):
        code, out, err = run(cli.main, *command)
        lines = err.strip().splitlines()
        assert code == 1 and not out and "while loading" in lines[-1] and "Traceback" not in err
        assert sum(line.startswith("error: ") for line in lines) == 1
        assert "while loading" in log_of(err) and str(bench["cache"]) in err


@pytest.mark.parametrize(
    ("entry", "arguments", "target"),
    [
        (cli.main, ("data", "build", "mscoco-pairs"), "comit_bench.data.building.build_dataset"),
        (cli.main, ("weights", "ls"), "comit_bench.tokenizers.presence.weights_state"),
        (cli.main_run, ("--dry-run",), "comit_bench.pipeline.plan.make_jobs"),
        (cli.main, ("train", "--config", "comit-nano"), "comit_bench.train.loop.Trainer"),
        (train_command.main, ("--config", "comit-nano"), "comit_bench.train.loop.Trainer"),
        (cli.main, ("ls", "tasks"), "comit_bench.commands.listing.find_tasks"),
        (cli.main, ("doctor",), "comit_bench.tokenizers.presence.weights_state"),
        (cli.main, ("table", "."), "comit_bench.results.records.load_records"),
        (cli.main, ("cost", "comit-nano"), "comit_bench.commands.cost.count"),
        (cli.main, ("figure", "sweeps"), "comit_bench.results.records.load_records"),
    ],
)
def test_every_command_has_the_net(
    entry: Callable[[], None],
    arguments: tuple[str, ...],
    target: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise LookupError("nobody foresaw this")

    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(target, fail)
    code, _, err = run(entry, *arguments)
    assert code == 1 and "Traceback" not in err
    assert "error: comit-bench: unexpected LookupError: nobody foresaw this. The traceback is in" in err
    assert "nobody foresaw this" in log_of(err)


@pytest.mark.parametrize("entry", [cli.main, cli.main_run, train_command.main])
def test_ctrl_c_and_exit_codes_pass_the_net(entry: object) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guarded(stop)
    with pytest.raises(SystemExit) as ended:
        guarded(lambda: sys.exit(5))
    assert ended.value.code == 5


def test_where_the_log_lies_when_folders_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(
        "comit_bench.pipeline.failures.tempfile.gettempdir", lambda: str(tmp_path / "temporary")
    )
    text = str(unexpected(ValueError("x"), "work", tmp_path / "file", tmp_path / "second"))
    assert str(tmp_path / "second" / "logs") in text
    text = str(unexpected(ValueError("x"), "work", tmp_path / "file"))
    assert str(tmp_path / "temporary") in text
    monkeypatch.setattr("comit_bench.pipeline.failures.tempfile.gettempdir", lambda: str(tmp_path / "file"))
    assert "no log could be written" in str(unexpected(ValueError("x"), "work", tmp_path / "file"))


def test_arguments_that_are_no_text_or_empty(run: Run) -> None:
    for arguments, words in (
        (("run", "--output", os.fsdecode(b"caf\xe9")), r"'caf\udce9' is not valid UTF-8"),
        (("run", "--output", ""), "an empty value after --output"),
        (("run", "--output="), "an empty value for --output"),
        (("tokenize", " ", "--out", "x"), "an empty value"),
    ):
        code, _, err = run(cli.main, *arguments)
        assert code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1


# ------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("error", "in a probe worker: ZeroDivisionError: in the worker"),
        ("unpicklable", "in a probe worker: "),
        ("killed", "exit code -9"),
    ],
)
def test_errors_in_probe_workers(
    how: str, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with ProbePool(2) as pool, pytest.raises((RuntimeError, BenchError)) as caught:
        pool.fit(Sum(how), [0, 1])
    assert words in str(caught.value) and "\n" not in str(caught.value)
    if how == "error":
        assert "in the worker" in log_of(str(unexpected(caught.value, "work", tmp_path)))
        assert "def fit" not in str(caught.value) and "in fit" in "".join(caught.value.__notes__)
    assert "Traceback" not in capfd.readouterr().err


def test_siblings_hear_of_errors_of_any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def gather(texts: list[Any], text: Any, group: Any) -> None:
        told.append(text)
        texts[0] = text

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    with pytest.raises(ZeroDivisionError):
        Ranks(0, 2).together(lambda: 1 // 0)
    assert told == ["ZeroDivisionError: integer division or modulo by zero"]
