"""Small trainings end, continue and refuse as those of COMiT do: one Trainer does them all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from versions import needs_muon

from comit_bench.errors import BenchError, UsageError
from comit_bench.train import checkpoint
from comit_bench.train.config import AnyRun, load_config
from comit_bench.train.loop import Stop, Trainer

ROOT = Path(__file__).resolve().parents[2]
OFTEN = ("batch=4", "save_every=1", "log_every=2", "keep_last=99")
SMALL = {
    "vq-grid-nano": (*OFTEN, "count=24", "val_count=8", "validate_every=3"),
    "titok-nano": (*OFTEN, "count=24", "val_count=8", "restart_every=2", "restart_until=6"),
    "scenes-teacher": (*OFTEN, "count=100", "val_count=100", "width=8", "depth=0", "dim=8"),
}
NAMES = [pytest.param(name, marks=needs_muon if name != "scenes-teacher" else ()) for name in SMALL]


def settings(name: str, output: Path, *overrides: str) -> AnyRun:
    return load_config(name, (*SMALL[name], "steps=6", f"output={output}", *overrides))


def files(trainer: Trainer, step: int) -> dict[str, torch.Tensor]:
    place = checkpoint.folder(trainer.checkpoints, step)
    parts = [load_file(place / f"{part}.safetensors") for part in ("model", "optimizer")]
    return {f"{n}/{key}": value for n, part in enumerate(parts) for key, value in part.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Signalled(Trainer):
    def _step(self, batch: Any, stop: Stop) -> tuple[list[float], bool]:
        if batch.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return super()._step(batch, stop)


class Poisoned(Trainer):
    bad: tuple[int, ...] = ()

    def _gradients(self, batch: Any) -> torch.Tensor:
        means = super()._gradients(batch)
        if batch.step in self.bad:
            self.parameters[0].grad = torch.full_like(self.parameters[0], float("nan"))
        return means


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_saves_and_the_same_command_continues(name: str, tmp_path: Path) -> None:
    first = Signalled(settings(name, tmp_path, "save_every=99"), device="cpu", progress=False)
    assert first.fit() is None
    assert [checkpoint.step_of(p) for p in checkpoint.found(first.checkpoints)] == [3]
    second = Trainer(settings(name, tmp_path), device="cpu", progress=False)
    whole = Trainer(settings(name, tmp_path / "whole"), device="cpu", progress=False)
    assert second.fit() is not None and whole.fit() is not None
    assert same(files(second, 6), files(whole, 6))


@pytest.mark.parametrize("name", NAMES)
def test_steps_that_are_not_finite_are_skipped_and_many_stop(name: str, tmp_path: Path) -> None:
    trainer = Poisoned(settings(name, tmp_path), device="cpu", progress=False)
    trainer.bad = (2, 3)
    assert trainer.fit() is not None
    assert (trainer.counters.skipped, trainer.counters.step) == (2, 6)
    moments = [{k: v for k, v in files(trainer, n).items() if "used" not in k} for n in (2, 4)]
    assert same(*moments)
    trainer = Poisoned(settings(name, tmp_path / "b", "max_bad_steps=3"), device="cpu", progress=False)
    trainer.bad = (1, 2, 3)
    with pytest.raises(BenchError, match=r"3 steps in a row.*step 4 with the images scene \d+"):
        trainer.fit()


def test_kill_9_at_any_moment(tmp_path: Path) -> None:
    name = "scenes-teacher"
    command = ["-m", "comit_bench.train", "--config", name, "-q", *SMALL[name], f"output={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, *command, "steps=400"], env=environment)
    place = tmp_path / name / "checkpoints"
    deadline = time.monotonic() + 60
    while len(checkpoint.found(place)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    reached = checkpoint.step_of(checkpoint.found(place)[-1])
    torch.set_num_threads(1)
    trainer = Trainer(settings(name, tmp_path, "steps=400"), device="cpu", progress=False)
    assert trainer.counters.step >= reached >= 3


@pytest.mark.parametrize("name", NAMES)
def test_resume_and_out_of_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(settings(name, tmp_path, "device_batch=2"), device="cpu", progress=False)
    assert trainer.work.pieces == 2
    monkeypatch.setattr(trainer, "module", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(BenchError, match=r"Lower device_batch \(now 2"):
        trainer.fit()
    assert Trainer(settings(name, tmp_path), device="cpu", progress=False).fit() is not None
    with pytest.raises(UsageError, match="holds checkpoints up to step 6"):
        Trainer(settings(name, tmp_path), device="cpu", progress=False, resume="never")
