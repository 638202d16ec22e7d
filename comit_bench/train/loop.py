"""The training loop: one process, or as many as ``accelerate launch`` or ``torchrun`` start.

A step is a function of (configuration, step number, weights, optimizer state): order of the data, crops,
times and noise are keyed by seed, step and sample. So a run that is killed at any moment continues from
its last checkpoint bit for bit on a CPU, and the number of processes only changes rounding.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from comit_bench.errors import BenchError, memory_runs_out
from comit_bench.files import user_path
from comit_bench.train import checkpoint
from comit_bench.train.board import TRAIN, VALIDATION, Board, check_tensorboard
from comit_bench.train.card import RunFacts
from comit_bench.train.checkpoint import Counters, TrainState, only_training
from comit_bench.train.config import AnyRun, AutoencoderRun, DataConfig, DistillationRun, TrainConfig
from comit_bench.train.data import iterate_steps
from comit_bench.train.ema import Ema
from comit_bench.train.logs import CsvLog
from comit_bench.train.objectives.autoencoder import AutoencoderObjective
from comit_bench.train.objectives.base import Process, TrainObjective
from comit_bench.train.objectives.comit_run import ComitObjective
from comit_bench.train.objectives.distillation import DistillationObjective
from comit_bench.train.objectives.teacher import TeacherObjective
from comit_bench.train.optimizers import make_optimizer
from comit_bench.train.pictures import save_picture
from comit_bench.train.setup import divide, make_accelerator
from comit_bench.train.sharding import full, gather, shard, sync_gradients

NAMED = 16  # sample ids in a message


class Stop:
    """Hears SIGINT and SIGTERM: the first asks for an orderly end, a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Trainer:
    """Everything of one run; :meth:`fit` runs it.

    Args:
        config: Settings; their kind says what is learned.
        device: ``auto``, ``cpu`` or ``cuda``.
        resume: ``auto``, ``never`` or a checkpoint directory.
        progress: Show bars.
        command: For the model card.

    Raises:
        UsageError: Anything about the settings, data or checkpoint that does not fit.
        MissingError: Data or weights that are not here.
    """

    def __init__(
        self,
        config: AnyRun,
        *,
        device: str = "auto",
        resume: str = "auto",
        progress: bool = True,
        command: str = "",
    ) -> None:
        self.config, self.command = config, command
        check_tensorboard(config.tensorboard)
        self.accelerator = make_accelerator(config, device)
        self.device: torch.device = self.accelerator.device
        self.main: bool = self.accelerator.is_main_process
        self.work = divide(config, self.accelerator.num_processes)
        self.directory = user_path(config.output, "output") / config.name
        self.checkpoints = self.directory / "checkpoints"
        with self._alone():  # now, not after an hour of reading
            start = checkpoint.choose(self.checkpoints, resume)
        process = Process(self.device, self.accelerator.process_index, self.work.ranks)
        self.objective = make_objective(config, process)
        self.steps = self.objective.steps
        self.parts = (*self.objective.parts, "grad_norm")
        if start is not None:
            checkpoint.read_counters(start, config, self.objective.data)
        self._build(start)
        self.progress = progress and self.main
        columns = ("step", "images", "learning_rate", *self.parts, *self.objective.columns)
        self.log = CsvLog(self.directory / "log.csv", (*columns, "skipped", "images_per_s"))
        measures = ("step", *self.objective.measures)
        self.validation_log = CsvLog(self.directory / "validation.csv", measures)
        self.board = Board(self.directory, active=config.tensorboard and self.main)
        self.since = time.monotonic()
        self.metrics: dict[str, float] = {}

    def _build(self, start: Path | None) -> None:
        config, objective = self.config, self.objective
        objective.build()
        self.raw = objective.module
        self.sharded = config.sharding == "fsdp2" and self.work.ranks > 1
        if self.sharded:
            assert isinstance(objective, ComitObjective)
            shard(self.raw, objective.network, self.device)
        self.parameters = [p for p in self.raw.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.raw, config, self.device)
        ema = None
        if objective.averaged is not None:
            ema = Ema(objective.averaged, config.optim.ema, warmup=config.optim.ema_warmup)
        self.state = TrainState(self.raw, ema, optimizer)
        self.counters = Counters(sums=[0.0] * len(self.parts))
        if start is not None:
            self.counters = checkpoint.load_checkpoint(start, self.state, config, objective.data)
        self._agree(self.counters.step)
        if self.counters.step < config.steps:
            objective.open_cache()
        self.module: nn.Module = self.raw if self.sharded else self.accelerator.prepare_model(self.raw)

    def _alone(self) -> AbstractContextManager[None]:
        """No other run trains in this folder during the block; the main process sees to it."""
        return only_training(self.directory) if self.main else nullcontext()

    def _agree(self, step: int) -> None:
        """All processes must continue from the same step: they need one file system."""
        if self.work.ranks > 1:
            steps = set(gather_object([step]))
            if len(steps) > 1:
                raise BenchError(
                    f"{self.checkpoints}: the processes see different checkpoints (steps {sorted(steps)}). "
                    "All of them must see the same output directory."
                )

    # ----------------------------------------------------------------- a step

    def _gradients(self, batch: Any) -> Tensor:
        """Backward through all pieces; the means of the loss parts over this rank's images [parts]."""
        size, pieces = self.work.device_batch, self.work.pieces
        self.state.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(len(self.objective.parts), device=self.device)
        for piece in range(pieces):
            inputs = self.objective.inputs(batch, slice(piece * size, (piece + 1) * size))
            with self._piece(piece == pieces - 1):
                with self.accelerator.autocast() if self.sharded else nullcontext():
                    parts = self.module(*inputs)
                (parts[0] / pieces).backward()
            sums += torch.stack([torch.as_tensor(p, device=self.device).detach().float() for p in parts])
        return sums / pieces

    def _piece(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are brought together after the last piece only."""
        if self.sharded:
            sync_gradients(self.raw, last)
            return nullcontext()
        waiting: AbstractContextManager[None] = self.accelerator.no_sync(self.module)
        return nullcontext() if last else waiting

    def _step(self, batch: Any, stop: Stop) -> tuple[list[float], bool]:
        """One optimizer step. Returns the values of ``parts`` and whether to stop, equal on all ranks."""
        means = self._gradients(batch)
        norm = full(nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip))
        flag = torch.full((1,), float(stop.asked), device=self.device)
        shared = torch.cat([means, flag])
        if self.work.ranks > 1:
            shared = torch.as_tensor(self.accelerator.reduce(shared, "mean"))
        *values, asked = torch.cat([shared[:-1], norm.detach().float()[None], shared[-1:]]).tolist()
        counters = self.counters
        if all(math.isfinite(value) for value in values):
            rate = self.objective.rate(batch.step)
            for group in self.state.optimizer.param_groups:
                group["lr"] = rate * group.get("factor", 1.0)
            self.state.optimizer.step()
            if self.state.ema is not None:
                self.state.ema.update(batch.step)
            self.objective.after(batch, self.state.optimizer)
            counters.bad_run = 0
            counters.sums = [a + b for a, b in zip(counters.sums, values, strict=True)]
            counters.counted += 1
        else:
            self._bad_step(batch.step, values)
        counters.step = batch.step + 1
        return values, asked > 0

    def _bad_step(self, step: int, values: list[float]) -> None:
        counters, limit = self.counters, self.config.max_bad_steps
        counters.skipped += 1
        counters.bad_run += 1
        ids = list(self.steps.global_ids(step))
        if self.main:
            named = {name: str(value) for name, value in zip(self.parts, values, strict=True)}
            entry = {"step": step + 1, **named, "ids": ids}
            with (self.directory / "bad-steps.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
        if counters.bad_run >= limit:
            more = f", … ({len(ids)} in all, see bad-steps.jsonl)" if len(ids) > NAMED else ""
            raise BenchError(
                f"{limit} steps in a row had a loss or gradient that is not finite, the last was step "
                f"{step + 1} with the images {', '.join(ids[:NAMED])}{more}. Lower optim.learning_rate, or "
                "look at these images; training continues from the last checkpoint."
            )

    # ------------------------------------------------------------ bookkeeping

    def _log(self, batch: Any, rate: float) -> None:
        counters, count = self.counters, max(self.counters.counted, 1)
        row: dict[str, float | int] = {
            "step": counters.step,
            "images": counters.step * self.config.global_batch,
            "learning_rate": self.state.optimizer.param_groups[0]["lr"],
            "skipped": counters.skipped,
            "images_per_s": round(rate, 2),
            **self.objective.log_values(batch),
        }
        row |= {name: value / count for name, value in zip(self.parts, counters.sums, strict=True)}
        counters.sums, counters.counted = [0.0] * len(self.parts), 0
        if self.main:
            self.log.append(row)
            self.board.scalars(TRAIN, counters.step, row)

    def _count_broken(self, local: dict[str, str]) -> None:
        """Bring together what all ranks found and stop when it is too much, on all at once."""
        found = gather_object(list(local.items())) if self.work.ranks > 1 else local
        self.objective.broken.add(dict(found))

    def _validate(self) -> bool:
        """Measure the weights to export on the main process; whether they are the best so far, on all."""
        better = False
        with self._averaged() as network:
            if network is not None:
                self._measure(network)
        if self.main:
            step = self.counters.step
            self.validation_log.append({"step": step, **self.metrics})
            self.board.scalars(VALIDATION, step, self.metrics)
            self.board.picture(step, self._picture)
            if self.objective.judge is not None:
                loss, best = self.metrics[self.objective.judge], self.counters.best_value
                better = math.isfinite(loss) and (best is None or loss < best)
                if better:
                    self.counters.best_step, self.counters.best_value = step, loss
        # all processes save together
        return any(gather_object([better])) if self.work.ranks > 1 else better

    @property
    def _picture(self) -> Path:
        return self.directory / "pictures" / f"step-{self.counters.step:08d}.png"

    def _measure(self, network: nn.Module) -> None:
        self.metrics, sheet = self.objective.validate(network)
        if sheet is not None:
            save_picture(sheet, self._picture)

    @contextmanager
    def _averaged(self) -> Iterator[nn.Module | None]:
        """The network with the weights to export, in evaluation mode. All processes must ask together.

        None on other processes than the main one. With sharded weights the main process holds a whole
        copy for as long as it is needed.
        """
        ema, averaged = self.state.ema, self.objective.averaged
        if self.sharded and ema is not None and averaged is not None:
            whole = gather({**averaged.state_dict(), **ema.averages}, keep=self.main)
            yield self.objective.copy_with(whole) if self.main else None
        elif not self.main:
            yield None
        else:
            training = self.raw.training
            self.raw.eval()
            try:
                with ema.applied() if ema is not None else nullcontext():
                    yield self.objective.network
            finally:
                self.raw.train(training)

    def _save(self) -> None:
        tensors = self.state.files(keep=self.main)
        if self.main:
            counters = self.counters
            counters.seconds += time.monotonic() - self.since
            self.since = time.monotonic()
            checkpoint.save_checkpoint(self.checkpoints, tensors, counters, self.config, self.objective.data)
            checkpoint.tidy(self.checkpoints, keep_last=self.config.keep_last, best=counters.best_step)

    def _due(self, every: int) -> bool:
        return self.counters.step % every == 0 or self.counters.step >= self.config.steps

    # -------------------------------------------------------------------- run

    def _prepare_files(self) -> None:
        """Take back what a killed run has logged after its last checkpoint."""
        last = checkpoint.found(self.checkpoints)[-1:]
        if last and checkpoint.step_of(last[0]) > self.counters.step:
            raise BenchError(
                f"{self.directory}: another run has trained in this folder meanwhile, up to step "
                f"{checkpoint.step_of(last[0])}. Start the same command again to go on from there."
            )
        self.since = time.monotonic()
        if self.main:
            checkpoint.sweep(self.checkpoints)
            self.log.start(self.counters.step)
            if self.objective.measures:
                self.validation_log.start(self.counters.step)
            self.board.start(self.counters.step)

    def fit(self) -> Path | None:
        """Train to the last step, validate and export.

        Returns:
            The exported folder; None when a signal asked to stop (a checkpoint was saved).
        """
        with self._alone(), Stop() as stop:
            self._prepare_files()
            self.raw.train()
            if self.counters.step < self.config.steps and not self._run(stop):
                return None
            return self._finish()

    def _run(self, stop: Stop) -> bool:
        """All remaining steps; False when asked to stop."""
        self.objective.fill_cache(lambda: stop.asked, progress=self.progress)
        config, start = self.config, self.counters.step
        data = config.data if isinstance(config, TrainConfig) else DataConfig()
        pin = self.device.type == "cuda" and not data.on_device
        batches = iterate_steps(self.steps, start, workers=data.workers, pin=pin)
        broken: dict[str, str] = {}
        clock, images = time.monotonic(), 0
        with tqdm(
            total=config.steps, initial=start, desc=config.name, unit="step", disable=not self.progress
        ) as bar:
            for batch in batches:
                with memory_runs_out(self._memory_advice):
                    values, asked = self._step(batch, stop)
                broken |= batch.broken
                images += config.global_batch
                rate = images / max(time.monotonic() - clock, 1e-9)
                bar.set_postfix_str(self._postfix(values, rate), refresh=False)
                bar.update()
                if self._due(config.log_every):
                    self._count_broken(broken)
                    self._log(batch, rate)
                    broken, clock, images = {}, time.monotonic(), 0
                before = time.monotonic()
                due = bool(self.objective.measures) and self._due(config.validate_every)
                better = due and self._validate()
                if better or asked or self._due(config.save_every):
                    self._save()
                clock += time.monotonic() - before
                if asked:
                    return False
        return True

    @property
    def _memory_advice(self) -> str:
        smaller = f"Lower device_batch (now {self.work.device_batch}: only rounding depends on it)"
        if not self.config.activation_checkpointing:
            smaller += ", or set activation_checkpointing=true"
        return f"{smaller}. The same command then continues from the last checkpoint."

    def _postfix(self, values: list[float], rate: float) -> str:
        named = zip(self.parts, values, strict=True)
        parts = " ".join(f"{name} {value:.3f}" for name, value in named if value)
        return f"{parts} {rate:.1f} img/s"

    def close(self) -> None:
        """Close the event file and leave the process group, if there is one."""
        self.board.close()
        self.accelerator.end_training()

    def _finish(self) -> Path | None:
        """Export the network with the last measurements, on the main process."""
        with self._averaged() as network:
            if network is None:
                return None
            if self.objective.measures and not self.metrics:  # the last row may be of an earlier step
                self._measure(network)
            config, counters = self.config, self.counters
            gpu = self.device.type == "cuda"
            kind = torch.cuda.get_device_name(self.device) if gpu else f"CPU with {os.cpu_count()} cores"
            facts = RunFacts(
                step=counters.step,
                skipped=counters.skipped,
                images=counters.step * config.global_batch,
                train_images=self.objective.train_images,
                val_images=self.objective.val_images,
                seconds=counters.seconds,
                hardware=f"{self.work.ranks} x {kind}",
                command=self.command,
                metrics=self.metrics,
            )
            target = self.directory / "export" / config.name
            self.objective.export(network, facts, target, self._picture)
            return target


def make_objective(config: AnyRun, process: Process) -> TrainObjective:
    """What the settings train; raises as its constructor does."""
    if isinstance(config, TrainConfig):
        return ComitObjective(config, process)
    if isinstance(config, AutoencoderRun):
        return AutoencoderObjective(config, process)
    if isinstance(config, DistillationRun):
        return DistillationObjective(config, process)
    return TeacherObjective(config, process)
