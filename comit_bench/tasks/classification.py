"""Classification: which of C classes is in the image, read from its message by the probe.

Metrics, all in percent on the report split: ``top1``; ``top5`` from ten classes on; and, when the
recipe names parts of the class names (``red_3`` -> colour, digit), how often the part of the most
likely class is right. Ties between outputs go to the lower class number.

Two yardsticks: ``chance`` beside every metric is the expected value of a uniform guess over the
classes; :func:`majority_outcomes` is the row of a reader that never looks. The control
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
from comit_bench.probing.fit import Examples, FitTask
from comit_bench.recipes.kinds import AttributesSpec
from comit_bench.results.outcomes import Outcomes
from comit_bench.tasks.base import Inputs, Task, check_main_metric
from comit_bench.tasks.result import Result

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


def score_outputs(outputs: Tensor, labels: Tensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What every image contributes to each metric, bool [n].

    Args:
        outputs: float [n, C].
        labels: int64 [n], class numbers below C.
        parts: From :func:`class_parts`.
    """
    rank = _rank(outputs, labels)
    scores = {"top1": rank < 1}
    if outputs.shape[1] >= TOP5_FROM:
        scores["top5"] = rank < 5
    guess = outputs.argmax(dim=1)
    for field, numbers in parts.items():
        scores[field] = numbers[guess] == numbers[labels]
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


def majority_outcomes(
    train_labels: Tensor, report_labels: Tensor, classes: int, parts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The reference row of a reader that never looks at the image: bool [n] by metric.

    For each metric it answers what was most frequent in training: a class (``top1``), the five most
    frequent classes (``top5``), a part (each attribute). Ties go to the lowest number.

    Args:
        train_labels: int64 [N].
        report_labels: int64 [n].
        classes: C.
        parts: From :func:`class_parts`.
    """
    order = _most_frequent(train_labels, classes)
    scores = {"top1": report_labels == order[0]}
    if classes >= TOP5_FROM:
        scores["top5"] = torch.isin(report_labels, order[:5])
    for field, numbers in parts.items():
        favourite = _most_frequent(numbers[train_labels], int(numbers.max()) + 1)[0]
        scores[field] = numbers[report_labels] == favourite
    return scores


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
        """See :func:`majority_outcomes`."""
        labels, names = _labels(inputs), inputs.data.classes
        parts = class_parts(names, inputs.spec.attributes)
        rows = majority_outcomes(labels["train"], labels["report"], len(names), parts)
        ids, seeds = inputs.roles["report"].ids, inputs.seeds
        found = Outcomes.same_for_all(ids, seeds, {name: row.numpy() for name, row in rows.items()})
        levels = chance_levels(labels["report"], len(names), parts)
        metrics = {name: found.metric(name, chance=levels[name]) for name in rows}
        return Result(metrics=metrics, outcomes=found)

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
            name: Examples(
                role.source(),
                torch.from_numpy(np.ascontiguousarray(role.split.labels[role.kept])),
                role.row_tensor(),
            )
            for name, role in inputs.roles.items()
        }
        fitted = inputs.fit(FitTask(**probing, **splits, outputs=len(names)))
        scores = [self.score(inputs, outputs, labels) for outputs in fitted.outputs()]
        said = [[names[guess] for guess in outputs.argmax(dim=1).tolist()] for outputs in fitted.outputs()]
        found = Outcomes(
            ids=inputs.roles["report"].ids,
            seeds=inputs.seeds,
            values={name: torch.stack([one[name] for one in scores]).double().numpy() for name in scores[0]},
            columns={"answer": said, "truth": [names[label] for label in labels.tolist()]},
        )
        metrics = {name: found.metric(name, chance=levels.get(name)) for name in found.values}
        return Result(
            metrics=metrics,
            extra=fitted.details("top1"),
            outcomes=found,
            unconverged=fitted.unconverged(),
        )

    def score(self, inputs: Inputs, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What every image contributes to each metric; a kind with a metric of its own adds to it.

        Args:
            inputs: Of the task.
            outputs: float [n, C] on the report images.
            labels: int64 [n].

        Returns:
            Metric -> bool or float [n], shares in 0..1.
        """
        return score_outputs(outputs, labels, class_parts(inputs.data.classes, inputs.spec.attributes))
