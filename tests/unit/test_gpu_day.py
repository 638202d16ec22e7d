"""``scripts/gpu_day.sh`` is ready: with tiny numbers every part runs on the CPU and on a pretended GPU.

A part that fails or hangs stops nothing, and the page is made of what was written so far.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tarfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_cuda import pretend_cuda

from comit_bench import load_tokenizer
from comit_bench.train.config import load_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_day.sh"
PARTS = ("environment", "ids", "speed", "training", "probe")
MODULES = ("common", "summary", *(f"part_{name}" for name in (*PARTS, "tests", "tasks", "trainings")))


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


TRAINER = """
import os, pathlib, signal, sys, time
told = dict(text.split("=", 1) for text in sys.argv[1:] if "=" in text)
folder = pathlib.Path(told["output"], told["name"])
steps = 99999 if "trial" in told["output"] else STEPS
if told["name"] == "FAILS":
    sys.exit("it fails")
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
log = folder / "log.csv"
begun = log.exists()
if not begun:
    log.write_text("step,images,images_per_s\\n")
(folder / "arguments.txt").open("a").write(" ".join(sys.argv[1:]) + "\\n")
step = 0
while not begun and step < steps and not asked:
    time.sleep(0.02)
    step += 1
    with log.open("a") as stream:
        stream.write(f"{step},{step * 100},RATE\\n")
if begun or not asked:
    (folder / "validation.csv").write_text("step\\n1\\n")
    (folder / "export" / told["name"]).mkdir(parents=True)
    (folder / "export" / told["name"] / "config.json").write_text("{}")
else:
    (folder / "checkpoints" / f"step-{step:08d}").mkdir()
    (folder / "checkpoints" / f"step-{step:08d}" / "state.json").touch()
    sys.exit(130)
"""


@pytest.fixture
def trainings(day: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs something of the part with a stand-in for the trainer; returns its result and what it wrote."""
    common, part = import_module("common"), import_module("part_trainings")
    monkeypatch.setattr(part, "paint_drawings", lambda *_, **__: None)
    monkeypatch.setenv("GPU_DAY_RUNS", str(tmp_path / "runs"))

    def run(call: Any, *, seconds: float = 900, steps: int = 3, rate: float = 1e7, fails: str = "") -> Any:
        text = TRAINER.replace("STEPS", str(steps)).replace("RATE", str(rate)).replace("FAILS", fails)
        (tmp_path / "trainer.py").write_text(text)
        monkeypatch.setattr(part, "TRAIN", (sys.executable, "-I", "-S", str(tmp_path / "trainer.py")))
        monkeypatch.setattr(part, "TRIAL_ROWS", 2)
        start = common.Day("trainings", tmp_path, torch.device("cpu"), seconds, tiny=False)
        result = call(part, start)
        rows = import_module("summary").read(tmp_path)
        return result, rows, import_module("summary").page(rows)

    return run


def whole_part(part: Any, day: Any) -> int:
    return int(part.run(day))


def test_all_seeds_are_trained_when_there_is_time(trainings: Any, tmp_path: Path) -> None:
    code, rows, page = trainings(whole_part)
    assert code == 0 and "for want of time" not in page
    done = [(row["seed"], row["arm"]) for row in rows if "arm" in row]
    arms = import_module("part_trainings").ARMS
    assert sorted(done) == sorted((seed, arm) for seed in (0, 1, 2) for arm in arms)
    assert {seed for seed, _ in done[:5]} == {0}
    assert all(row["whole"] and row["images"] == 300 for row in rows if "arm" in row)
    trial = next(row for row in rows if row.get("what") == "trial")
    assert trial["images"] == 5000 * 1024 and trial["shortened_to"] == 1 and set(trial["rates"]) == set(arms)
    with tarfile.open(tmp_path / "seed-1.tar") as tar:
        names = tar.getnames()
    assert all(f"{arm}-seed1/export/config.json" in names for arm in arms)
    assert not list(tmp_path.glob("*.new"))
    told = (tmp_path / "runs" / "comit-nano-seed2" / "arguments.txt").read_text()
    assert "group=comit-nano" in told and "seed=2" in told and " steps=" not in told


def test_trainings_are_shortened_alike(trainings: Any, tmp_path: Path) -> None:
    """5.12 million images of each; the slowest arm decides."""

    def plan(part: Any, day: Any) -> Any:
        return part.Trainings(day, tmp_path)._plan(dict.fromkeys(part.ARMS, 9e4) | {"titok-nano": 1e4}, 20.0)

    made, rows, _ = trainings(plan, seconds=400)  # (400 - 3 - 2 x 20 - 10) s at 10,000 images/s, less a tenth
    assert made.images == pytest.approx(0.9 * 3.47e6, rel=0.01) and rows[0]["images"] == made.images
    steps = made.images // 1024
    for changes in made.changes.values():
        assert f"steps={steps}" in changes and f"optim.cosine_steps={steps}" in changes


def test_what_does_not_fit_is_left_out(trainings: Any, tmp_path: Path) -> None:
    def run(part: Any, day: Any) -> int:
        rates = dict.fromkeys(part.ARMS, 1e3) | {"vq-grid-nano": 1e7}
        plan = part.Plan(10**6, dict.fromkeys(part.ARMS, ("steps=7",)), rates, 1.0)
        return int(part.Trainings(day, tmp_path / "runs").run(plan))

    code, rows, page = trainings(run)
    assert code == 0
    done = [(row["arm"], row["seed"]) for row in rows if "arm" in row]
    assert len(done) == 7 and done[-1][0] == "vq-grid-nano" and {seed for _, seed in done[:5]} == {0}
    assert (
        "Left out for want of time: comit-nano-seed1 (1011 s), " in page and "vq-grid-nano-seed" not in page
    )
    assert " steps=7" in (tmp_path / "runs" / "comit-nano" / "arguments.txt").read_text()


def test_the_end_of_the_time_exports_what_is_there(trainings: Any, tmp_path: Path) -> None:
    def run(part: Any, day: Any) -> list[bool]:
        own = part.Trainings(day, tmp_path / "runs")
        running = [own.of(arm, 0) for arm in ("comit-nano", "titok-nano")]
        for training in running:
            training.start()
        while not all(training.rows() for training in running):
            time.sleep(0.05)
        own._end_early(running, part.Plan(1, {t.arm: ("clip=1", "steps=9") for t in running}, {}, 1.0))
        for training in running:
            training.process.wait()
        return [own._finished(training) for training in running]

    finished, rows, page = trainings(run, steps=10**6)
    assert finished == [True, True] and not any(row["whole"] for row in rows)
    assert page.count("stopped early, exported") == 2
    first, second = (tmp_path / "runs" / "comit-nano" / "arguments.txt").read_text().splitlines()
    assert second.startswith(first + " clip=1 steps=9 steps=")
    with tarfile.open(tmp_path / "seed-0.tar") as tar:
        assert {"comit-nano/export/config.json", "titok-nano/log.csv"} <= set(tar.getnames())


def test_an_arm_that_fails_stops_no_other(trainings: Any) -> None:
    code, rows, page = trainings(whole_part, fails="titok-nano")
    assert code == 1
    failed = [row for row in rows if "error" in row]
    assert [(row["arm"], row["error"]) for row in failed] == [("titok-nano", "it fails")]
    assert len([row for row in rows if "whole" in row]) == 12 and "it fails" in page


def test_too_little_time_is_said(trainings: Any) -> None:
    code, _, page = trainings(whole_part, seconds=60, rate=100.0)
    assert code == 1 and "Left out for want of time: all trainings" in page


def test_shortened_trainings_keep_their_phases_apart(day: Any) -> None:
    part = import_module("part_trainings")
    path = str(SCRIPT.parent / "gpu_day" / "comit-nano.yaml")
    config = load_config(path)
    assert part.shortened(config, 1.0) == ()
    short = load_config(path, part.shortened(config, 0.001))
    assert short.steps == short.optim.cosine_steps == 5
    assert [phase.until for phase in short.curriculum] == [1, 2, 4]
    assert short.curriculum[1].unseen_weight == config.curriculum[1].unseen_weight


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
    most_valuable = sum(
        int(seconds) for name, seconds in limits.items() if name not in ("tasks", "trainings")
    )
    assert most_valuable <= 9 * 60 - 5


@pytest.mark.slow
def test_the_whole_script_on_the_cpu(tmp_path: Path) -> None:
    done = script(str(tmp_path / "out"), "--device", "cpu", "--minutes", "15")
    assert done.returncode == 0, (done.stdout, (tmp_path / "out" / "gpu_day.log").read_text()[-3000:])
    page = (tmp_path / "out" / "gpu.md").read_text()
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines() if line
    ]
    assert [row["state"] for row in rows if "state" in row] == ["done"] * 8
    assert "skipped." in page and "One training step" in page
    assert page.count("| whole |") == 5 and "Side by side" in page
    with tarfile.open(tmp_path / "out" / "seed-0.tar") as tar:
        tar.extractall(tmp_path / "packed", filter="data")
    for arm in (
        "comit-nano",
        "comit-nano-no-srepa",
        "comit-nano-no-local-crops",
        "titok-nano",
        "vq-grid-nano",
    ):
        info = load_tokenizer(str(tmp_path / "packed" / arm / "export"), device="cpu").info
        assert info.trained and info.group == arm
