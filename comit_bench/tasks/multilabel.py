"""Multi-label recognition: which categories are in the image, all of them at once (paper: MSCOCO pairs).

The target of an image is a 0/1 vector over the C columns of the data set (MSCOCO: 90 ids, ten of which
no category has), the loss binary cross entropy, averaged over the columns. Metrics, in percent on the
report split:

- ``top5``: the share of images *all* of whose categories are among the five highest outputs (the paper's
  measure, for images with exactly two categories); from six columns on;
- ``top2``: the same among the two highest;
- ``mAP``: mean over the categories that occur in the report split of the average precision (the mean,
  over the images that have the category, of the precision at their rank).

Equal outputs rank by column for an image, by image for a category. ``chance`` is that of a uniformly
random order of the *categories that exist* (columns without a category are no candidates for a guesser).
For ``top5`` and ``top2`` it is the closed form ``C(n - t, k - t) / C(n, k)`` with n categories and t true
ones, averaged over the images. For ``mAP`` it is exact as well: in a random order of N images of which m
have the category, an image that has it stands at every rank with equal probability and the others that
have it are spread evenly over the rest, so that the expected average precision is
``(1/N) * sum_r (1 + (r - 1) (m - 1) / (N - 1)) / r``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import comb
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from comit_bench.errors import UsageError
from comit_bench.probing.fit import FitTask, Objective, Split
from comit_bench.recipes.specs import TaskSpec
from comit_bench.results.schema import Metric
from comit_bench.tasks.base import Inputs, Role, Task, check_main_metric, fit_details
from comit_bench.tasks.result import Result, over_seeds, same_for_all

TOPS = (5, 2)


def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross entropy of each row: outputs [n, C] against 0/1 targets [n, C] -> [n]."""
    return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none").mean(1)


def all_within(outputs: Tensor, targets: Tensor, *, k: int) -> Tensor:
    """1.0 where every true column is among the k highest outputs, else 0.0; [n]. Ties go by column."""
    order = outputs.argsort(dim=1, descending=True, stable=True)[:, :k]
    found = targets.bool().gather(1, order).sum(dim=1)
    return (found == targets.bool().sum(dim=1)).float()


def average_precisions(outputs: Tensor, targets: Tensor) -> dict[int, float]:
    """Average precision of every column that occurs, in 0..1.

    Args:
        outputs: float [n, C].
        targets: bool [n, C].
    """
    found: dict[int, float] = {}
    ranks = torch.arange(1, outputs.shape[0] + 1, dtype=torch.float64)
    for column in range(outputs.shape[1]):
        if not bool(targets[:, column].any()):
            continue
        order = outputs[:, column].argsort(descending=True, stable=True)
        hits = targets[order, column].double()
        found[column] = float((hits.cumsum(0) / ranks * hits).sum() / hits.sum())
    return found


def score_outputs(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """All metrics of one fitted probe, in percent.

    Args:
        outputs: float [n, C].
        targets: bool [n, C], every column with a true entry is a category.
    """
    scores = {
        f"top{k}": 100.0 * float(all_within(outputs, targets, k=k).double().mean())
        for k in TOPS
        if k < outputs.shape[1]
    }
    precisions = average_precisions(outputs, targets)
    scores["mAP"] = 100.0 * sum(precisions.values()) / len(precisions)
    return scores


def expected_precision(images: int, positives: int) -> float:
    """Expected average precision of a random order of ``images``, ``positives`` of which count; in 0..1."""
    if images == 1:
        return 1.0
    ranks = np.arange(1, images + 1, dtype=np.float64)
    return float(np.mean((1 + (ranks - 1) * (positives - 1) / (images - 1)) / ranks))


def chance_levels(targets: Tensor, categories: int, columns: int) -> dict[str, float]:
    """Expected metrics of a random order of the categories, in percent, exact for these targets.

    Args:
        targets: bool [n, C] of the report split.
        categories: How many of the columns are categories.
        columns: C; decides which metrics exist.
    """
    true = targets.sum(dim=1).tolist()
    levels = {}
    for k in TOPS:
        if k >= columns:
            continue
        shares = [
            comb(categories - t, k - t) / comb(categories, min(k, categories)) if t <= k else 0.0
            for t in true
        ]
        levels[f"top{k}"] = 100.0 * sum(shares) / len(shares) if categories > k else 100.0
    counts = [int(count) for count in targets.sum(dim=0).tolist() if count]
    levels["mAP"] = 100.0 * sum(expected_precision(len(true), count) for count in counts) / len(counts)
    return levels


def majority_metrics(train: Tensor, report: Tensor, categories: int) -> dict[str, Metric]:
    """The row of a reader that answers every image with the frequencies of the training labels.

    Args:
        train: bool [N, C].
        report: bool [n, C].
        categories: How many of the columns are categories.
    """
    outputs = train.double().mean(dim=0).expand(report.shape[0], -1)
    levels = chance_levels(report, categories, report.shape[1])
    scores = score_outputs(outputs, report)
    # All images tie in every column: the expectation over their order, not the order of their ids.
    scores["mAP"] = levels["mAP"]
    n = report.shape[0]
    return {k: over_seeds([v], n, chance=levels[k], share=k != "mAP") for k, v in scores.items()}


def _targets(role: Role, *, every: bool) -> Tensor:
    """Bool [N, C] of all tokenized images of the role's split, or [n, C] of its own."""
    labels = np.asarray(role.split.labels, dtype=np.bool_)
    return torch.from_numpy(labels[role.kept if every else role.images])


def _stop_score(spec: TaskSpec, scores: Mapping[str, object]) -> str:
    """The metric that early stopping looks at: the main one, or top2 where that is no mean over images."""
    return spec.main_metric if spec.main_metric != "mAP" else next(name for name in scores if name != "mAP")


class Multilabel(Task):
    """Which categories are in the image."""

    def majority(self, inputs: Inputs) -> Result:
        """See :func:`majority_metrics`."""
        report = self._report(inputs)
        train = _targets(inputs.roles["train"], every=False)
        return same_for_all(inputs.seeds, majority_metrics(train, report, _categories(inputs)))

    def run(self, inputs: Inputs) -> Result:
        """Fit one probe per seed and measure it on the report split.

        Raises:
            UsageError: An empty split or label, or a metric or control that does not exist.
            BenchError: A loss is not finite, or a worker was killed.
        """
        probing = inputs.probing
        targets = self._report(inputs)
        levels = chance_levels(targets, _categories(inputs), targets.shape[1])
        check_main_metric(inputs.spec, levels)
        stop = _stop_score(inputs.spec, levels)
        splits: dict[str, Any] = {
            name: Split(role.source(), _targets(role, every=True), role.row_tensor())
            for name, role in inputs.roles.items()
        }
        task = FitTask(
            **probing,
            **splits,
            outputs=targets.shape[1],
            objective=Objective(binary_cross_entropy, partial(all_within, k=int(stop.removeprefix("top")))),
        )
        results = inputs.fit(task)
        scores = [score_outputs(r.outputs, targets) for r in results if r.outputs is not None]
        assert len(scores) == len(inputs.seeds)
        metrics = {
            k: over_seeds([one[k] for one in scores], len(targets), chance=level, share=k != "mAP")
            for k, level in levels.items()
        }
        return Result(metrics=metrics, extra=fit_details(results, stop))

    def _report(self, inputs: Inputs) -> Tensor:
        """The report set's targets."""
        inputs.check()
        targets = _targets(inputs.roles["report"], every=False)
        if not bool(targets.any()):
            raise UsageError(f"{inputs.data.name}: no image of the report split has any category")
        return targets


def _categories(inputs: Inputs) -> int:
    """Columns that are categories: those that occur in any split (MSCOCO's 90 ids have gaps)."""
    occurring = np.any([np.asarray(s.labels).any(axis=0) for s in inputs.data.splits.values()], axis=0)
    return int(occurring.sum())
