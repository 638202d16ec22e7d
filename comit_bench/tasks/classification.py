"""Classification: which of C classes is in the image, read from its message by the probe.

Metrics, all in percent on the report split: ``top1``; ``top5`` from ten classes on; and, when the
recipe names parts of the class names (``red_3`` -> colour, digit), how often the part of the most
likely class is right. Ties between outputs go to the lower class number.

Two yardsticks: ``chance`` beside every metric is the expected value of a uniform guess over the
classes; :func:`majority_metrics` is the row of a reader that never looks. The control
``permute-labels`` trains on shuffled labels and must land at chance, or the report set leaks. Under it
a part that is plain to see spreads widely over the seeds: images of one colour get one arbitrary
answer, so the colours come out right or wrong in tens of percent. Compare with the standard error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comit_bench.errors import UsageError
from comit_bench.probing.fit import FitTask, Split
from comit_bench.recipes.kinds import AttributesSpec
from comit_bench.results.schema import Metric
from comit_bench.tasks.base import Inputs, Task, check_main_metric, fit_details
from comit_bench.tasks.result import Result, over_seeds, same_for_all

TOP5_FROM = 10  # with fewer classes the top five say little


def class_parts(class_names: Sequence[str], attributes: AttributesSpec | None) -> dict[str, Tensor]:
    """Number the parts of the class names.

    Args:
        class_names: C names, e.g. ``red_3``.
        attributes: Separator and the names of the parts, or None.

    Returns:
        Field name -> int64 [C], equal numbers for equal parts, numbered by first appearance.
    """
    if attributes is None:
        return {}
    split = [name.split(attributes.separator) for name in class_names]
    for name, parts in zip(class_names, split, strict=True):
        if len(parts) != len(attributes.fields):
            raise UsageError(
                f"class {name!r} has {len(parts)} parts between {attributes.separator!r}, but the recipe's "
                f"attributes.fields name {len(attributes.fields)}: {', '.join(attributes.fields)}"
            )
    table: dict[str, Tensor] = {}
    for position, field in enumerate(attributes.fields):
        numbers: dict[str, int] = {}
        column = [numbers.setdefault(parts[position], len(numbers)) for parts in split]
        table[field] = torch.tensor(column)
    return table


def _rank(outputs: Tensor, labels: Tensor) -> Tensor:
    """int64 [n]: how many classes come before the true one; equal outputs rank by class number."""
    truth = outputs.gather(1, labels[:, None])  # [n, 1]
    lower = torch.arange(outputs.shape[1]) < labels[:, None]
    return ((outputs > truth) | ((outputs == truth) & lower)).sum(dim=1)


def _percent(right: Tensor) -> float:
    return 100.0 * int(right.sum()) / right.shape[0]


def score_outputs(outputs: Tensor, labels: Tensor, parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics of one fitted probe, in percent.

    Args:
        outputs: float [n, C].
        labels: int64 [n], class numbers below C.
        parts: From :func:`class_parts`.
    """
    rank = _rank(outputs, labels)
    scores = {"top1": _percent(rank < 1)}
    if outputs.shape[1] >= TOP5_FROM:
        scores["top5"] = _percent(rank < 5)
    guess = outputs.argmax(dim=1)
    for field, numbers in parts.items():
        scores[field] = _percent(numbers[guess] == numbers[labels])
    return scores


def chance_levels(labels: Tensor, classes: int, parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Expected metrics of a uniform guess over the classes, in percent, exact for these labels.

    Args:
        labels: int64 [n] of the report split.
        classes: C.
        parts: From :func:`class_parts`.
    """
    levels = {"top1": 100.0 / classes}
    if classes >= TOP5_FROM:
        levels["top5"] = 500.0 / classes
    for field, numbers in parts.items():
        share = numbers.bincount().double() / classes  # [parts]
        levels[field] = 100.0 * float(share[numbers[labels]].mean())
    return levels


def _most_frequent(labels: Tensor, classes: int) -> Tensor:
    """Class numbers from the most to the least frequent; ties by lower number."""
    return torch.argsort(torch.bincount(labels, minlength=classes), descending=True, stable=True)


def majority_metrics(
    train_labels: Tensor,
    report_labels: Tensor,
    class_names: Sequence[str],
    attributes: AttributesSpec | None = None,
) -> dict[str, Metric]:
    """The reference row of a reader that never looks at the image.

    For each metric it answers what was most frequent in training: a class (``top1``), the five most
    frequent classes (``top5``), a part (each attribute). Ties go to the lowest number.

    Args:
        train_labels: int64 [N].
        report_labels: int64 [n].
        class_names: C names.
        attributes: As in the recipe.
    """
    classes, parts = len(class_names), class_parts(class_names, attributes)
    train, report = _checked("training", train_labels, classes), _checked("report", report_labels, classes)
    order, levels = _most_frequent(train, classes), chance_levels(report, classes, parts)
    scores = {"top1": _percent(report == order[0])}
    if classes >= TOP5_FROM:
        scores["top5"] = _percent(torch.isin(report, order[:5]))
    for field, numbers in parts.items():
        favourite = _most_frequent(numbers[train], int(numbers.max()) + 1)[0]
        scores[field] = _percent(numbers[report] == favourite)
    return {name: over_seeds([value], len(report), chance=levels[name]) for name, value in scores.items()}


def _checked(name: str, labels: Tensor, classes: int) -> Tensor:
    """Labels as int64 on the CPU."""
    if labels.numel() == 0:
        raise UsageError(f"the {name} set is empty. Use more images (a larger --limit).")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"{name} labels must lie in 0..{classes - 1}, found {low}..{high}")
    return labels.long().cpu()


def _labels(inputs: Inputs) -> dict[str, Tensor]:
    """Class numbers of every role, int64 [n]; raises as :func:`_checked`."""
    said = {"train": "training", "early_stop": "early-stop", "report": "report"}
    return {
        name: _checked(said[name], torch.from_numpy(role.split.labels[role.images]), len(inputs.data.classes))
        for name, role in inputs.roles.items()
    }


class Classification(Task):
    """Which of C classes is in the image."""

    def majority(self, inputs: Inputs) -> Result:
        """See :func:`majority_metrics`."""
        labels = _labels(inputs)
        once = majority_metrics(
            labels["train"], labels["report"], inputs.data.classes, inputs.spec.attributes
        )
        return same_for_all(inputs.seeds, once)

    def run(self, inputs: Inputs) -> Result:
        """Fit one probe per seed and measure it on the report split.

        Raises:
            UsageError: An empty split, or a name that does not fit.
            BenchError: A loss is not finite, or a worker was killed.
        """
        names, probing = inputs.data.classes, inputs.probing
        parts, labels = class_parts(names, inputs.spec.attributes), _labels(inputs)["report"]
        levels = chance_levels(labels, len(names), parts)
        check_main_metric(inputs.spec, self.score(inputs, torch.zeros(len(labels), len(names)), labels))
        splits: dict[str, Any] = {
            name: Split(
                role.source(),
                torch.from_numpy(np.ascontiguousarray(role.split.labels[role.kept])),
                role.row_tensor(),
            )
            for name, role in inputs.roles.items()
        }
        results = inputs.fit(FitTask(**probing, **splits, outputs=len(names)))
        scores = [self.score(inputs, r.outputs, labels) for r in results if r.outputs is not None]
        assert len(scores) == len(inputs.seeds)
        metrics = {
            name: over_seeds(
                [one[name] for one in scores], len(labels), chance=levels.get(name), share=name in levels
            )
            for name in scores[0]
        }
        return Result(metrics=metrics, extra=fit_details(results, "top1"))

    def score(self, inputs: Inputs, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Metrics of one fitted probe, in percent; what a kind with a metric of its own adds to.

        Args:
            inputs: Of the task.
            outputs: float [n, C] on the report images.
            labels: int64 [n].
        """
        return score_outputs(outputs, labels, class_parts(inputs.data.classes, inputs.spec.attributes))
