"""Trainings on drawings, side by side on one device: every arm at seed 0, then seeds 1 and 2 as time allows.

1. All scenes are painted, by all cores.
2. A trial: every arm trains beside the others until it has said how fast it is.
3. All arms get the same number of images, those of the settings or, where time is short, as many as the
   slowest can see; phases and learning rates are shortened alike.
4. As a place is free the next training starts, if it can end in time. What cannot is left out, with a line.
5. A training that is overtaken by the end stops in good order and exports what it has.

Each is a process of its own (``python -m comit_bench.train``): while one waits for Python, another computes.
``seed-<n>.tar`` holds what is exported, with the logs; it is written anew, whole, after each export.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Day

from comit_bench.train.checkpoint import found, step_of
from comit_bench.train.config import AutoencoderRun, TrainConfig, load_config
from comit_bench.train.drawings import paint_drawings
from comit_bench.train.logs import read_rows

Config = TrainConfig | AutoencoderRun

HERE = Path(__file__).resolve().parent
TRAIN = (sys.executable, "-m", "comit_bench.train")
# arm: (settings, changes); the slowest first
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "comit-nano": ("comit-nano", ()),
    "comit-nano-no-srepa": (
        "comit-nano",
        ("objective.srepa_weight=0", "objective.alignment_ramp=0", "teacher.name=none"),
    ),
    "comit-nano-no-local-crops": (
        "comit-nano",
        ("crops.max_crops=1", "crops.global_first=1", "curriculum=[]"),
    ),
    "titok-nano": ("titok-nano", ()),
    "vq-grid-nano": ("vq-grid-nano", ()),
}
SEEDS = (0, 1, 2)
TINY = ("steps=6", "log_every=1", "validate_every=100", "save_every=100", "optim.cosine_steps=6")
TINY_OF = {
    "comit": (
        *("global_batch=4", "precision=float32", "data.count=16", "data.val_count=4", "validation.steps=1"),
        *("validation.gather=4", "validation.pictures=2"),
        'curriculum=[{"until": 2, "max_crops": 1, "global_first": 1.0}]',
    ),
    "autoencoder": ("batch=4", "count=16", "val_count=4"),
}
TRIAL_ROWS = 4  # of the log; the first does not count
TRIAL_SHARE = 0.25  # of the time, at most
END_S = 10.0  # to validate, export and pack, beside a start
MARGIN = 0.9  # of the images that fit by the trial
SHORTEST = 0.1  # of the images of the settings; less is not worth a training


@dataclass
class Training:
    """One arm at one seed.

    Attributes:
        arm, seed: What it trains.
        runs: Folder of all trainings.
        settings: The configuration file and its changes.
        process: While it runs.
        ending: It was stopped before its last step, and exports what it has.
    """

    arm: str
    seed: int
    runs: Path
    settings: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None
    ending: bool = False
    began: float = 0.0

    @property
    def name(self) -> str:
        """Its folder, and the name in its card."""
        return self.arm if self.seed == 0 else f"{self.arm}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Where the trainer writes."""
        return self.runs / self.name

    @property
    def export(self) -> Path:
        """What it makes in the end."""
        return self.folder / "export" / self.name

    def start(self, *changes: str) -> None:
        """Begin, or go on from the last checkpoint."""
        self.began = self.began or time.monotonic()
        self.runs.mkdir(parents=True, exist_ok=True)
        own = (f"name={self.name}", f"group={self.arm}", f"seed={self.seed}", f"output={self.runs}")
        with (self.runs / f"{self.name}.txt").open("ab") as stream:
            self.process = subprocess.Popen(
                [*TRAIN, "--config", *self.settings, *own, *changes], stdout=stream, stderr=stream
            )

    def ended(self) -> bool:
        """Whether its process is not there any more."""
        return self.process is None or self.process.poll() is not None

    def rows(self) -> list[dict[str, str]]:
        """Its log so far."""
        return read_rows(self.folder / "log.csv")

    def rate(self, last: int = 0) -> float | None:
        """Images per second of the last rows of the log, or all, but for the first; None without two rows."""
        rows = self.rows()[-last:]
        seen = [int(row["images"]) for row in rows]
        parts = [seen[i] - seen[i - 1] for i in range(1, len(rows))]
        seconds = sum(n / float(row["images_per_s"]) for n, row in zip(parts, rows[1:], strict=False))
        return sum(parts) / seconds if seconds else None

    def reached(self) -> int:
        """Step of its last checkpoint, 0 without one."""
        return max((step_of(path) for path in found(self.folder / "checkpoints")), default=0)

    def config(self) -> Config:
        """Its settings."""
        path, *others = self.settings
        config = load_config(path, tuple(text for text in others if "=" in text))
        assert isinstance(config, Config)
        return config

    def said(self) -> str:
        """The last line that the trainer wrote."""
        path = self.runs / f"{self.name}.txt"
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
        return next((line.rpartition("\r")[2][:300] for line in reversed(lines) if line.strip()), "")


@dataclass(frozen=True)
class Plan:
    """What all trainings have in common."""

    images: int  # of each
    changes: dict[str, tuple[str, ...]]  # by arm: steps and schedules
    rates: dict[str, float]  # images/s of the trial
    start_s: float  # of a trainer, until it trains


class Trainings:
    """All of them on one day."""

    def __init__(self, day: Day, runs: Path) -> None:
        self.day, self.runs = day, runs
        self.done: dict[int, list[Training]] = {}
        self.all: list[Training] = []

    def of(self, arm: str, seed: int, runs: Path | None = None) -> Training:
        """One training that has not begun."""
        name, changes = ARMS[arm]
        kind = "comit" if name == "comit-nano" else "autoencoder"
        tiny = (*TINY, *TINY_OF[kind]) if self.day.tiny else ()
        where = ("--device", self.day.device.type, "--quiet")
        made = Training(arm, seed, runs or self.runs, (str(HERE / f"{name}.yaml"), *where, *tiny, *changes))
        self.all.append(made)
        return made

    # ------------------------------------------------------------------ trial

    def trial(self) -> Plan | None:
        """How fast the arms are beside each other, and what that leaves room for; None for nothing."""
        arms = [self.of(arm, 0, self.runs / "trial") for arm in ARMS]
        begun = time.monotonic()
        for training in arms:
            every = () if self.day.tiny else ("log_every=10",)
            endless = ("steps=1000000", "validate_every=1000000", "save_every=1000000", *every)
            phases = ("curriculum=[]",) if isinstance(training.config(), TrainConfig) else ()  # the slowest
            training.start(*endless, *phases)
        first: float | None = None
        most = TRIAL_SHARE * self.day.left
        while time.monotonic() - begun < most:
            rows = [len(t.rows()) for t in arms if not t.ended()]
            if first is None and rows and min(rows) > 0:
                first = time.monotonic() - begun
            if not rows or min(rows) >= TRIAL_ROWS:
                break
            time.sleep(0.2)
        rates = {t.arm: rate for t in arms if (rate := t.rate(TRIAL_ROWS))}
        stop(arms, 20)
        for training in arms:
            if training.arm not in rates:
                self.day.write(arm=training.arm, seed=0, error=training.said() or "no step in the trial")
        return self._plan(rates, first or 0.0)

    def _plan(self, rates: dict[str, float], start_s: float) -> Plan | None:
        configs = {arm: self.of(arm, 0).config() for arm in rates}
        seconds = self.day.left - 2 * start_s - END_S
        share = [rates[a] * seconds / (c.steps * c.global_batch) for a, c in configs.items()]
        told = {"what": "trial", "rates": rates, "together": sum(rates.values()), "start_s": start_s}
        if not share or min(share) < SHORTEST:
            self.day.write(**told, images=0)
            names = [f"all trainings: {max(seconds, 0):.0f} s are too few"]
            self.day.write(what="left out for want of time", names=names)
            return None
        factor = 1.0 if min(share) * MARGIN >= 1 else min(share) * MARGIN
        images = max(part_of(c.steps, factor) * c.global_batch for c in configs.values())
        self.day.write(**told, images=images, shortened_to=factor)
        return Plan(images, {arm: shortened(c, factor) for arm, c in configs.items()}, rates, start_s)

    # ------------------------------------------------------------------ the trainings

    def run(self, plan: Plan) -> int:
        """All that fit; 0 when each of these came to its end."""
        seeds = SEEDS[:1] if self.day.tiny else SEEDS
        queue = [self.of(arm, seed) for seed in seeds for arm in ARMS if arm in plan.rates]
        running: list[Training] = []
        left_out: list[str] = []
        wrong = len(ARMS) - len(plan.rates)
        while queue or running:
            while queue and len(running) < len(ARMS):
                training = queue.pop(0)
                needs = plan.images / plan.rates[training.arm] + plan.start_s + END_S
                if training.seed and needs > self.day.left - plan.start_s - END_S:
                    left_out.append(f"{training.name} ({needs:.0f} s)")
                    continue
                training.start(*plan.changes[training.arm])
                running.append(training)
            time.sleep(0.2)
            if self.day.left < plan.start_s + END_S:
                left_out += [training.name for training in queue]
                queue = []
                self._end_early(running, plan)
            for training in [t for t in running if t.ended()]:
                running.remove(training)
                wrong += not self._finished(training)
            if self.day.left < 1:
                break
        wrong += len(running)
        for training in running:
            self.day.write(arm=training.arm, seed=training.seed, error="no time was left for its export")
        if left_out:
            self.day.write(what="left out for want of time", names=left_out)
        return int(wrong > 0)

    def _end_early(self, running: list[Training], plan: Plan) -> None:
        """Stop in good order; what has a checkpoint goes on to export it."""
        late = [training for training in running if not training.ending]
        stop(late, 10)
        for training in (t for t in late if not t.export.is_dir()):
            training.ending = True
            if step := training.reached():
                training.start(*plan.changes[training.arm], f"steps={step}")

    def _finished(self, training: Training) -> bool:
        """Write down how a training ended, and pack its export."""
        what = {"arm": training.arm, "seed": training.seed}
        if not training.export.is_dir():
            self.day.write(**what, error=training.said() or "it ended without a word")
            return False
        self.day.write(
            **what,
            images=int(training.rows()[-1]["images"]),
            images_per_s=training.rate(),
            seconds=round(time.monotonic() - training.began, 1),
            whole=not training.ending,
            measures=(read_rows(training.folder / "validation.csv") or [{}])[-1],
        )
        self.done.setdefault(training.seed, []).append(training)
        pack(self.day.out / f"seed-{training.seed}.tar", self.done[training.seed])
        return True


def part_of(steps: int, factor: float) -> int:
    """A number of steps, shortened."""
    return max(1, round(steps * factor))


def shortened(config: Config, factor: float) -> tuple[str, ...]:
    """Changes of the settings that shorten a training with all its phases; none for 1."""
    if factor == 1:
        return ()
    changes = {"steps": config.steps, "optim.warmup_steps": config.optim.warmup_steps}
    if config.optim.cosine_steps:
        changes["optim.cosine_steps"] = config.optim.cosine_steps
    if isinstance(config, AutoencoderRun):
        changes["restart_until"] = config.restart_until
    else:
        changes["objective.alignment_ramp"] = config.objective.alignment_ramp
    told = [f"{key}={part_of(steps, factor) if steps else 0}" for key, steps in changes.items()]
    if isinstance(config, TrainConfig):
        phases: list[dict[str, Any]] = []
        for phase in config.curriculum:
            until = max(part_of(phase.until, factor), phases[-1]["until"] + 1 if phases else 1)
            phases.append(phase.model_dump(exclude_none=True) | {"until": until})
        told.append(f"curriculum={json.dumps(phases)}")
    return tuple(told)


def stop(trainings: Sequence[Training], seconds: float) -> None:
    """Ask for checkpoints and an orderly end; after some seconds end them all the same."""
    alive = [t.process for t in trainings if t.process is not None and t.process.poll() is None]
    for process in alive:
        process.send_signal(signal.SIGTERM)
    end = time.monotonic() + seconds
    for process in alive:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def pack(archive: Path, trainings: Sequence[Training]) -> None:
    """Exports and logs of some trainings in one file, which is there whole or as it was before."""
    new = archive.with_name(archive.name + ".new")
    with tarfile.open(new, "w") as tar:
        for training in trainings:
            tar.add(training.export, f"{training.name}/export")
            for log in ("log.csv", "validation.csv"):
                tar.add(training.folder / log, f"{training.name}/{log}")
    new.replace(archive)


def run(day: Day) -> int:
    """Paint, try, train."""
    cores = os.cpu_count() or 1
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # steps differ in size
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // len(ARMS)))
    kept = os.environ.get("GPU_DAY_RUNS")
    with tempfile.TemporaryDirectory() as passing:
        trainings = Trainings(day, Path(kept or passing).resolve())
        data = trainings.of("titok-nano", 0).config()
        assert isinstance(data, AutoencoderRun)
        before = time.monotonic()
        for split, count in (("train", data.count), ("val", data.val_count)):
            paint_drawings(split, 0, count, 64, workers=0 if day.tiny else max(1, cores - 1))
        day.write(what="painted", images=data.count, seconds=round(time.monotonic() - before, 1))
        try:
            plan = trainings.trial()
            return 1 if plan is None else trainings.run(plan)
        finally:
            stop(trainings.all, 5)
