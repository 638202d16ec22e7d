"""Fits the probe: one seed in this process, or several seeds side by side.

The scores depend on the seed and the data, not on how the work is spread: fits on the CPU use one
thread each, whether they run in this process or in :class:`ProbePool` (two processes of one thread
finish sooner than one process of two threads). Random numbers come from generators keyed by (seed,
epoch), never from the global state. Shape legend: ``N`` messages, ``n`` selected ones, ``K`` message
length, ``d`` code dimension, ``C`` outputs of the probe.
"""

from __future__ import annotations

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from comit_bench.errors import BenchError, UsageError
from comit_bench.probing.network import Probe
from comit_bench.recipes.specs import ProbeSpec
from comit_bench.tokenizers.base import autocast

EVAL_TOKENS = 16384  # tokens per evaluation chunk; fixed, so that chunking never moves a score
IN_MEMORY_BYTES = 2 << 30  # codes up to this size are looked up once instead of once per batch
Precision = Literal["float32", "bfloat16"]
_SPLITS = ("train", "early_stop", "report")


def slices(rows: Tensor, size: int) -> list[Tensor]:
    """Consecutive pieces of ``size`` rows; the last may be shorter."""
    return [rows[start : start + size] for start in range(0, rows.shape[0], size)]


@dataclass(frozen=True, eq=False, slots=True)
class MessageSource:
    """Messages: codes in memory, or a reader of codes that stay on the disk.

    Attributes:
        codes: float [N, K, d], or None.
        read: rows int64 [n] -> float [n, K, d]; needs ``count``.
        count: N, with ``read``.
        orders: int64 [N, K], a permutation of the positions of every message, or None.
        moments: Mean and deviation [d] that codes are standardised with, or None.
    """

    codes: Tensor | None = None
    read: Callable[[Tensor], Tensor] | None = None
    count: int | None = None
    orders: Tensor | None = None
    moments: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if (self.codes is None) == (self.read is None) or (self.read is None) != (self.count is None):
            raise ValueError(
                "a MessageSource takes either codes [N, K, d], or a reader and the count of messages"
            )

    def __len__(self) -> int:
        return len(self.codes) if self.codes is not None else int(self.count or 0)

    @property
    def plain(self) -> bool:
        """Whether ``codes`` is all there is: float32, nothing to read, reorder or standardise."""
        done = self.orders is None and self.moments is None
        return self.codes is not None and self.codes.dtype == torch.float32 and done

    def take(self, rows: Tensor) -> Tensor:
        """Codes of the selected messages: int64 [n] -> float32 [n, K, d]."""
        if self.codes is not None:
            picked = self.codes[rows.to(self.codes.device)]
        else:
            assert self.read is not None
            picked = self.read(rows)
        if self.orders is not None:
            order = self.orders[rows.cpu()].to(picked.device)  # [n, K]
            picked = picked.gather(1, order[:, :, None].expand_as(picked))
        picked = picked.float()
        if self.moments is not None:
            mean, std = (moment.to(picked.device) for moment in self.moments)
            picked = (picked - mean) / std
        return picked


@dataclass(frozen=True, eq=False, slots=True)
class Examples:
    """Selected messages with what the probe should answer for each.

    Attributes:
        messages: N messages; several splits may share them.
        targets: [N] class numbers or [N, C] vectors, in the order of the messages.
        rows: int64 [n], the messages that belong to this split; None is all of them.
    """

    messages: MessageSource
    targets: Tensor
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.messages) != self.targets.shape[0]:
            raise ValueError(f"{len(self.messages)} messages but {self.targets.shape[0]} targets")

    def __len__(self) -> int:
        return len(self.messages) if self.rows is None else int(self.rows.shape[0])

    def index(self) -> Tensor:
        """int64 [n], the selected rows."""
        return torch.arange(len(self.messages)) if self.rows is None else self.rows.long().cpu()

    def chosen(self) -> Tensor:
        """Targets of the selected rows, [n] or [n, C]."""
        return self.targets[self.index().to(self.targets.device)]

    def code_shape(self) -> tuple[int, int]:
        """(K, d), read off one message."""
        one = self.messages.take(self.index()[:1])
        return int(one.shape[1]), int(one.shape[2])

    def in_memory(self, limit: int = IN_MEMORY_BYTES) -> Examples | None:
        """The same split with its codes looked up and its rows gathered; None above ``limit`` bytes."""
        if self.rows is None and self.messages.plain:
            return self
        length, dim = self.code_shape()
        if len(self) * length * dim * 4 > limit:
            return None
        codes = torch.cat([piece.cpu() for piece in self.pieces()])
        return Examples(MessageSource(codes=codes), self.chosen().cpu())

    def pieces(self) -> Iterator[Tensor]:
        """Codes of the selected messages in order, float32 [m, K, d], ``EVAL_TOKENS`` tokens at a time."""
        step = max(1, EVAL_TOKENS // self.code_shape()[0])
        return (self.messages.take(part) for part in slices(self.index(), step))


def moments(pieces: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over all rows of some pieces, in one pass.

    Args:
        pieces: float [m, ...] each.

    Returns:
        float64 [...] on the CPU, twice. What never changes gets the deviation 1.

    Raises:
        ValueError: There are no rows.
    """
    count, mean, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for piece in pieces:
        rows = piece.double().cpu()
        own, new = rows.mean(dim=0), count + len(rows)
        spread = (rows - own).square().sum(dim=0) + (own - mean).square() * (count * len(rows) / new)
        squares, mean = squares + spread, mean + (own - mean) * (len(rows) / new)
        count = new
    if not count:
        raise ValueError("there is nothing to take a mean of")
    std = (squares / count).sqrt()
    return mean, torch.where(std > 1e-7 * mean.abs(), std, 1.0)


@dataclass(frozen=True, slots=True)
class Objective:
    """What a fit minimises and what it reports. Both functions must be importable by name.

    Attributes:
        loss: (outputs [n, C], targets) -> [n], smaller is better.
        score: (outputs [n, C], targets) -> [n] in 0..1, larger is better.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each row, [n], against class numbers [n]."""
    return F.cross_entropy(outputs, targets, reduction="none")


def is_top1(outputs: Tensor, targets: Tensor) -> Tensor:
    """1.0 where the largest output is the class asked for, else 0.0."""
    return (outputs.argmax(dim=-1) == targets).float()


CLASSIFICATION = Objective(cross_entropy, is_top1)


@dataclass(frozen=True, slots=True)
class EpochLog:
    """One line of the history; scores are shares in 0..1, the training ones are running means."""

    epoch: int
    train_loss: float
    train_score: float
    stop_loss: float
    stop_score: float


@dataclass(frozen=True, slots=True)
class FitProgress:
    """What a progress callback gets: after every epoch, and once more with ``finished``."""

    seed: int
    log: EpochLog
    max_epochs: int
    finished: bool


ProgressCallback = Callable[[FitProgress], None]


@dataclass(frozen=True, eq=False, slots=True)
class FitResult:
    """One fitted probe.

    Attributes:
        seed: The probe seed.
        state: Weights of the best epoch, on the CPU.
        history: One entry per epoch, in order.
        best_epoch: Number of the best epoch, from 1.
        seconds: Wall time.
        outputs: float32 [n, C] on the report split at the best epoch; None without one.
        learning_rate: That it was fitted with.
    """

    seed: int
    state: dict[str, Tensor]
    history: tuple[EpochLog, ...]
    best_epoch: int
    seconds: float
    outputs: Tensor | None = None
    learning_rate: float = 0.0

    @property
    def best(self) -> EpochLog:
        """The best epoch."""
        return self.history[self.best_epoch - 1]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class FitTask:
    """All that one fit needs but its seed.

    Attributes:
        spec: Network and optimiser.
        outputs: C.
        train: Messages to learn from.
        early_stop: Messages that decide when to stop and which epoch is best.
        report: Messages whose outputs are returned, or None.
        objective: Loss and score.
        permute_targets: The control: targets of ``train`` and ``early_stop`` are shuffled together
            before the fit, for every seed in another way. No message may belong to both.
        positions: False is the control ``bag-of-tokens``: the probe gets no positions.
        standardise: Whether every dimension of the codes is brought to mean 0 and deviation 1 over the
            training messages, so that the size of codes decides nothing.
        stem: Whether the probe learns a convolutional network in front (``comit_bench.probing.stem``).
        precision: In which the products of the blocks are computed. Weights, sums, norms, the head and the
            loss are float32 in any case.
    """

    spec: ProbeSpec
    outputs: int = 1
    train: Examples
    early_stop: Examples
    report: Examples | None = None
    objective: Objective = CLASSIFICATION
    permute_targets: bool = False
    positions: bool = True
    standardise: bool = True
    stem: bool = False
    precision: Precision = "float32"

    def check(self) -> None:
        """Refuse empty splits."""
        for name, split in (
            ("training", self.train),
            ("early-stop", self.early_stop),
            ("report", self.report),
        ):
            if split is not None and len(split) == 0:
                raise UsageError(
                    f"the {name} set of the probe is empty. Use more images (a larger --limit), or change "
                    "split.early_stop.fraction in the recipe."
                )

    def held(self) -> Self | None:
        """The task with all codes in memory; None when they do not fit."""
        given = {name: split for name in _SPLITS if (split := getattr(self, name)) is not None}
        held = {name: split.in_memory() for name, split in given.items()}
        return None if None in held.values() else replace(self, **held)

    def prepared(self) -> Self:
        """The task with standardised codes, in memory when they fit: read once, for any number of fits."""
        self.check()
        if not self.standardise:
            return self
        task = (self.held() or self).standardised()
        return task.held() or task

    def standardised(self) -> Self:
        """The task with standardised codes; itself when they are already."""
        if not self.standardise:
            return self
        tokens = (codes.flatten(0, 1) for codes in self.train.pieces())
        mean, std = moments(tokens)
        found = mean.float(), std.float()
        given = {name: split for name in _SPLITS if (split := getattr(self, name)) is not None}
        sources = {id(split.messages): replace(split.messages, moments=found) for split in given.values()}
        splits = {name: replace(split, messages=sources[id(split.messages)]) for name, split in given.items()}
        return replace(self, **splits, standardise=False)

    def begin(self, seed: int, device: torch.device) -> Fit:
        """A fit of which no epoch has been done."""
        return _LabelFit(self, seed, device)

    def fit(
        self, seed: int, *, device: str | torch.device = "cpu", progress: ProgressCallback | None = None
    ) -> FitResult:
        """Fit one probe: AdamW at a constant learning rate, early stopping, best epoch restored.

        An epoch is better when the early-stop score is higher, or equal with a lower loss. The fit ends
        ``patience`` epochs after the best one, or at ``max_epochs``. The last partial batch counts.

        Args:
            seed: Decides initial weights and order of the messages.
            device: Where to compute. On the CPU one thread is used.
            progress: Called after every epoch.

        Raises:
            UsageError: A split is empty.
            BenchError: The loss is not finite; names epoch and step.
        """
        self.check()
        place = torch.device(device)
        with one_thread() if place.type == "cpu" else nullcontext():
            return self.standardised().begin(seed, place).run(progress)


def keyed_generator(*key: object) -> torch.Generator:
    """A generator that depends on the key alone, e.g. ``("order", seed, epoch)``."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def permuted(train: Tensor, early_stop: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Shuffle two sets of targets together; their frequencies stay, their meaning goes.

    Args:
        train: [n] or [n, C].
        early_stop: [m] or [m, C].
        seed: Key of the permutation.
    """
    together = torch.cat([train, early_stop])
    order = torch.randperm(len(together), generator=keyed_generator("permute-targets", seed))
    shuffled = together[order.to(together.device)]
    return shuffled[: len(train)], shuffled[len(train) :]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread inside the block, and restore the number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Batches:
    """A split ready for batches: codes on the device when they fit, else looked up per batch."""

    def __init__(self, split: Examples, device: torch.device) -> None:
        held = split.in_memory()
        self.split = held or split
        self.rows = self.split.index()
        self.targets = self.split.chosen().to(device)
        self.device = device
        self.codes = held.messages.codes.to(device) if held and held.messages.codes is not None else None

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [n, K, d] and targets of positions int64 [n] within the split."""
        there = chosen.to(self.device, non_blocking=True)
        if self.codes is not None:
            return self.codes[there], self.targets[there]
        return self.split.messages.take(self.rows[chosen]).to(self.device), self.targets[there]


def build_probe(
    spec: ProbeSpec,
    *,
    code_shape: tuple[int, int],
    outputs: int,
    seed: int,
    positions: bool = True,
    extra: tuple[int, int] | None = None,
    stem: bool = False,
) -> Probe:
    """The untrained probe of a recipe.

    Args:
        spec: Network settings.
        code_shape: (K, d).
        outputs: C.
        seed: Probe seed; decides the initial weights.
        positions: Whether it knows where a token stands.
        extra: Number and length of the vectors appended to the message, or None.
        stem: Whether a convolutional network stands in front.
    """
    return Probe(
        message_length=code_shape[0],
        code_dim=code_shape[1],
        outputs=outputs,
        width=spec.width,
        depth=spec.depth,
        heads=spec.heads,
        mlp_ratio=spec.mlp_ratio,
        positions=positions,
        types=2 + (extra[0] if extra else 0),
        extra_dim=extra[1] if extra else None,
        stem=stem,
        generator=keyed_generator("probe-init", seed),
    )


class Fit(ABC):
    """A fit in progress: what a kind of task computes in an epoch, and the loop around it.

    Args:
        task: Settings.
        probe: Untrained.
        seed: For messages and results.
        device: Where to compute.
    """

    def __init__(self, task: FitTask, probe: Probe, seed: int, device: torch.device) -> None:
        self.spec, self.probe, self.seed, self.device = task.spec, probe.to(device), seed, device
        self.dtype = getattr(torch, task.precision)
        self.optimizer = torch.optim.AdamW(
            self.probe.parameters(),
            lr=self.spec.learning_rate,
            weight_decay=self.spec.weight_decay,
            fused=True,
        )

    def rounding(self) -> AbstractContextManager[None]:
        """Where the probe answers: in the task's precision."""
        return autocast(self.device, self.dtype)

    @abstractmethod
    def epoch(self, number: int) -> tuple[Tensor, Tensor, int]:
        """One pass over the training set: sums of losses and of scores by step, and of how many messages."""

    @abstractmethod
    def stop_set(self) -> tuple[Tensor, Tensor]:
        """Loss and score of every early-stop message."""

    @abstractmethod
    def answers(self) -> Tensor | None:
        """Outputs on the report split."""

    def _check(self, losses: Tensor, epoch: int, where: str) -> None:
        """Stop at the first loss that is not a number."""
        broken = (~torch.isfinite(losses)).nonzero()
        if len(broken):
            raise BenchError(
                f"the probe's loss is not finite in epoch {epoch}, {where} {int(broken[0]) + 1} of "
                f"{len(losses)} (seed {self.seed}, learning rate {self.spec.learning_rate:g}). Lower "
                "probe.learning_rate in the recipe, or look for NaN or huge values in the codes."
            )

    def run(self, progress: ProgressCallback | None = None) -> FitResult:
        """Train until the early-stop score no longer rises, and answer with the best epoch's weights."""
        start, spec = time.perf_counter(), self.spec
        best, best_epoch, state = (-math.inf, -math.inf), 0, {}
        history: list[EpochLog] = []
        for number in range(1, spec.max_epochs + 1):
            self.probe.train()
            losses, scores, count = self.epoch(number)
            self._check(losses, number, "step")
            train = float(losses.double().sum()) / count, float(scores.double().sum()) / count
            self.probe.eval()
            losses, scores = self.stop_set()
            self._check(losses, number, "early-stop message")
            stop_loss, stop_score = float(losses.double().mean()), float(scores.double().mean())
            history.append(EpochLog(number, *train, stop_loss, stop_score))
            if (stop_score, -stop_loss) > best:
                best, best_epoch = (stop_score, -stop_loss), number
                state = {name: value.detach().clone() for name, value in self.probe.state_dict().items()}
            finished = number == spec.max_epochs or number - best_epoch >= spec.patience
            if progress is not None:
                progress(FitProgress(self.seed, history[-1], spec.max_epochs, finished))
            if finished:
                break
        self.probe.load_state_dict(state)
        outputs = self.answers()
        return FitResult(
            self.seed,
            {name: value.cpu() for name, value in state.items()},
            tuple(history),
            best_epoch,
            time.perf_counter() - start,
            None if outputs is None else outputs.cpu(),
            spec.learning_rate,
        )


class _LabelFit(Fit):
    """Messages with a target each."""

    def __init__(self, task: FitTask, seed: int, device: torch.device) -> None:
        self.task = task
        self.train, self.stop = Batches(task.train, device), Batches(task.early_stop, device)
        if task.permute_targets:
            shuffled = permuted(self.train.targets, self.stop.targets, seed)
            self.train.targets, self.stop.targets = shuffled
        shape = task.train.code_shape()
        probe = build_probe(
            task.spec,
            code_shape=shape,
            outputs=task.outputs,
            seed=seed,
            positions=task.positions,
            stem=task.stem,
        )
        super().__init__(task, probe, seed, device)

    def epoch(self, number: int) -> tuple[Tensor, Tensor, int]:
        order = torch.randperm(len(self.train), generator=keyed_generator("probe-order", self.seed, number))
        batches = slices(order, self.spec.batch_size)
        losses = torch.zeros(len(batches), device=self.device)  # read once per epoch: no waiting for it
        scores = torch.zeros(len(batches), device=self.device)
        for step, chosen in enumerate(batches):
            codes, targets = self.train.batch(chosen)
            with self.rounding():
                outputs = self.probe(codes)
            each = self.task.objective.loss(outputs, targets)
            self.optimizer.zero_grad(set_to_none=True)
            each.mean().backward()
            self.optimizer.step()
            losses[step] = each.detach().sum()
            scores[step] = self.task.objective.score(outputs.detach(), targets).sum()
        return losses, scores, len(self.train)

    @torch.inference_mode()
    def _outputs(self, data: Batches) -> Tensor:
        """float32 [n, C] for the whole split, in chunks of a fixed number of tokens."""
        step = max(1, EVAL_TOKENS // (self.probe.message_length + 1))
        parts = slices(torch.arange(len(data)), step)
        with self.rounding():
            return torch.cat([self.probe(data.batch(part)[0]) for part in parts])

    def stop_set(self) -> tuple[Tensor, Tensor]:
        outputs, objective = self._outputs(self.stop), self.task.objective
        return objective.loss(outputs, self.stop.targets), objective.score(outputs, self.stop.targets)

    def answers(self) -> Tensor | None:
        report = self.task.report
        return None if report is None else self._outputs(Batches(report, self.device))
