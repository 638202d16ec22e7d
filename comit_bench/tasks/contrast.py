"""Fits the relation probe: one logit per image and triplet, trained to put the true triplet first.

A step takes a batch of images with one of their triplets each (drawn anew every epoch). The candidates of
an image are its own triplet and ``negatives`` triplets of other images of the batch, never one that is
known to be true of it; the loss is the cross entropy of a softmax over the candidates.

Memory: a batch of B images means B * (1 + negatives) sequences of 1 + K + 3 tokens. They are computed in
chunks of whole images, at most ``CHUNK_TOKENS`` tokens each, whose gradients add up. The loss of an image
needs no other chunk, so chunking changes nothing but the order of a sum. The size is a constant, not read
off the machine, so that results do not depend on it. At the paper's size (K 256, width 768, 2 blocks, MLP
ratio 4, B 512, 15 negatives) all at once would take 8,192 sequences * 260 tokens * 768 * 4 bytes = 6.5 GB
for each of about 30 stored activations, some 200 GB; a chunk of 7 images is 29,120 tokens: 0.09 GB each,
2.7 GB in all.

Shape legend: ``n`` images of a role, ``B`` batch, ``G`` candidates, ``K`` message length, ``d`` code
dimension, ``T`` length of a text vector.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from comit_bench.errors import BenchError, UsageError
from comit_bench.probing.fit import Batches as _Batches
from comit_bench.probing.fit import (
    EpochLog,
    FitProgress,
    FitResult,
    ProgressCallback,
    Split,
    build_probe,
    keyed_generator,
    one_thread,
    unlimited,
)
from comit_bench.recipes.specs import ProbeSpec
from comit_bench.tasks.negatives import Lists, Truth, Words

CHUNK_TOKENS = 32768
_DATA = (
    "train",
    "early_stop",
    "report",
    "table",
    "known",
    "stop_lists",
    "report_lists",
    "objects",
    "predicates",
)
_ROLES = ("train", "early_stop", "report")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ContrastTask:
    """All that one fit needs but its seed.

    Attributes:
        spec: Network and optimiser; ``batch_size`` counts images.
        negatives: In-batch negatives per image.
        words: Sizes of the vocabularies.
        train: Messages to learn from; the targets of all three splits mean nothing.
        early_stop: Messages that decide when to stop.
        report: Messages whose logits are returned.
        table: int64 [m, 4], samples (position in ``train``, subject, predicate, object), sorted.
        known: int64 [k, 4], all that is known to be true of the training images.
        stop_lists: Candidates of the early-stop images.
        report_lists: Candidates of the report images.
        objects: float32 [words.objects, T], text vectors.
        predicates: float32 [words.predicates, T].
        permute_targets: The control: messages of ``train`` and ``early_stop`` change places with each
            other, for every seed in another way, while triplets stay.
        positions: False is the control ``bag-of-tokens``.
        bf16: Compute in bfloat16 where autocast allows; CUDA only.
    """

    spec: ProbeSpec
    negatives: int
    words: Words
    train: Split
    early_stop: Split
    report: Split
    table: NDArray[np.int64]
    known: NDArray[np.int64]
    stop_lists: Lists
    report_lists: Lists
    objects: Tensor
    predicates: Tensor
    permute_targets: bool = False
    positions: bool = True
    bf16: bool = False

    def check(self) -> None:
        """Refuse sets without a sample.

        Raises:
            UsageError: Says which one and what to do.
        """
        counts = {
            "training": len(np.unique(self.table[:, 0])) - 1,  # one image alone has no negatives
            "early-stop": len(self.stop_lists.images),
            "report": len(self.report_lists.images),
        }
        for name, count in counts.items():
            if count < 1:
                raise UsageError(
                    f"the {name} set has too few images with relations. Use more images (a larger --limit), "
                    "or change split.early_stop.fraction in the recipe."
                )

    def held(self) -> ContrastTask | None:
        """The task with all codes in memory, None when they do not fit."""
        held = {name: getattr(self, name).in_memory() for name in _ROLES}
        return None if None in held.values() else replace(self, **held)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The data as arrays, for a worker process."""
        arrays: dict[str, NDArray[Any]] = {"table": self.table, "known": self.known}
        for name in _ROLES:
            codes = getattr(self, name).messages.codes
            assert codes is not None
            arrays[f"{name}.codes"] = codes.contiguous().numpy()
        for name in ("stop_lists", "report_lists"):
            lists: Lists = getattr(self, name)
            arrays |= {f"{name}.images": lists.images, f"{name}.triplets": lists.triplets}
            arrays[f"{name}.valid"] = lists.valid.astype(np.uint8)
        arrays |= {"objects": self.objects.numpy(), "predicates": self.predicates.numpy()}
        return {name: np.ascontiguousarray(value) for name, value in arrays.items()}

    def settings(self) -> dict[str, Any]:
        """Everything but the data."""
        kinds = {"kinds": self.report_lists.kinds}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _DATA} | kinds

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], settings: dict[str, Any]) -> ContrastTask:
        """The task whose :meth:`arrays` and :meth:`settings` these are."""
        rest = {name: value for name, value in settings.items() if name != "kinds"}
        data: dict[str, Any] = {name: Split.of_codes(tensors[f"{name}.codes"]) for name in _ROLES}
        for name in ("stop_lists", "report_lists"):
            parts = [tensors[f"{name}.{part}"].numpy() for part in ("images", "triplets", "valid")]
            data[name] = Lists(parts[0], parts[1], parts[2].astype(np.bool_), settings["kinds"])
        data |= {name: tensors[name].numpy() for name in ("table", "known")}
        data |= {name: tensors[name] for name in ("objects", "predicates")}
        return cls(**data, **rest)

    def fit(
        self, seed: int, *, device: str | torch.device = "cpu", progress: ProgressCallback | None = None
    ) -> FitResult:
        """Fit one probe; ``FitResult.outputs`` are the logits [q, C] of ``report_lists``.

        Raises:
            UsageError: A set without samples.
            BenchError: The loss is not finite; names epoch and step.
        """
        self.check()
        place = torch.device(device)
        with one_thread() if place.type == "cpu" else unlimited():
            return _Fit(self, seed, place).run(progress)


def draw_samples(table: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """One triplet for every image that has any, in random order: int64 [images, 4]."""
    generator = keyed_generator("contrast-samples", seed, epoch)
    images, starts, counts = np.unique(table[:, 0], return_index=True, return_counts=True)
    share = torch.rand(len(images), generator=generator, dtype=torch.float64).numpy()
    chosen = starts + np.minimum((share * counts).astype(np.int64), counts - 1)
    order = torch.randperm(len(images), generator=generator).numpy()
    samples: NDArray[np.int64] = table[chosen[order]]
    return samples


def batch_candidates(
    batch: NDArray[np.int64], truth: Truth, negatives: int, generator: torch.Generator
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The own triplet of every image of a batch and some of the others'.

    Args:
        batch: int64 [B, 4], one row per image.
        truth: What is known of the images.
        negatives: Most negatives per image; a batch may offer fewer.
        generator: Decides which.

    Returns:
        Triplets int64 [B, G, 3], the true one first, and which of them count, bool [B, G].
    """
    count = len(batch)
    wanted = min(negatives, count - 1)
    draw = torch.rand(count, count, generator=generator)
    forbidden = truth.holds(batch[:, None, 0], np.broadcast_to(batch[None, :, 1:], (count, count, 3)))
    draw[torch.from_numpy(forbidden)] = math.inf  # the own triplet is true, so it is among them
    nearest = draw.topk(wanted, largest=False)
    chosen = np.concatenate([np.arange(count)[:, None], nearest.indices.numpy()], axis=1)
    valid = np.concatenate([np.ones((count, 1), np.bool_), np.isfinite(nearest.values.numpy())], axis=1)
    return batch[chosen, 1:], valid


class _Fit:
    """One fit in progress."""

    def __init__(self, task: ContrastTask, seed: int, device: torch.device) -> None:
        self.task, self.seed, self.device = task, seed, device
        self.bf16 = task.bf16 and device.type == "cuda"
        self.train, self.stop = _Batches(task.train, device), _Batches(task.early_stop, device)
        self.truth = Truth(task.known, task.words)
        self.texts = (task.objects.to(device), task.predicates.to(device))
        both = len(self.train) + len(self.stop)
        self.place = torch.arange(both)
        if task.permute_targets:
            self.place = torch.randperm(both, generator=keyed_generator("permute-targets", seed))
        self.probe = build_probe(
            task.spec,
            code_shape=task.train.code_shape(),
            outputs=1,
            seed=seed,
            positions=task.positions,
            extra=(3, int(task.objects.shape[1])),
        ).to(device)
        # The same for all candidates: it has no gradient but rounding, which Adam would blow up.
        self.probe.head.bias.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.probe.parameters(),
            lr=task.spec.learning_rate,
            weight_decay=task.spec.weight_decay,
            fused=True,
        )

    def _codes(self, role: str, images: Tensor) -> Tensor:
        """Codes [b, K, d] of images, given by their position in the role."""
        if role == "report":
            return self.report.batch(images)[0]
        where = self.place[images + (0 if role == "train" else len(self.train))]
        first = where < len(self.train)
        if bool(first.all()):
            return self.train.batch(where)[0]
        if not bool(first.any()):
            return self.stop.batch(where - len(self.train))[0]
        mixed = torch.empty(len(where), *self.task.train.code_shape(), device=self.device)
        mixed[first] = self.train.batch(where[first])[0]
        mixed[~first] = self.stop.batch(where[~first] - len(self.train))[0]
        return mixed

    def _vectors(self, triplets: NDArray[np.int64]) -> Tensor:
        """Text vectors of triplets: int64 [b, G, 3] -> float32 [b, G, 3, T]."""
        numbers = torch.from_numpy(np.ascontiguousarray(triplets)).to(self.device, non_blocking=True)
        s, p, o = numbers.unbind(-1)
        objects, predicates = self.texts
        return torch.stack([objects[s], predicates[p], objects[o]], dim=2)

    def _chunks(self, count: int, groups: int) -> Sequence[slice]:
        size = max(1, CHUNK_TOKENS // (groups * (self.probe.message_length + 4)))
        return [slice(start, start + size) for start in range(0, count, size)]

    def _logits(
        self, role: str, images: Tensor, triplets: NDArray[np.int64], masks: torch.Generator | None = None
    ) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            answer = self.probe.forward_groups(
                self._codes(role, images), self._vectors(triplets), generator=masks
            )
        return answer[..., 0].float()  # [b, G]

    def _epoch(self, epoch: int) -> tuple[float, float]:
        """One pass over the training images: (mean loss, mean score) while training."""
        task = self.task
        self.probe.train()
        masks = keyed_generator("probe-dropout", self.seed, epoch, device=self.device)
        pick = keyed_generator("contrast-negatives", self.seed, epoch)
        samples = draw_samples(task.table, self.seed, epoch)
        sums: list[Tensor] = []  # loss and score of every part, read once per epoch: no waiting in between
        steps: list[int] = []
        starts = range(0, len(samples), task.spec.batch_size)
        for step, start in enumerate(starts):
            batch = samples[start : start + task.spec.batch_size]
            if len(batch) < 2:  # one image alone has nothing to be told from
                continue
            triplets, valid = batch_candidates(batch, self.truth, task.negatives, pick)
            self.optimizer.zero_grad(set_to_none=True)
            for part in self._chunks(len(batch), triplets.shape[1]):
                logits = self._logits("train", torch.from_numpy(batch[part, 0]), triplets[part], masks)
                there = torch.from_numpy(valid[part]).to(self.device, non_blocking=True)
                each, right = ranked(logits, there)
                (each.sum() / len(batch)).backward()
                sums.append(torch.stack([each.detach().double().sum(), right.sum().double()]))
                steps.append(step)
            self.optimizer.step()
        loss = score = 0.0
        for step, part_sums in zip(steps, torch.stack(sums).tolist() if sums else [], strict=True):
            loss, score = loss + part_sums[0], score + part_sums[1]
            if not math.isfinite(loss):
                raise BenchError(
                    f"the probe's loss is not finite in epoch {epoch}, step {step + 1} of {len(starts)} "
                    f"(seed {self.seed}, learning rate {task.spec.learning_rate:g}). Lower "
                    "probe.learning_rate in the recipe, or look for NaN or huge values in the codes."
                )
        return loss / len(samples), score / len(samples)

    @torch.inference_mode()
    def _answers(self, role: str, lists: Lists, columns: int) -> Tensor:
        """Logits of the first ``columns`` candidates of every sample, float32 [q, columns]."""
        self.probe.eval()
        images, triplets = torch.from_numpy(lists.images), lists.triplets[:, :columns]
        parts = [self._logits(role, images[p], triplets[p]) for p in self._chunks(len(images), columns)]
        return torch.cat(parts)

    def _stop_set(self) -> tuple[float, float]:
        lists = self.task.stop_lists
        columns = lists.kinds["random"].stop
        logits = self._answers("early_stop", lists, columns)
        each, right = ranked(logits, torch.from_numpy(lists.valid[:, :columns]).to(self.device))
        return float(each.double().mean()), float(right.double().mean())

    def run(self, progress: ProgressCallback | None) -> FitResult:
        start, spec = time.perf_counter(), self.task.spec
        best, best_epoch, state = (-math.inf, -math.inf), 0, {}
        history: list[EpochLog] = []
        for epoch in range(1, spec.max_epochs + 1):
            train_loss, train_score = self._epoch(epoch)
            stop_loss, stop_score = self._stop_set()
            history.append(EpochLog(epoch, train_loss, train_score, stop_loss, stop_score))
            if (stop_score, -stop_loss) > best:
                best, best_epoch = (stop_score, -stop_loss), epoch
                state = {name: value.detach().clone() for name, value in self.probe.state_dict().items()}
            finished = epoch == spec.max_epochs or epoch - best_epoch >= spec.patience
            if progress is not None:
                progress(FitProgress(self.seed, history[-1], spec.max_epochs, finished))
            if finished:
                break
        self.probe.load_state_dict(state)
        self.report = _Batches(self.task.report, self.device)
        lists = self.task.report_lists
        outputs = self._answers("report", lists, lists.triplets.shape[1]).cpu()
        state = {name: value.cpu() for name, value in state.items()}
        return FitResult(self.seed, state, tuple(history), best_epoch, time.perf_counter() - start, outputs)


def ranked(logits: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """How well the first candidate of each row comes out.

    Args:
        logits: float [n, G]; column 0 is the true one.
        valid: bool [n, G].

    Returns:
        Cross entropy [n] over the valid candidates, and the chance that the true one is first when ties
        are broken at random, [n]: 1 alone at the top, 1/2 with one rival of equal logit, 0 below any.
    """
    masked = logits.masked_fill(~valid, -math.inf)
    loss = F.cross_entropy(
        masked, torch.zeros(len(logits), dtype=torch.int64, device=logits.device), reduction="none"
    )
    own = masked[:, :1]
    beaten = (masked > own).any(dim=1)
    ties = (masked == own).sum(dim=1)  # the true one itself included
    return loss, torch.where(beaten, 0.0, 1.0 / ties)
