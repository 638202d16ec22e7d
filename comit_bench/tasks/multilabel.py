"""Multi-label recognition: which categories are in the image, all of them at once (paper: MSCOCO pairs).

The target of an image is a 0/1 vector over the C columns of the data set (MSCOCO: 90 ids, ten of which
no category has), the loss binary cross entropy, averaged over the columns. Metrics, in percent on the
report split:

- ``top5``: the share of images *all* of whose categories are among the five highest outputs (the paper's
  measure, for images with exactly two categories); from six columns on;
- ``top2``: the same among the two highest;
- ``mAP``: mean over the categories that occur in the report split of the average precision (the mean,
  over the images that have the category, of the precision at their rank). It is no mean over images: its
  outcomes are the influences of the images (``comit_bench.metrics.statistics.influences``).

Images of one set of categories (a pair) stand or fall together, so they are one cluster in every standard
error and test. With ``split.folds`` above 1 the sets are divided into that many parts, and the images of a
part are answered by probes that saw none of its sets in training: every set of the report split is held out
once, where a single division would rest on few of them.

Equal outputs rank by column for an image, by image for a category. ``chance`` is that of a uniformly
random order of the *categories that exist* (columns without a category are no candidates for a guesser).
For ``top5`` and ``top2`` it is the closed form ``C(n - t, k - t) / C(n, k)`` with n categories and t true
ones, averaged over the images. For ``mAP`` it is exact as well: in a random order of N images of which m
have the category, an image that has it stands at every rank with equal probability and the others that
have it are spread evenly over the rest, so that the expected average precision is
``(1/N) * sum_r (1 + (r - 1) (m - 1) / (N - 1)) / r``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import comb
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from comit_bench.errors import UsageError
from comit_bench.metrics.statistics import influences
from comit_bench.probing.fit import Examples, FitTask, Objective
from comit_bench.recipes.specs import TaskSpec
from comit_bench.results.outcomes import Outcomes
from comit_bench.seeding import seed_for
from comit_bench.tasks.base import Inputs, Role, Task, check_main_metric
from comit_bench.tasks.result import Result

TOPS = (5, 2)


def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross entropy of each row: outputs [n, C] against 0/1 targets [n, C] -> [n]."""
    return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none").mean(1)


def all_within(outputs: Tensor, targets: Tensor, *, k: int) -> Tensor:
    """1.0 where every true column is among the k highest outputs, else 0.0; [n]. Ties go by column."""
    order = outputs.argsort(dim=1, descending=True, stable=True)[:, :k]
    found = targets.bool().gather(1, order).sum(dim=1)
    return (found == targets.bool().sum(dim=1)).float()


def average_precision(outputs: Tensor, hits: Tensor) -> tuple[float, Tensor]:
    """Average precision of one column in 0..1, and the same without each of the images, float64 [n].

    Args:
        outputs: float [n].
        hits: bool [n], at least one is true. Where an image is the only hit, leaving it out changes nothing.
    """
    order = outputs.argsort(descending=True, stable=True)
    hit = hits[order].double()
    ranks = torch.arange(1, len(hit) + 1, dtype=torch.float64)
    before, total = hit.cumsum(0), hit.sum()
    terms = before / ranks * hit  # precision at every hit

    def below(values: Tensor) -> Tensor:
        """Sum over all later ranks."""
        return values.sum() - values.cumsum(0)

    ahead = (ranks - 1).clamp_min(1)  # the rank of later images moves up by one
    missed = (terms.sum() + below(hit * before * (1 / ahead - 1 / ranks))) / total
    taken = (terms.sum() - terms + below(hit * ((before - 1) / ahead - before / ranks))) / (total - 1)
    average = terms.sum() / total
    left_out = torch.empty_like(terms)
    left_out[order] = torch.where(hit > 0, taken if total > 1 else average, missed)
    return float(average), left_out


def score_outputs(outputs: Tensor, targets: Tensor) -> dict[str, NDArray[np.float64]]:
    """What every image contributes to each metric, float64 [n]; shares and precisions in 0..1.

    Args:
        outputs: float [n, C].
        targets: bool [n, C], every column with a true entry is a category.
    """
    scores = {
        f"top{k}": all_within(outputs, targets, k=k).double().numpy() for k in TOPS if k < outputs.shape[1]
    }
    columns = [c for c in range(outputs.shape[1]) if bool(targets[:, c].any())]
    found = [average_precision(outputs[:, c], targets[:, c]) for c in columns]
    value = sum(one for one, _ in found) / len(found)
    scores["mAP"] = influences(value, torch.stack([rest for _, rest in found]).mean(dim=0).numpy())
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


def majority_outcomes(train: Tensor, report: Tensor, categories: int) -> dict[str, NDArray[np.float64]]:
    """The row of a reader that answers every image with the frequencies of the training labels.

    Args:
        train: bool [N, C].
        report: bool [n, C].
        categories: How many of the columns are categories.
    """
    outputs = train.double().mean(dim=0).expand(report.shape[0], -1)
    scores = score_outputs(outputs, report)
    # All images tie in every column: the expectation over their order, not the order of their ids.
    level = chance_levels(report, categories, report.shape[1])["mAP"] / 100
    return {**scores, "mAP": np.full(len(report), level)}


def names_of_sets(targets: Tensor) -> list[str]:
    """One name for every image, equal for equal sets of categories: bool [n, C] -> [n]."""
    return ["+".join(map(str, row.nonzero()[0])) for row in targets.numpy()]


def folds_of(names: Sequence[str], count: int) -> NDArray[np.int64]:
    """The part that every image belongs to: whole sets of categories, each category in all parts alike.

    A category that is rarer in the training parts is more frequent in the part held out, and would mislead
    a probe that knows frequencies. So sets are dealt out in the order of a hash, each to the part that has
    its categories least often, and then exchanged as long as that evens out the parts.

    Args:
        names: [n], from :func:`names_of_sets`.
        count: Number of parts.

    Returns:
        int64 [n], in 0..count - 1.
    """
    sets = sorted(set(names), key=lambda name: seed_for(0, f"folds/{name}"))
    labels = sorted({label for name in sets for label in name.split("+")})
    has = np.array([[label in name.split("+") for label in labels] for name in sets], dtype=np.int64)
    most = -(-len(sets) // count)
    held, fold = np.zeros((count, len(labels)), np.int64), np.full(len(sets), -1)
    for place, row in enumerate(has):
        sizes = np.bincount(fold[:place], minlength=count)
        cost = held @ row + np.where(sizes < most, 0, len(sets) + 1)
        fold[place] = min(range(count), key=lambda part: (cost[part], sizes[part], part))
        held[fold[place]] += row
    while (pair := _better_exchange(has, fold, held)) is not None:
        fold[list(pair)] = fold[list(reversed(pair))]
        held = np.stack([has[fold == part].sum(axis=0) for part in range(count)])
    number = dict(zip(sets, fold.tolist(), strict=True))
    return np.array([number[name] for name in names], dtype=np.int64)


def _better_exchange(
    has: NDArray[np.int64], fold: NDArray[np.int64], held: NDArray[np.int64]
) -> tuple[int, int] | None:
    """Two sets of different parts whose exchange lowers the sum of squares of ``held`` the most.

    With ``d`` the difference of the two sets and ``h`` that of their parts, the sum changes by
    ``2 (|d|^2 - d . h)``.
    """
    size, told = has.sum(axis=1), has @ held.T  # |set|^2 [m], and how often a part has the set's categories
    apart = size[:, None] + size[None] - 2 * has @ has.T
    own = told[np.arange(len(fold)), fold]
    gain = own[:, None] - told[:, fold] - told[:, fold].T + own[None]  # d . h of sets i and j
    change = apart - gain
    change[fold[:, None] == fold[None]] = 0
    best = int(change.argmin())
    return divmod(best, len(fold)) if change.flat[best] < 0 else None


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
        """See :func:`majority_outcomes`."""
        report = self._report(inputs)
        train = _targets(inputs.roles["train"], every=False)
        rows = majority_outcomes(train, report, _categories(inputs))
        clusters = names_of_sets(report)
        ids = inputs.roles["report"].ids
        return self._result(inputs, report, Outcomes.same_for_all(ids, inputs.seeds, rows, clusters=clusters))

    def run(self, inputs: Inputs) -> Result:
        """Fit one probe per seed and part, and measure them on the report split.

        Raises:
            UsageError: An empty split or label, or a metric or control that does not exist.
            BenchError: A loss is not finite, or a worker was killed.
        """
        report = self._report(inputs)
        levels = chance_levels(report, _categories(inputs), report.shape[1])
        check_main_metric(inputs.spec, levels)
        stop, sets = _stop_score(inputs.spec, levels), names_of_sets(report)
        outputs = torch.empty(len(inputs.seeds), *report.shape)
        fits = []
        for task, places in self._fits(inputs, sets, int(stop.removeprefix("top"))):
            fits.append(inputs.fit(task))
            outputs[:, places] = torch.stack(fits[-1].outputs())
        scores = [score_outputs(one, report) for one in outputs]
        found = Outcomes(
            ids=inputs.roles["report"].ids,
            seeds=inputs.seeds,
            values={name: np.stack([one[name] for one in scores]) for name in levels},
            clusters=sets,
        )
        result = self._result(inputs, report, found)
        details = [fit.details(stop) for fit in fits]
        extra = {key: [one[key] for one in details] for key in details[0]} if len(fits) > 1 else details[0]
        unconverged = {seed for fit in fits for seed in fit.unconverged()}
        return replace(result, extra=extra, unconverged=tuple(sorted(unconverged)))

    def _fits(self, inputs: Inputs, sets: list[str], k: int) -> Iterator[tuple[FitTask, Tensor]]:
        """What to fit for every part, and the report images [m] that it answers."""
        probing, count = inputs.probing, inputs.spec.split.folds
        splits: dict[str, Any] = {}
        for name, role in inputs.roles.items():
            split = Examples(role.source(), _targets(role, every=True), role.row_tensor())
            splits[name] = split.in_memory() or split  # read once for all parts
        settings: dict[str, Any] = {
            **probing,
            "outputs": splits["report"].targets.shape[1],
            "objective": Objective(binary_cross_entropy, partial(all_within, k=k)),
        }
        if count == 1:
            yield FitTask(**settings, **splits), torch.arange(len(sets))
            return
        own = {name: names_of_sets(split.chosen()) for name, split in splits.items()}
        every = sorted({one for names in own.values() for one in names})
        fold = dict(zip(every, folds_of(every, count).tolist(), strict=True))
        for number in range(count):
            parts: dict[str, Any] = {}
            for name, split in splits.items():
                inside = torch.tensor([(fold[one] == number) == (name == "report") for one in own[name]])
                parts[name] = replace(split, rows=split.index()[inside])
            places = torch.tensor([place for place, one in enumerate(sets) if fold[one] == number])
            if len(places):
                yield FitTask(**settings, **parts), places

    def _result(self, inputs: Inputs, report: Tensor, found: Outcomes) -> Result:
        levels = chance_levels(report, _categories(inputs), report.shape[1])
        metrics = {name: found.metric(name, chance=level) for name, level in levels.items()}
        return Result(metrics=metrics, outcomes=found)

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
