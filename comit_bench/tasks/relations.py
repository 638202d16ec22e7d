"""Relations: does the message say which object stands in which relation to which (paper: Visual Genome)?

The probe reads a message with the text vectors of one triplet appended (subject, predicate, object, each
through a projection of its own, five token types in all) and answers with one logit. Metrics, in percent
on a fixed stored list of candidates per sample:

- ``top1``: the true triplet ranks first against triplets of other images;
- ``predicate``: first against the same objects with other predicates;
- ``swapped``: before the same triplet with subject and object exchanged.

``top1`` can be had by reading objects alone; the last two cannot. Ties count as the chance of a random
order. ``chance`` is one over the number of candidates, averaged over the samples.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comit_bench.errors import UsageError
from comit_bench.probing.fit import Split
from comit_bench.recipes.specs import TaskSpec
from comit_bench.tasks.base import Inputs, Role, Task, check_main_metric, fit_details
from comit_bench.tasks.contrast import ContrastTask, ranked
from comit_bench.tasks.negatives import Lists, Words, role_table, stored_lists
from comit_bench.tasks.result import Result, over_seeds
from comit_bench.tasks.text import find_text_encoder

NAMES = {"random": "top1", "predicate": "predicate", "swapped": "swapped"}


def vocabulary(inputs: Inputs) -> Words:
    """Sizes of the data set's vocabularies."""
    return Words(len(inputs.data.classes), len(inputs.data.predicates))


def lists_of(inputs: Inputs, name: str) -> tuple[Lists, str]:
    """The stored candidates of a role, and their digest; see ``comit_bench.tasks.negatives``."""
    role = inputs.roles[name]
    return stored_lists(
        role,
        vocabulary(inputs),
        inputs.spec.negatives,
        cache=inputs.cache,
        fingerprint=inputs.data.fingerprints[role.split.name],
    )


def chosen_columns(lists: Lists, kind: str) -> list[int]:
    """Columns of one metric: the true triplet and the negatives of a kind."""
    return [0, *range(lists.kinds[kind].start, lists.kinds[kind].stop)]


def standardised(texts: Tensor) -> Tensor:
    """Text vectors of a vocabulary without their common mean, at unit mean square: [V, T] -> [V, T].

    The states of a T5 encoder share a large constant part, in which a small probe would have to find the
    differences first.
    """
    centred = texts - texts.mean(dim=0)
    return centred / centred.square().mean().sqrt().clamp_min(1e-6)


def score_outputs(outputs: Tensor, lists: Lists) -> dict[str, Tensor]:
    """How each sample comes out, by metric: float [samples that have a negative of the kind], in 0..1.

    Args:
        outputs: float [q, C] in the order of ``lists``.
        lists: Samples with their candidates.
    """
    scores = {}
    for kind in lists.kinds:
        picked = chosen_columns(lists, kind)
        valid = torch.from_numpy(lists.valid[:, picked])
        fair = valid.sum(dim=1) > 1
        scores[NAMES[kind]] = ranked(outputs[fair][:, picked], valid[fair])[1].double()
    return {name: values for name, values in scores.items() if len(values)}


def chance_levels(lists: Lists) -> dict[str, float]:
    """Expected metrics of a random order, in percent, exact for these lists."""
    levels = {}
    for kind in lists.kinds:
        counts = lists.valid[:, chosen_columns(lists, kind)].sum(axis=1)
        if (counts > 1).any():
            levels[NAMES[kind]] = 100.0 * float((1.0 / counts[counts > 1]).mean())
    return levels


def majority_outputs(train: np.ndarray[Any, np.dtype[np.int64]], lists: Lists, words: Words) -> Tensor:
    """Answers of a reader that knows how common things were in training and sees no image.

    Candidates rank by how often the triplet occurred, equal ones by how often its predicate did.

    Args:
        train: int64 [m, 4], training triplets.
        lists: Samples with their candidates.
        words: Vocabulary sizes.
    """
    numbers, counts = np.unique(words.number(train[:, 1:]), return_counts=True)
    wanted = words.number(lists.triplets)
    place = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
    triplet = np.where(numbers[place] == wanted, counts[place], 0)
    predicate = np.bincount(train[:, 2], minlength=words.predicates)[lists.triplets[..., 1]]
    return torch.from_numpy(triplet + predicate / (1.0 + predicate.max(initial=0)))


def by_predicate(scores: list[Tensor], lists: Lists, names: tuple[str, ...]) -> dict[str, Any]:
    """Break-down of ``top1``: predicate -> samples and percentage (mean over seeds), most frequent first.

    Args:
        scores: One tensor [q] per seed.
        lists: Samples with their candidates.
        names: Predicates by number.
    """
    kept = lists.valid[:, chosen_columns(lists, "random")].sum(axis=1) > 1
    predicates = lists.triplets[kept, 0, 1]
    mean = torch.stack(scores).mean(dim=0).numpy()
    groups: dict[str, list[float]] = defaultdict(list)
    for predicate, score in zip(predicates.tolist(), mean.tolist(), strict=True):
        groups[names[predicate]].append(score)
    order = sorted(groups, key=lambda name: (-len(groups[name]), name))
    return {name: {"n": len(groups[name]), "top1": 100.0 * float(np.mean(groups[name]))} for name in order}


class Relations(Task):
    """Which triplet holds in the image."""

    def protocol(self, inputs: Inputs) -> dict[str, Any]:
        """The text encoder, and digests of the stored candidates."""
        encoder = find_text_encoder(inputs.spec.text, offline=inputs.offline)
        digests = {name: lists_of(inputs, name)[1] for name in ("early_stop", "report")}
        return {"text": encoder.identity, "negatives": digests}

    def prepare(self, spec: TaskSpec, *, cache: Path, offline: bool) -> None:
        """Look for the text encoder."""
        find_text_encoder(spec.text, offline=offline)

    def majority(self, inputs: Inputs) -> Result:
        """See :func:`majority_outputs`."""
        inputs.check()
        lists = self._lists(inputs, "report")
        train = role_table(inputs.roles["train"], known=False)
        if not len(train):
            raise UsageError(f"{inputs.data.name}: no training image has a relation")
        outputs = majority_outputs(train, lists, vocabulary(inputs))
        return self._result(inputs, [outputs] * len(inputs.seeds), lists)

    def run(self, inputs: Inputs) -> Result:
        """Fit one probe per seed and measure it on the report split.

        Raises:
            UsageError: A split without relations, or a metric or control that does not exist.
            BenchError: A loss is not finite, or a worker was killed.
        """
        probing = inputs.probing
        inputs.check()
        lists = {name: self._lists(inputs, name) for name in ("early_stop", "report")}
        check_main_metric(inputs.spec, chance_levels(lists["report"]))
        encoder = find_text_encoder(inputs.spec.text, offline=inputs.offline)
        data, train = inputs.data, inputs.roles["train"]
        texts = standardised(encoder.features([*data.classes, *data.predicates], inputs.cache))
        messages: dict[str, Any] = {name: _messages(role) for name, role in inputs.roles.items()}
        task = ContrastTask(
            **probing,
            negatives=inputs.spec.negatives.train,
            words=vocabulary(inputs),
            **messages,
            table=role_table(train, known=False),
            known=role_table(train, known=True),
            stop_lists=lists["early_stop"],
            report_lists=lists["report"],
            objects=texts[: len(data.classes)],
            predicates=texts[len(data.classes) :],
        )
        results = inputs.fit(task)
        outputs = [result.outputs for result in results if result.outputs is not None]
        found = self._result(inputs, outputs, lists["report"])
        return Result(metrics=found.metrics, extra=fit_details(results, "top1"), details=found.details)

    def _lists(self, inputs: Inputs, name: str) -> Lists:
        """The candidates of the images of a role that could be read."""
        whole = inputs.whole_roles or inputs.roles
        stored = lists_of(inputs.with_roles(whole), name)[0]
        place = {image: position for position, image in enumerate(whole[name].images.tolist())}
        kept = np.array([place[image] for image in inputs.roles[name].images.tolist()], dtype=np.int64)
        return stored.keep(kept)

    def _result(self, inputs: Inputs, outputs: list[Tensor], lists: Lists) -> Result:
        levels = chance_levels(lists)
        check_main_metric(inputs.spec, levels)
        scores = [score_outputs(one, lists) for one in outputs]
        metrics = {
            name: over_seeds(
                [100.0 * float(one[name].mean()) for one in scores], len(scores[0][name]), chance=level
            )
            for name, level in levels.items()
        }
        tables = by_predicate([one["top1"] for one in scores], lists, inputs.data.predicates)
        return Result(metrics=metrics, details={"by_predicate": tables})


def _messages(role: Role) -> Split:
    """The messages of a role; a triplet is looked up elsewhere, so targets are only counters."""
    return Split(role.source(), torch.arange(len(role.kept)), role.row_tensor())
