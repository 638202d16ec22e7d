"""Relations: does the message say which object stands in which relation to which (paper: Visual Genome)?

The probe reads a message with the text vectors of one triplet appended (subject, predicate, object, each
through a projection of its own, five token types in all) and answers with one logit. Metrics, in percent
on a fixed stored list of candidates per sample, all from the same logits:

- ``top1@4``: the true triplet ranks first of four, the others from other images;
- ``top1@16`` (one more than ``negatives.report``): the same with all triplets of other images;
- ``predicate``: first against the same objects with other predicates;
- ``swapped``: before the same triplet with subject and object exchanged.

``top1`` can be had by reading objects alone; the last two cannot, and the probe is trained on their kinds of
negatives too. Ties count as the chance of a random order. ``chance`` is one over the number of candidates,
averaged over the samples.

The reference row ``blind`` is the same probe, fitted on the same triplets beside messages that all say the
same. It learns what the control ``permute-labels`` learns, since messages of other images say nothing about
a triplet either, but without their noise and at a fraction of the time. What it gains over chance can be
had without an image. Candidates are chosen so that this is nothing for ``top1``, whatever it has learned
(``comit_bench.tasks.negatives``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comit_bench.errors import UsageError
from comit_bench.probing.fit import Examples, MessageSource
from comit_bench.recipes.specs import TaskSpec
from comit_bench.results.outcomes import Outcomes
from comit_bench.tasks.base import Inputs, Role, Task, check_main_metric
from comit_bench.tasks.contrast import ContrastTask, ranked
from comit_bench.tasks.negatives import Ints, Lists, Words, role_table, stored_lists
from comit_bench.tasks.result import Result
from comit_bench.tasks.text import find_text_encoder

SYNONYMS = "synonyms"  # of the data set's notes: vocabulary -> groups of words


def vocabulary(inputs: Inputs) -> Words:
    """The data set's vocabularies, and which of their words are synonyms."""
    data = inputs.data
    groups: Mapping[str, Sequence[Sequence[str]]] = data.notes.get(SYNONYMS, {})
    return Words(
        len(data.classes),
        len(data.predicates),
        _senses(data.classes, groups.get("words", ())),
        _senses(data.predicates, groups.get("predicates", ())),
    )


def _senses(words: Sequence[str], groups: Sequence[Sequence[str]]) -> Ints | None:
    """int64 [words], the position of the first of a word's synonyms; None when there are none."""
    place = {word: number for number, word in enumerate(words)}
    senses = np.arange(len(words))
    for group in groups:
        numbers = [place[word] for word in group if word in place]
        senses[numbers] = min(numbers, default=0)
    return senses if groups else None


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


def standardised(texts: Tensor) -> Tensor:
    """Text vectors of a vocabulary without their common mean, at unit mean square: [V, T] -> [V, T].

    The states of a T5 encoder share a large constant part, in which a small probe would have to find the
    differences first.
    """
    centred = texts - texts.mean(dim=0)
    return centred / centred.square().mean().sqrt().clamp_min(1e-6)


def score_outputs(outputs: Tensor, lists: Lists) -> dict[str, NDArray[np.float64]]:
    """How each sample comes out, by metric: float64 [q] in 0..1, NaN where it has no negative of the kind.

    Args:
        outputs: float [q, C] in the order of ``lists``.
        lists: Samples with their candidates.
    """
    scores = {}
    for metric, picked in lists.columns().items():
        valid = torch.from_numpy(lists.valid[:, picked])
        right = ranked(outputs[:, picked], valid)[1].double()
        scores[metric] = right.where(valid.sum(dim=1) > 1, torch.nan).numpy()
    return {metric: values for metric, values in scores.items() if np.isfinite(values).any()}


def chance_levels(lists: Lists) -> dict[str, float]:
    """Expected metrics of a random order, in percent, exact for these lists."""
    levels = {}
    for metric, picked in lists.columns().items():
        counts = lists.only(picked).valid.sum(axis=1)
        if len(counts):
            levels[metric] = 100.0 * float((1.0 / counts).mean())
    return levels


def chosen_triplets(outputs: Tensor, lists: Lists, metric: str) -> Ints:
    """The candidate of a metric that ranks first, of equal ones the first listed: int64 [q, 3]."""
    picked = lists.columns()[metric]
    masked = outputs[:, picked].masked_fill(~torch.from_numpy(lists.valid[:, picked]), -torch.inf)
    chosen: Ints = lists.triplets[np.arange(len(outputs)), np.array(picked)[masked.argmax(dim=1).numpy()]]
    return chosen


def majority_outputs(train: Ints, lists: Lists, words: Words) -> Tensor:
    """Answers of a reader that knows how common things were in training and sees no image.

    Candidates rank by how often the triplet occurred, equal ones by how often its predicate did.

    Args:
        train: int64 [m, 4], training triplets.
        lists: Samples with their candidates.
        words: Vocabularies.
    """
    numbers, counts = np.unique(words.number(train[:, 1:]), return_counts=True)
    wanted = words.number(lists.triplets)
    place = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
    triplet = np.where(numbers[place] == wanted, counts[place], 0)
    predicate = np.bincount(train[:, 2], minlength=words.predicates)[lists.triplets[..., 1]]
    return torch.from_numpy(triplet + predicate / (1.0 + predicate.max(initial=0)))


def by_predicate(
    scores: NDArray[np.float64], lists: Lists, names: Sequence[str], metric: str
) -> dict[str, Any]:
    """Break-down of a metric: predicate -> samples and percentage (mean over seeds), most frequent first.

    Args:
        scores: float64 [U, q]; NaN where a sample has no negative.
        lists: Samples with their candidates.
        names: Predicates by number.
        metric: What the percentage is called.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for predicate, score in zip(lists.triplets[:, 0, 1].tolist(), scores.mean(axis=0).tolist(), strict=True):
        if np.isfinite(score):
            groups[names[predicate]].append(score)
    order = sorted(groups, key=lambda name: (-len(groups[name]), name))
    return {name: {"n": len(groups[name]), metric: 100.0 * float(np.mean(groups[name]))} for name in order}


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

    def blind(self, inputs: Inputs) -> Result:
        """The probe beside messages of one token that is the same for every image.

        It stops by the hard negatives when there are any: elsewhere it can learn nothing, and it would stop
        before it has learned what can be known of these.
        """
        roles = {
            name: replace(role, messages=MessageSource(codes=torch.zeros(len(role.kept), 1, 1)))
            for name, role in inputs.roles.items()
        }
        return self._fit(inputs.with_roles(roles), sees=False)

    def run(self, inputs: Inputs) -> Result:
        """Fit one probe per seed, stop by the candidates of the main metric, and measure the report split.

        Raises:
            UsageError: A split without relations, or a metric or control that does not exist.
            BenchError: A loss is not finite, or a worker was killed.
        """
        return self._fit(inputs, sees=True)

    def _fit(self, inputs: Inputs, *, sees: bool) -> Result:
        probing, metric = inputs.probing, inputs.spec.main_metric
        inputs.check()
        lists = {name: self._lists(inputs, name) for name in ("early_stop", "report")}
        check_main_metric(inputs.spec, lists["report"].columns())
        stop = lists["early_stop"].columns()[metric]
        if not sees and len(lists["early_stop"].hard()) > 1:
            metric, stop = "hard", lists["early_stop"].hard()
        encoder = find_text_encoder(inputs.spec.text, offline=inputs.offline)
        data, train = inputs.data, inputs.roles["train"]
        texts = standardised(encoder.features([*data.classes, *data.predicates], inputs.cache))
        messages: dict[str, Any] = {name: _messages(role) for name, role in inputs.roles.items()}
        task = ContrastTask(
            **probing,
            negatives=inputs.spec.negatives,
            words=vocabulary(inputs),
            **messages,
            table=role_table(train, known=False),
            known=role_table(train, known=True),
            stop_lists=lists["early_stop"].only(stop),
            report_lists=lists["report"],
            objects=texts[: len(data.classes)],
            predicates=texts[len(data.classes) :],
        )
        fitted = inputs.fit(task)
        found = self._result(inputs, fitted.outputs(), lists["report"])
        return replace(found, extra=fitted.details(metric), unconverged=fitted.unconverged())

    def _lists(self, inputs: Inputs, name: str) -> Lists:
        """The candidates of the images of a role that could be read."""
        whole = inputs.whole_roles or inputs.roles
        stored = lists_of(inputs.with_roles(whole), name)[0]
        place = {image: position for position, image in enumerate(whole[name].images.tolist())}
        kept = np.array([place[image] for image in inputs.roles[name].images.tolist()], dtype=np.int64)
        return stored.keep(kept)

    def _result(self, inputs: Inputs, outputs: Sequence[Tensor], lists: Lists) -> Result:
        data, main = inputs.data, inputs.spec.main_metric
        check_main_metric(inputs.spec, lists.columns())
        levels = chance_levels(lists)
        if main not in levels:
            raise UsageError(
                f"the report set of {inputs.spec.name} has no two images whose relations differ. Use more "
                "images (a larger --limit)."
            )
        scores = [score_outputs(one, lists) for one in outputs]
        ids, clusters = _names(inputs.roles["report"], lists, several=inputs.spec.negatives.per_image != 1)

        def words(triplets: Ints) -> list[str]:
            return [
                f"{data.classes[s]} {data.predicates[p]} {data.classes[o]}" for s, p, o in triplets.tolist()
            ]

        found = Outcomes(
            ids=ids,
            seeds=inputs.seeds,
            values={name: np.stack([one[name] for one in scores]) for name in levels},
            clusters=clusters,
            columns={
                "answer": [words(chosen_triplets(one, lists, main)) for one in outputs],
                "truth": words(lists.triplets[:, 0]),
            },
        )
        metrics = {name: found.metric(name, chance=level) for name, level in levels.items()}
        details = {"by_predicate": by_predicate(found.values[main], lists, data.predicates, main)}
        return Result(metrics=metrics, outcomes=found, details=details)


def _names(role: Role, lists: Lists, *, several: bool) -> tuple[list[str], list[str] | None]:
    """Ids of the samples, and of their images when one can have several."""
    images = [role.ids[image] for image in lists.images.tolist()]
    if not several:
        return images, None
    counts: dict[str, int] = defaultdict(int)
    names = []
    for image in images:
        names.append(f"{image}#{counts[image]}")
        counts[image] += 1
    return names, images


def _messages(role: Role) -> Examples:
    """The messages of a role; a triplet is looked up elsewhere, so targets are only counters."""
    return Examples(role.source(), torch.arange(len(role.kept)), role.row_tensor())
