"""Retrieval: are the nearest neighbours of a message of the same class? Paper, Figure 9.

The codes of a message are put end to end; neighbours are those with the least cosine distance among
all other images of the report split. Nothing is fitted.

* ``recall@k``: share of the images that have one of their class among the k nearest.
* ``<part>@k`` for the smallest k: the same for a part of the class name (``red_3`` -> colour, digit).
* In the details, for every k: ``precision@k``, the share of the k nearest that are of the class.

Chance is exact for the split's class sizes: what a random order of the other images gives.

**Ties.** Similarities are computed in float64 and rounded to 1e-9, far above the noise of the sums and
far below any difference that means something. Among equal ones the lower position goes first, so
neighbours depend neither on the chunks nor on the order in which a processor adds.

Shape legend: ``n`` images of the report split, ``k`` neighbours, ``K`` message length, ``d`` code dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comit_bench.errors import UsageError
from comit_bench.probing.fit import Split
from comit_bench.results.schema import Metric
from comit_bench.tasks.base import Inputs, Task, check_main_metric
from comit_bench.tasks.classification import class_parts
from comit_bench.tasks.result import Result, over_images

CHUNK = 512  # messages on each side of a block of similarities; no number depends on it
GRID = 10**9  # similarities are whole multiples of 1 / GRID


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


def _percent(values: NDArray[np.bool_] | NDArray[np.float64], chance: float) -> Metric:
    return over_images(100.0 * values.astype(np.float64)[None], unit="%", chance=100.0 * chance)


def score(
    found: Neighbours,
    labels: NDArray[np.int64],
    depths: Sequence[int],
    parts: dict[str, NDArray[np.int64]] | None = None,
) -> Result:
    """Metrics of neighbours.

    Args:
        found: At least ``max(depths)`` neighbours.
        labels: int64 [n], class numbers.
        depths: The k of recall@k.
        parts: Name -> int64 [n], numbers of a part of the class name.
    """
    depths = sorted(set(depths))
    metrics: dict[str, Metric] = {}
    per_image: dict[str, Any] = {}
    details: dict[str, Any] = {"precision": {}, "parts": {}}
    same = labels[found.index] == labels[:, None]  # [n, k]
    for k in depths:
        hit, share = same[:, :k].any(axis=1), same[:, :k].mean(axis=1)
        metrics[f"recall@{k}"] = _percent(hit, chance_of_hit(labels, k))
        details["precision"][f"precision@{k}"] = {
            "value": 100.0 * float(share.mean()),
            "chance": 100.0 * chance_of_share(labels),
        }
        per_image |= {f"recall@{k}": hit, f"precision@{k}": share}
    for name, numbers in (parts or {}).items():
        alike = numbers[found.index] == numbers[:, None]
        results = {k: _percent(alike[:, :k].any(axis=1), chance_of_hit(numbers, k)) for k in depths}
        metrics[f"{name}@{depths[0]}"] = results[depths[0]]
        per_image[f"{name}@{depths[0]}"] = alike[:, : depths[0]].any(axis=1)
        details["parts"][name] = {
            f"recall@{k}": {"value": one.value, "chance": one.chance} for k, one in results.items()
        }
    per_image["distance"] = found.distance[:, 0]
    return Result(metrics=metrics, details=details, per_image=per_image)


class Retrieval(Task):
    """Nearest neighbours by message."""

    def run(self, inputs: Inputs) -> Result | None:
        """See the module; the first process does it alone."""
        role, depths = inputs.roles["report"], inputs.spec.retrieval.k
        labels = np.asarray(role.split.labels[role.images], dtype=np.int64)
        table = class_parts(inputs.data.classes, inputs.spec.attributes)
        parts = {name: numbers.numpy()[labels] for name, numbers in table.items()}
        named = dict.fromkeys([f"recall@{k}" for k in depths] + [f"{name}@{min(depths)}" for name in parts])
        check_main_metric(inputs.spec, named)
        if not inputs.ranks.first:
            return None
        messages = Split(role.source(), torch.arange(len(role.kept)), role.row_tensor())
        held = messages.in_memory() or messages
        rows = held.index()
        found = nearest(
            lambda positions: held.messages.take(rows[positions]),
            len(role),
            max(depths),
            device=inputs.device,
            progress=inputs.start("neighbours of", len(role), "images"),
        )
        result = score(found, labels, depths, parts)
        ids = role.ids
        assert result.per_image is not None
        result.per_image.update(id=ids, nearest=[ids[first] for first in found.index[:, 0]])
        return result
