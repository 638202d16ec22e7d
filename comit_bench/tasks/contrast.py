"""Fits the relation probe: one logit per image and triplet, trained to put the true triplet first.

A step takes a batch of images with one of their triplets each (drawn anew every epoch). The candidates of
an image are its own triplet, triplets of other images of the batch, and the hard negatives that are reported:
its own triplet with other predicates, drawn by how common they are, and with subject and object exchanged.
None is known to be true of it. The loss is the cross entropy of a softmax over the candidates.

Memory: a batch of B images means B * candidates sequences of 1 + K + 3 tokens. They are computed in
chunks of whole images, at most ``CHUNK_TOKENS`` tokens each, whose gradients add up. The loss of an image
needs no other chunk, so chunking changes nothing but the order of a sum. The size is a constant, not read
off the machine, so that results do not depend on it. At the paper's size (K 256, width 768, 2 blocks, MLP
ratio 4, B 512, 20 candidates) all at once would take 10,240 sequences * 260 tokens * 768 * 4 bytes = 8.2 GB
for each of about 30 stored activations, some 250 GB; a chunk of 6 images is 31,200 tokens: 0.1 GB each, 3 GB
in all.

Shape legend: ``n`` images of a role, ``B`` batch, ``G`` candidates, ``K`` message length, ``d`` code
dimension, ``T`` length of a text vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from comit_bench.errors import UsageError
from comit_bench.probing.fit import Batches, Examples, Fit, FitTask, build_probe, keyed_generator
from comit_bench.recipes.kinds import NegativesSpec
from comit_bench.tasks.negatives import Lists, Truth, Words

CHUNK_TOKENS = 32768


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ContrastTask(FitTask):
    """All that one fit needs but its seed.

    The targets of the splits and ``objective`` mean nothing; ``spec.batch_size`` counts images.

    Attributes:
        negatives: How many negatives of which kind an image has in training.
        words: Vocabularies.
        table: int64 [m, 4], samples (position in ``train``, subject, predicate, object), sorted.
        known: int64 [k, 4], all that is known to be true of the training images.
        stop_lists: Candidates of the early-stop images, those of the main metric only.
        report_lists: Candidates of the report images.
        objects: float32 [words.objects, T], text vectors.
        predicates: float32 [words.predicates, T].
        permute_targets: The control: messages of ``train`` and ``early_stop`` change places with each
            other, for every seed in another way, while triplets stay.
    """

    negatives: NegativesSpec
    words: Words
    report: Examples
    table: NDArray[np.int64]
    known: NDArray[np.int64]
    stop_lists: Lists
    report_lists: Lists
    objects: Tensor
    predicates: Tensor

    def check(self) -> None:
        """Refuse sets without a sample."""
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

    def begin(self, seed: int, device: torch.device) -> Fit:
        """A fit whose outputs are the logits [q, C] of ``report_lists``."""
        return _Fit(self, seed, device)


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


def hard_candidates(
    batch: NDArray[np.int64],
    truth: Truth,
    spec: NegativesSpec,
    common: NDArray[np.int64],
    generator: torch.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Triplets with the words of the own one that are not true of the image.

    Args:
        batch: int64 [B, 4], one row per image.
        truth: What is known of the images.
        spec: How many of what; an image may have fewer.
        common: int64 [words.predicates], how often predicates occur; they are drawn accordingly.
        generator: Decides which.

    Returns:
        Triplets int64 [B, H, 3] and which of them count, bool [B, H].
    """
    images, own = batch[:, :1], batch[:, None, 1:]
    others = np.repeat(own, len(common), axis=1)  # [B, P, 3]
    others[..., 1] = np.arange(len(common))
    # The smallest of waiting times at these rates: weighted, without repetition.
    draw = torch.empty(others.shape[:2]).exponential_(generator=generator) / torch.from_numpy(common)
    draw[torch.from_numpy(truth.holds(images, others))] = math.inf
    nearest = draw.topk(min(spec.predicate, len(common)), largest=False)
    chosen = np.take_along_axis(others, nearest.indices.numpy()[..., None], axis=1)
    valid = np.isfinite(nearest.values.numpy())
    if not spec.swapped:
        return chosen, valid
    turned = own[..., ::-1]
    there = ~truth.holds(images, turned)
    return np.concatenate([chosen, turned], axis=1), np.concatenate([valid, there], axis=1)


class _Fit(Fit):
    """One fit in progress."""

    def __init__(self, task: ContrastTask, seed: int, device: torch.device) -> None:
        self.task = task
        self.train, self.stop = Batches(task.train, device), Batches(task.early_stop, device)
        self.truth = Truth(task.known, task.words)
        self.common = np.bincount(task.table[:, 2], minlength=task.words.predicates)
        self.texts = (task.objects.to(device), task.predicates.to(device))
        both = len(self.train) + len(self.stop)
        self.place = torch.arange(both)
        if task.permute_targets:
            self.place = torch.randperm(both, generator=keyed_generator("permute-targets", seed))
        probe = build_probe(
            task.spec,
            code_shape=task.train.code_shape(),
            outputs=1,
            seed=seed,
            positions=task.positions,
            extra=(3, int(task.objects.shape[1])),
            stem=task.stem,
        )
        # The same for all candidates: it has no gradient but rounding, which Adam would blow up.
        probe.head.bias.requires_grad_(False)
        super().__init__(task, probe, seed, device)

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

    def _logits(self, role: str, images: Tensor, triplets: NDArray[np.int64]) -> Tensor:
        codes, vectors = self._codes(role, images), self._vectors(triplets)
        with self.rounding():
            answer: Tensor = self.probe.forward_groups(codes, vectors)
        return answer[..., 0]  # [b, G]

    def epoch(self, number: int) -> tuple[Tensor, Tensor, int]:
        task = self.task
        pick = keyed_generator("contrast-negatives", self.seed, number)
        samples = draw_samples(task.table, self.seed, number)
        starts = range(0, len(samples), self.spec.batch_size)
        losses = torch.zeros(len(starts), dtype=torch.float64, device=self.device)
        scores = torch.zeros(len(starts), dtype=torch.float64, device=self.device)
        for step, start in enumerate(starts):
            batch = samples[start : start + self.spec.batch_size]
            if len(batch) < 2:  # one image alone has nothing to be told from
                continue
            parts = (
                batch_candidates(batch, self.truth, task.negatives.train, pick),
                hard_candidates(batch, self.truth, task.negatives, self.common, pick),
            )
            triplets, valid = (np.concatenate(both, axis=1) for both in zip(*parts, strict=True))
            self.optimizer.zero_grad(set_to_none=True)
            for part in self._chunks(len(batch), triplets.shape[1]):
                logits = self._logits("train", torch.from_numpy(batch[part, 0]), triplets[part])
                there = torch.from_numpy(valid[part]).to(self.device, non_blocking=True)
                each, right = ranked(logits, there)
                (each.sum() / len(batch)).backward()
                losses[step] += each.detach().double().sum()
                scores[step] += right.sum().double()
            self.optimizer.step()
        return losses, scores, len(samples)

    @torch.inference_mode()
    def _answers(self, role: str, lists: Lists) -> Tensor:
        """Logits of all candidates of every sample, float32 [q, C]."""
        images, triplets = torch.from_numpy(lists.images), lists.triplets
        chunks = self._chunks(len(images), triplets.shape[1])
        return torch.cat([self._logits(role, images[part], triplets[part]) for part in chunks])

    def stop_set(self) -> tuple[Tensor, Tensor]:
        lists = self.task.stop_lists
        return ranked(self._answers("early_stop", lists), torch.from_numpy(lists.valid).to(self.device))

    def answers(self) -> Tensor:
        self.report = Batches(self.task.report, self.device)
        return self._answers("report", self.task.report_lists)


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
