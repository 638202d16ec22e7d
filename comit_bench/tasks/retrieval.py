"""Retrieval: are the nearest neighbours of a message of the same class? Paper, Figure 9.

The codes of a message are put end to end; neighbours are those with the least cosine distance among
all other images of the report split. Nothing is fitted. Metrics are in percent:

* ``recall@k``: share of the images that have one of their class among the k nearest.
* ``<part>@k`` for the smallest k: the same for a part of the class name (``red_3`` -> colour, digit).
* ``recall@k_std``, ``<part>@k_std``: the same after every dimension of every position is brought to mean 0
  and deviation 1 over all messages of the split. Cosine depends on where the origin lies and on which
  dimensions are wide; where the two differ much, the geometry of the codes decides and not their content.
* In the details, for every k: ``precision@k``, the share of the k nearest that are of the class.

Chance is exact for the split's class sizes: what a random order of the other images gives.

**Ties.** Similarities are computed in float64 and rounded to 1e-9, far above the noise of the sums and
far below any difference that means something. Among equal ones the lower position goes first, so
neighbours depend neither on the chunks nor on the order in which a processor adds.

Shape legend: ``n`` images of the report split, ``k`` neighbours, ``K`` message length, ``d`` code dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comit_bench.errors import UsageError
from comit_bench.probing.fit import Examples, moments
from comit_bench.results.outcomes import Outcomes
from comit_bench.tasks.base import Inputs, Task, check_main_metric
from comit_bench.tasks.classification import class_parts
from comit_bench.tasks.result import Result

CHUNK = 512  # messages on each side of a block of similarities; no number depends on it
GRID = 10**9  # similarities are whole multiples of 1 / GRID
STANDARDISED = "_std"  # ends the names of metrics on standardised codes


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """The nearest other messages of every message, nearest first.

    Attributes:
        index: int64 [n, k], positions.
        distance: float64 [n, k], cosine distances in 0..2; a message of zeros is at 1 from all.
    """

    index: NDArray[np.int64]
    distance: NDArray[np.float64]


def _unit(codes: Tensor) -> Tensor:
    """Codes [n, K, d] -> float64 [n, K d] of length 1, or 0 where all codes are 0."""
    flat = codes.flatten(1).double()
    unit: Tensor = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return unit


def nearest(
    read: Callable[[Tensor], Tensor],
    count: int,
    k: int,
    *,
    chunk: int = CHUNK,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> Neighbours:
    """Find the k nearest others of every message; a block of ``chunk`` x ``chunk`` at a time is in memory.

    Args:
        read: Positions int64 [m] -> codes float [m, K, d].
        count: n.
        k: Neighbours wanted, below n.
        chunk: Messages per side of a block.
        device: Where to compute.
        progress: Called with the number of messages that are done.
    """
    if not 1 <= k < count:
        raise UsageError(
            f"{k} neighbours were asked for, but an image has {max(count - 1, 0)} others. Use more images (a "
            "larger --limit), or a smaller k in the recipe."
        )
    pieces = [torch.arange(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    found = []
    for mine in pieces:
        queries = _unit(read(mine).to(device))
        best: Tensor | None = None
        for others in pieces:
            near = _block(queries, mine, _unit(read(others).to(device)), others, count)
            merged = near if best is None else torch.cat([best, near], dim=1)
            best = merged.topk(min(k, merged.shape[1]), dim=1).values
        assert best is not None
        found.append(best.cpu())
        progress(len(mine))
    keys = torch.cat(found)  # [n, k], largest first
    level = torch.div(keys, count, rounding_mode="floor")
    index = count - 1 - (keys - level * count)
    return Neighbours(index.numpy(), 1.0 - level.double().numpy() / GRID)


def _block(queries: Tensor, mine: Tensor, others: Tensor, theirs: Tensor, count: int) -> Tensor:
    """int64 [m, o] that order by similarity, then by lower position; the smallest number for oneself."""
    level = (queries @ others.T * GRID).round().long()
    keys = level * count + (count - 1 - theirs.to(level.device))
    self_ = mine[:, None] == theirs[None]
    return keys.masked_fill(self_.to(keys.device), torch.iinfo(torch.int64).min)


def chance_of_hit(labels: NDArray[np.int64], k: int) -> float:
    """Expected share of samples with one of their label among k others in random order.

    With ``s`` others of the label among ``n - 1``, none is there with probability
    ``C(n - 1 - s, k) / C(n - 1, k)``.
    """
    _, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    same, others = (sizes - 1).astype(np.float64), len(labels) - 1
    missed = np.ones(len(sizes))
    for step in range(k):
        missed *= np.maximum(others - same - step, 0) / (others - step)
    return float((1 - missed)[inverse].mean())


def chance_of_share(labels: NDArray[np.int64]) -> float:
    """Expected share of others with the same label, for any number of them in random order."""
    _, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return float(((sizes - 1) / max(len(labels) - 1, 1))[inverse].mean())


def score(
    found: Mapping[str, Neighbours],
    labels: NDArray[np.int64],
    depths: Sequence[int],
    *,
    ids: Sequence[str],
    seeds: Sequence[int],
    parts: Mapping[str, NDArray[np.int64]],
) -> Result:
    """Metrics of neighbours; nothing is random about them, so every seed has the same.

    Args:
        found: End of the metrics' names -> at least ``max(depths)`` neighbours.
        labels: int64 [n], class numbers.
        depths: The k of recall@k.
        ids: [n].
        seeds: Of the record.
        parts: Name -> int64 [n], numbers of a part of the class name.
    """
    depths = sorted(set(depths))
    values: dict[str, NDArray[Any]] = {}
    levels: dict[str, float] = {}
    details: dict[str, Any] = {"precision": {}, "parts": {}}
    columns: dict[str, Any] = {}
    for end, near in found.items():
        for name, numbers in {"recall": labels, **parts}.items():
            same = numbers[near.index] == numbers[:, None]  # [n, k]
            hits = {k: same[:, :k].any(axis=1) for k in depths}
            chances = {k: 100 * chance_of_hit(numbers, k) for k in depths}
            for k in depths if name == "recall" else depths[:1]:
                values[f"{name}@{k}{end}"] = hits[k]
                levels[f"{name}@{k}{end}"] = chances[k]
            if name == "recall":
                details["precision"] |= {
                    f"precision@{k}{end}": {
                        "value": 100 * float(same[:, :k].mean()),
                        "chance": 100 * chance_of_share(labels),
                    }
                    for k in depths
                }
            else:
                details["parts"].setdefault(name, {}).update(
                    {
                        f"recall@{k}{end}": {"value": 100 * float(hits[k].mean()), "chance": chances[k]}
                        for k in depths
                    }
                )
        columns[f"nearest{end}"] = [ids[first] for first in near.index[:, 0]]
        columns[f"distance{end}"] = near.distance[:, 0]
    outcomes = Outcomes.same_for_all(ids, seeds, values, columns=columns)
    metrics = {name: outcomes.metric(name, chance=level) for name, level in levels.items()}
    return Result(metrics=metrics, details=details, outcomes=outcomes)


def _parts(inputs: Inputs, labels: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Numbers [n] of the recipe's attributes: those that the data set knows, or parts of the class names."""
    role, asked = inputs.roles["report"], inputs.spec.attributes
    known = role.split.attributes
    if asked is not None and all(name in known for name in asked.fields):
        texts = {name: known[name][role.images] for name in asked.fields}
        return {name: np.unique(column, return_inverse=True)[1] for name, column in texts.items()}
    table = class_parts(inputs.data.classes, asked)
    return {name: numbers.numpy()[labels] for name, numbers in table.items()}


class Retrieval(Task):
    """Nearest neighbours by message."""

    def run(self, inputs: Inputs) -> Result | None:
        """See the module; the first process does it alone."""
        role, depths = inputs.roles["report"], inputs.spec.retrieval.k
        labels = np.asarray(role.split.labels[role.images], dtype=np.int64)
        parts = _parts(inputs, labels)
        named = [f"recall@{k}" for k in depths] + [f"{name}@{min(depths)}" for name in parts]
        ends = ("", STANDARDISED)
        check_main_metric(inputs.spec, dict.fromkeys(name + end for end in ends for name in named))
        if not inputs.ranks.first:
            return None
        messages = Examples(role.source(), torch.arange(len(role.kept)), role.row_tensor())
        held = messages.in_memory() or messages
        rows = held.index()

        def read(positions: Tensor) -> Tensor:
            return held.messages.take(rows[positions])

        def search(codes: Callable[[Tensor], Tensor]) -> Neighbours:
            advance = inputs.start("neighbours of", len(role), "images")
            return nearest(codes, len(role), max(depths), device=inputs.device, progress=advance)

        found = {"": search(read)}
        mean, deviation = moments(held.pieces())
        found[STANDARDISED] = search(lambda positions: (read(positions).double() - mean) / deviation)
        return score(found, labels, depths, ids=role.ids, seeds=inputs.seeds, parts=parts)
