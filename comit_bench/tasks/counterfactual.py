"""Counterfactual: which tokens change when one thing in a scene changes? Token-object assignment.

The scenes are painted by us, so the truth is known: every scene comes once more with one object moved,
recoloured, replaced or removed, and with another background. ``tasks/changes.py`` says what is measured
on the messages of such pairs; nothing is fitted. Metrics, all in percent but the last:

* ``disentanglement``: what the position of a changed token tells about the edit (all edits).
* ``object``: the same about the object that was edited, whatever was done to it.
* ``attribute``: the same about what was done, whichever object it was done to.
* ``changed``: share of the positions that an edit changes, mean over the edits of a scene, then over the
  scenes; beside it what changes when nothing did.
* ``object_gap``: within a scene, mean cosine similarity of the patterns of two edits of the same object minus
  that of two edits of different objects (``changes.object_gaps``), mean over the scenes; -1 to 1, chance 0.

The chance level of the first three is the mean of the null. They are no means over scenes: their outcomes
are the influences of the scenes (``comit_bench.metrics.statistics.influences``), so that their standard error
is the jackknife's and two rows are compared scene by scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from comit_bench.metrics.statistics import influences
from comit_bench.recipes.kinds import CounterfactualSpec
from comit_bench.results.outcomes import Outcomes
from comit_bench.tasks.base import Inputs, Task, check_main_metric
from comit_bench.tasks.changes import (
    Changes,
    Floats,
    Pairs,
    Patterns,
    Score,
    changed_ids,
    grouped,
    information,
    moved_codes,
    object_gaps,
    pair_up,
    permutations_within,
    readout,
    score_groups,
)
from comit_bench.tasks.result import Result

BAND = (2.5, 97.5)  # percentiles of the null's profiles


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """All that is measured about counterfactual pairs.

    Attributes:
        pairs: Scenes and edits.
        changes: Of every pair and position.
        profiles: float64 [F, K], where the changes of an edit fall.
        band: float64 [3, K], mean, lower and upper percentile of the null's profiles.
        scores: Metric name -> score; ``object`` and ``attribute`` only where there are two or more.
        readout: Share of patterns whose edit the nearest profile names.
        object_gap: float64 [n], see :func:`object_gaps`.
    """

    pairs: Pairs
    changes: Changes
    profiles: Floats
    band: Floats
    scores: dict[str, Score]
    readout: float
    object_gap: Floats


def assign(pairs: Pairs, changes: Changes, spec: CounterfactualSpec) -> Assignment:
    """Score the changes of counterfactual pairs."""
    patterns = Patterns.of(changes)
    settings = {"draws": spec.null_draws, "seed": spec.seed}
    singles = [[edit] for edit in range(len(pairs.edits))]
    scores = {"disentanglement": score_groups(patterns, singles, **settings)}
    for name, part in (("object", 1), ("attribute", 0)):
        groups = list(pairs.groups(part).values())
        if len(groups) > 1:
            scores[name] = score_groups(patterns, groups, **settings)
    return Assignment(
        pairs=pairs,
        changes=changes,
        profiles=patterns.profiles(),
        band=_band(patterns, spec),
        scores=scores,
        readout=readout(patterns),
        object_gap=object_gaps(patterns, pairs),
    )


def _band(patterns: Patterns, spec: CounterfactualSpec) -> Floats:
    scenes, edits = patterns.active.shape
    orders = permutations_within(scenes, edits, spec.null_draws, spec.seed)
    drawn = np.concatenate([patterns.permuted(order).profiles() for order in orders])  # [draws F, K]
    return np.stack([drawn.mean(axis=0), *np.percentile(drawn, BAND, axis=0)])


def changed_share(changes: Changes) -> Floats:
    """Share of the positions that change, float64 [n, F]; NaN without a pair. Distances count up to 1."""
    share = np.minimum(changes.change, 1.0).mean(axis=-1)
    return np.where(changes.present, share, np.nan)


def summary(found: Assignment, *, seeds: Sequence[int] = (0,), also: Assignment | None = None) -> Result:
    """Metrics, details and the outcomes of every scene; nothing is random, so every seed has the same.

    Args:
        found: The main measure.
        seeds: Of the record.
        also: The same on distances of codes, for the details.
    """
    share, floor = changed_share(found.changes), found.changes.floor
    values = {name: influences(score.value, score.left_out) for name, score in found.scores.items()}
    values["changed"] = np.ma.masked_invalid(share).mean(axis=1).filled(np.nan)
    if np.isfinite(found.object_gap).any():  # there are two objects or more
        values["object_gap"] = found.object_gap
    columns = {f"changed/{edit}": share[:, f] for f, edit in enumerate(found.pairs.edits)}
    outcomes = Outcomes.same_for_all(found.pairs.scenes, seeds, values, columns=columns)
    metrics = {name: outcomes.metric(name, chance=100 * score.chance) for name, score in found.scores.items()}
    still = 100 * float(np.minimum(floor, 1.0).mean()) if len(floor) else None
    metrics["changed"] = outcomes.metric("changed", chance=still, higher_is_better=False)
    if "object_gap" in values:
        metrics["object_gap"] = outcomes.metric("object_gap", unit="", chance=0.0)
    details = _details(found)
    if also is not None:
        details["by_distance_of_codes"] = {name: _tell(score) for name, score in also.scores.items()}
    return Result(metrics=metrics, details=details, outcomes=outcomes)


def _tell(score: Score) -> dict[str, float]:
    chance = score.chance
    return {
        "value": 100 * score.value,
        "null": 100 * chance,
        "null_std": 100 * float(score.null.std(ddof=1)) if len(score.null) > 1 else 0.0,
        "above_null": 100 * (score.value - chance) / max(1 - chance, 1e-12),
    }


def _details(found: Assignment) -> dict[str, Any]:
    pairs, changes = found.pairs, found.changes
    patterns = Patterns.of(changes)
    share, active = patterns.share, patterns.active
    effective = np.exp(
        -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=-1)
    )  # [n, F]; positions that share a change evenly
    with np.errstate(invalid="ignore"):
        rate = changes.change.sum(axis=0) / np.maximum(changes.present.sum(axis=0), 1)[:, None]
    columns = found.profiles.T  # [K, F]
    total = columns.sum(axis=1, keepdims=True)
    mixed = np.divide(columns, total, out=np.zeros_like(columns), where=total > 0)
    bits = -(mixed * np.log(np.where(mixed > 0, mixed, 1.0))).sum(axis=1)
    special = np.where(total[:, 0] > 0, 1 - bits / np.log(len(pairs.edits)), 0.0)
    details: dict[str, Any] = {
        "scenes": len(pairs.scenes),
        "edits": list(pairs.edits),
        "pairs": changes.present.sum(axis=0).tolist(),
        "scores": {name: _tell(score) for name, score in found.scores.items()},
        "most_possible": 100 * min(1.0, float(np.log(columns.shape[0]) / np.log(len(pairs.edits)))),
        "readout": {"value": 100 * found.readout, "chance": 100 / len(pairs.edits)},
        "changed_by_edit": (100 * np.nanmean(changed_share(changes), axis=0)).tolist(),
        "noticed_by_edit": (100 * active.sum(axis=0) / changes.present.sum(axis=0)).tolist(),
        "effective_positions_by_edit": _means(effective, active),
        "rate": rate.round(5).tolist(),
        "profile": found.profiles.round(5).tolist(),
        "null_profile": {
            name: row.round(5).tolist() for name, row in zip(("mean", "low", "high"), found.band, strict=True)
        },
        "specialisation_by_position": (100 * special).round(3).tolist(),
    }
    objects = pairs.groups(1)
    if len(objects) > 1:
        split = grouped(found.profiles, list(objects.values()))
        whole = split.sum(axis=0)
        preferred = np.divide(split, whole, out=np.full_like(split, 1 / len(objects)), where=whole > 0)
        details["object_share_by_position"] = dict(zip(objects, preferred.round(5).tolist(), strict=True))
        details["between_objects_by_attribute"] = _between(found, objects)
    return details


def _between(found: Assignment, objects: dict[str, list[int]]) -> dict[str, float]:
    """Percent that a changed position tells about the object, for every attribute on its own."""
    told = {}
    for attribute, members in found.pairs.groups(0).items():
        groups = [[m for m in members if m in own] for own in objects.values()]
        told[attribute] = 100 * information(grouped(found.profiles, [group for group in groups if group]))
    return told


def _means(values: Floats, there: Any) -> list[float | None]:
    """Mean of every column over the rows that are there; None where there is none."""
    return [
        float(column[rows].mean()) if rows.any() else None
        for column, rows in zip(values.T, there.T, strict=True)
    ]


class Counterfactual(Task):
    """Which tokens change when one thing in a scene changes."""

    def run(self, inputs: Inputs) -> Result | None:
        """Compare; the first process does it alone."""
        if not inputs.ranks.first:
            return None
        role, spec = inputs.roles["report"], inputs.spec.counterfactual
        pairs = pair_up(role.ids)
        codes = role.source().take(role.row_tensor()).cpu().numpy()
        by_code = assign(pairs, moved_codes(codes, pairs), spec)
        assert role.store is not None
        if role.store.layout.vocab_size is None:
            result = summary(by_code, seeds=inputs.seeds)
        else:
            ids = np.asarray(role.store.ids(role.rows), dtype=np.int64)
            by_id = assign(pairs, changed_ids(ids, pairs), spec)
            result = summary(by_id, seeds=inputs.seeds, also=by_code)
        check_main_metric(inputs.spec, result.metrics)
        return result
