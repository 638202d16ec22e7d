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
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from comit_bench.errors import BenchError, memory_runs_out
from comit_bench.files import digest_json, user_path
from comit_bench.nn.teachers import TeacherFeatures
from comit_bench.tokenizers.comit.model import Comit
from comit_bench.train import checkpoint, validation
from comit_bench.train.board import TRAIN, VALIDATION, Board, check_tensorboard
from comit_bench.train.card import RunFacts
from comit_bench.train.checkpoint import Counters, TrainState
from comit_bench.train.config import TrainConfig
from comit_bench.train.data import Batch, Broken, Steps, iterate_steps, open_images, read_all
from comit_bench.train.ema import Ema
from comit_bench.train.export import export
from comit_bench.train.features import FeatureStore, compute_features, images_digest, open_features
from comit_bench.train.logs import CsvLog
from comit_bench.train.optimizers import make_optimizer
from comit_bench.train.pictures import save_picture
from comit_bench.train.runstate import only_training
from comit_bench.train.sampling import mean_crops
from comit_bench.train.scaling import block_runner, compile_frozen
from comit_bench.train.schedule import alignment_ramp, learning_rate
from comit_bench.train.setup import (
    check_spec,
    divide,
    make_accelerator,
    make_module,
    make_teacher,
)
from comit_bench.train.sharding import full, gather, shard, sync_gradients, whole_copy

PARTS = ("loss", "flow", "repa", "srepa", "grad_norm")
COLUMNS = ("step", "images", "learning_rate", *PARTS, "ramp", "crops", "skipped", "images_per_s")
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
        config: Settings.
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
        config: TrainConfig,
        *,
        device: str = "auto",
        resume: str = "auto",
        progress: bool = True,
        command: str = "",
    ) -> None:
        self.config, self.command = config, command
        check_tensorboard(config.tensorboard)
        spec = config.model.spec()
        check_spec(spec)
        self.accelerator = make_accelerator(config, device)
        self.device: torch.device = self.accelerator.device
        self.main: bool = self.accelerator.is_main_process
        self.work = divide(config, self.accelerator.num_processes)
        self.directory = user_path(config.output, "output") / config.name
        self.checkpoints = self.directory / "checkpoints"
        with self._alone():  # now, not after an hour of reading
            start = checkpoint.choose(self.checkpoints, resume)
        train, held = open_images(config)
        self.data_digest = digest_json(list(train.ids))
        if start is not None:
            checkpoint.read_counters(start, config, self.data_digest)
        self.steps = Steps(config, train, rank=self.accelerator.process_index, ranks=self.work.ranks)
        self.held = read_all(held) if self.main else None
        self.broken = Broken(len(train.ids), config.data.max_broken)
        self._build(start)
        self.progress = progress and self.main
        self.log = CsvLog(self.directory / "log.csv", COLUMNS)
        self.validation_log = CsvLog(self.directory / "validation.csv", validation.COLUMNS)
        self.board = Board(self.directory, active=config.tensorboard and self.main)
        self.since = time.monotonic()
        self.metrics: dict[str, float] = {}

    def _build(self, start: Path | None) -> None:
        config = self.config
        self.teacher = make_teacher(config, self.device)
        self.raw = make_module(config, self.teacher)
        self.raw.to(self.device)
        self.model = self.raw.model
        self.raw.runner = block_runner(compile=config.compile, recompute=config.activation_checkpointing)
        if config.compile:
            compile_frozen(self.model, self.teacher)
        self.sharded = config.sharding == "fsdp2" and self.work.ranks > 1
        if self.sharded:
            shard(self.raw, self.model, self.device)
        self.parameters = [p for p in self.raw.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.raw, config, self.device)
        ema = Ema(self.model.predictor, config.optim.ema, warmup=config.optim.ema_warmup)
        self.state = TrainState(self.raw, ema, optimizer)
        self.counters = Counters(sums=[0.0] * len(PARTS))
        if start is not None:
            self.counters = checkpoint.load_checkpoint(start, self.state, config, self.data_digest)
        self._agree(self.counters.step)
        self.store = self._open_features()
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

    def _open_features(self) -> FeatureStore | None:
        """The teacher's features on disk, if asked for and not finished; refuses when there is no room."""
        config = self.config
        if self.teacher is None or config.teacher.cache == "none" or self.counters.step >= config.steps:
            return None
        source = self.steps.source
        digest = [images_digest(source) if self.main else ""]
        broadcast_object_list(digest)
        spec = config.model.spec()
        store = open_features(
            config.teacher,
            self.teacher,
            source,
            tokens=(spec.max_input_size // spec.patch_size) ** 2,
            data=digest[0],
            device=self.device,
            precision=config.precision,
        )
        self.accelerator.wait_for_everyone()  # nobody writes before all have seen that there is room
        return store

    def _fill_features(self, stop: Stop) -> None:
        """Compute what is missing, each process its part; from then on the teacher is not needed."""
        if self.store is None or self.teacher is None:
            return
        self.store.fill(
            self.steps.source,
            self.teacher,
            device=self.device,
            rank=self.accelerator.process_index,
            ranks=self.work.ranks,
            workers=self.config.data.workers,
            stopped=lambda: stop.asked,
            progress=self.progress,
        )
        self.accelerator.wait_for_everyone()
        self.steps.features, self.teacher = self.store, None

    # ----------------------------------------------------------------- a step

    def _gradients(self, batch: Batch) -> Tensor:
        """Backward through all pieces; the means of the loss parts over this rank's images [4]."""
        size, pieces = self.work.device_batch, self.work.pieces
        ramp = alignment_ramp(batch.step, self.config.objective.alignment_ramp)
        self.state.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(4, device=self.device)
        plan = batch.plan.to(self.device)
        for piece in range(pieces):
            rows = slice(piece * size, (piece + 1) * size)
            images = validation.to_pixels(batch.images[rows], self.device)
            features = self._features(batch, rows, images)
            last = piece == pieces - 1
            with self._piece(last):
                with self.accelerator.autocast() if self.sharded else nullcontext():
                    parts = self.module(images, plan.select(rows), features, ramp)
                (parts.total / pieces).backward()
            shown = [parts.total, parts.flow, parts.repa, parts.srepa]
            sums += torch.stack([torch.as_tensor(p, device=self.device).detach().float() for p in shown])
        return sums / pieces

    def _piece(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are brought together after the last piece only."""
        if self.sharded:
            sync_gradients(self.raw, last)
            return nullcontext()
        waiting: AbstractContextManager[None] = self.accelerator.no_sync(self.module)
        return nullcontext() if last else waiting

    def _features(self, batch: Batch, rows: slice, images: Tensor) -> TeacherFeatures | None:
        """Of some images of the batch: from the cache, or computed now; None without a teacher."""
        if batch.features is not None:
            return batch.features.select(rows).to(self.device)
        return None if self.teacher is None else compute_features(self.teacher, images)

    def _step(self, batch: Batch, stop: Stop) -> tuple[list[float], bool]:
        """One optimizer step. Returns the values of ``PARTS`` and whether to stop, equal on all ranks."""
        means = self._gradients(batch)
        norm = full(nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip))
        flag = torch.full((1,), float(stop.asked), device=self.device)
        shared = torch.cat([means, flag])
        if self.work.ranks > 1:
            shared = torch.as_tensor(self.accelerator.reduce(shared, "mean"))
        *values, asked = torch.cat([shared[:4], norm.detach().float()[None], shared[4:]]).tolist()
        optim, counters = self.config.optim, self.counters
        if all(math.isfinite(value) for value in values):
            rate = learning_rate(
                batch.step,
                peak=optim.learning_rate,
                warmup=optim.warmup_steps,
                cosine_steps=optim.cosine_steps,
            )
            for group in self.state.optimizer.param_groups:
                group["lr"] = rate * group.get("factor", 1.0)
            self.state.optimizer.step()
            self.state.ema.update(batch.step)
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
        ids = self.steps.global_ids(step)
        if self.main:
            entry = {"step": step + 1, **{k: str(v) for k, v in zip(PARTS, values, strict=True)}, "ids": ids}
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

    def _log(self, batch: Batch, rate: float) -> None:
        counters, count = self.counters, max(self.counters.counted, 1)
        row: dict[str, float | int] = {
            "step": counters.step,
            "images": counters.step * self.config.global_batch,
            "learning_rate": self.state.optimizer.param_groups[0]["lr"],
            "ramp": alignment_ramp(batch.step, self.config.objective.alignment_ramp),
            "crops": self._crops(batch),
            "skipped": counters.skipped,
            "images_per_s": round(rate, 2),
        }
        row |= {name: value / count for name, value in zip(PARTS, counters.sums, strict=True)}
        counters.sums, counters.counted = [0.0] * len(PARTS), 0
        if self.main:
            self.log.append(row)
            self.board.scalars(TRAIN, counters.step, row)

    def _crops(self, batch: Batch) -> float | int:
        """Crops of an image in this step, on average over all processes where images differ."""
        crops = self.config.crops
        if crops.per == "batch" and crops.count_global:
            return batch.plan.crops
        return mean_crops(self.config, step=batch.step, sample_ids=self.steps.global_ids(batch.step))

    def _share_broken(self, local: dict[str, str]) -> None:
        """Bring together what all ranks found and stop when it is too much, on all at once."""
        found = dict(local)
        if self.work.ranks > 1:
            found = dict(gather_object(list(local.items())))
        local.clear()
        self.broken.add(found)

    def _validate(self) -> bool:
        """Measure the averaged weights on the main process; whether they are the best so far, on all."""
        better = False
        with self._averaged() as model:
            measured = None
            if self.held is not None and model is not None:
                measured = validation.validate(model, self.config, self.held, device=self.device)
        if measured is not None:
            values, sheet = measured
            step = self.counters.step
            self.metrics = values
            self.validation_log.append({"step": step, **values})
            picture = self.directory / "pictures" / f"step-{step:08d}.png"
            save_picture(sheet, picture)
            self.board.scalars(VALIDATION, step, values)
            self.board.picture(step, picture)
            loss, best = values["val_flow"], self.counters.best_value
            better = math.isfinite(loss) and (best is None or loss < best)
            if better:
                self.counters.best_step, self.counters.best_value = step, loss
        # all processes save together
        return any(gather_object([better])) if self.work.ranks > 1 else better

    @contextmanager
    def _averaged(self) -> Iterator[Comit | None]:
        """The network with the averaged weights, in evaluation mode. All processes must ask together.

        None on other processes than the main one. With sharded weights the main process holds a whole
        copy for as long as it is needed.
        """
        if self.sharded:
            whole = gather(self.state.ema.averages, keep=self.main)
            fixed = gather(dict(self.model.predictor.state_dict()), keep=self.main)
            yield whole_copy(self.model, {**fixed, **whole}).to(self.device).eval() if self.main else None
            return
        if not self.main:
            yield None
            return
        training = self.raw.training
        self.raw.eval()
        try:
            with self.state.ema.applied():
                yield self.model
        finally:
            self.raw.train(training)

    def _save(self) -> None:
        tensors = self.state.files(keep=self.main)
        if self.main:
            counters = self.counters
            counters.seconds += time.monotonic() - self.since
            self.since = time.monotonic()
            checkpoint.save_checkpoint(self.checkpoints, tensors, counters, self.config, self.data_digest)
            checkpoint.tidy(self.checkpoints, keep_last=self.config.keep_last, best=counters.best_step)

    def _due(self, every: int) -> bool:
        return self.counters.step % every == 0 or self.counters.step >= self.config.steps

    # -------------------------------------------------------------------- run

    def _prepare_files(self) -> None:
        self.since = time.monotonic()
        if self.main:
            checkpoint.sweep(self.checkpoints)
            self.log.start(self.counters.step)
            self.validation_log.start(self.counters.step)
            self.board.start(self.counters.step)

    def fit(self) -> Path | None:
        """Train to the last step, validate and export.

        Returns:
            The exported folder; None when a signal asked to stop (a checkpoint was saved).

        Raises:
            BenchError: Too many broken images or steps that are not finite; disk full; another run in this
                folder.
        """
        with self._alone(), Stop() as stop:
            last = checkpoint.found(self.checkpoints)[-1:]
            if last and checkpoint.step_of(last[0]) > self.counters.step:
                raise BenchError(
                    f"{self.directory}: another run has trained in this folder meanwhile, up to step "
                    f"{checkpoint.step_of(last[0])}. Start the same command again to go on from there."
                )
            self._prepare_files()
            self.raw.train()
            finished = self.counters.step >= self.config.steps
            if not finished and not self._run(stop):
                return None
            return self._finish()

    def _run(self, stop: Stop) -> bool:
        """All remaining steps; False when asked to stop."""
        from tqdm import tqdm

        self._fill_features(stop)
        config, start = self.config, self.counters.step
        workers, gpu = config.data.workers, self.device.type == "cuda"
        batches = iterate_steps(self.steps, start, workers=workers, pin=gpu)
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
                    self._share_broken(broken)
                    self._log(batch, rate)
                    clock, images = time.monotonic(), 0
                before = time.monotonic()
                better = self._due(config.validate_every) and self._validate()
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

    @staticmethod
    def _postfix(values: list[float], rate: float) -> str:
        parts = " ".join(f"{name} {value:.3f}" for name, value in zip(PARTS, values, strict=True) if value)
        return f"{parts} {rate:.1f} img/s"

    def close(self) -> None:
        """Close the event file and leave the process group, if there is one."""
        self.board.close()
        self.accelerator.end_training()

    def _finish(self) -> Path | None:
        """Export the averaged weights with the last measurements, on the main process."""
        with self._averaged() as model:
            if model is None:
                return None
            if not self.metrics:
                self._measure_again(model)
            config, counters = self.config, self.counters
            gpu = self.device.type == "cuda"
            kind = torch.cuda.get_device_name(self.device) if gpu else f"CPU with {os.cpu_count()} cores"
            facts = RunFacts(
                step=counters.step,
                skipped=counters.skipped,
                images=counters.step * config.global_batch,
                train_images=self.steps.order.count,
                val_images=0 if self.held is None else len(self.held.ids),
                seconds=counters.seconds,
                hardware=f"{self.work.ranks} x {kind}",
                command=self.command,
                metrics=self.metrics,
            )
            target = self.directory / "export" / config.name
            picture = self.directory / "pictures" / f"step-{counters.step:08d}.png"
            export(model, config, facts, target, picture=picture, logs=self.directory)
            return target

    def _measure_again(self, model: Comit) -> None:
        """Metrics of a run that was finished before (its last row may be of an earlier step)."""
        assert self.held is not None
        self.metrics, sheet = validation.validate(model, self.config, self.held, device=self.device)
        save_picture(sheet, self.directory / "pictures" / f"step-{self.counters.step:08d}.png")
