"""Which message positions change when one thing in a scene changes: pairs, patterns, scores and their null.

A scene is painted several times, with exactly one thing edited (``data/scenes/digits.py``). From the
messages of the original and of an edited image:

1. *Change* ``d[i, f, k]`` of scene i, edit f and position k: 1 when the ids differ, else 0; for continuous
   codes their distance in units of the position's usual distance between two originals.
2. *Pattern* ``p[i, f, :] = d[i, f, :] / sum``: where a change of this edit falls. Every pattern weighs the
   same, however many tokens it changes. Where an edit changes nothing, the mean of all patterns stands in:
   it tells nothing about the edit.
3. *Profile* ``c[f, :]``: mean pattern over the scenes. Draw a scene, make the edit, draw one of the changed
   tokens: it is at position k with probability ``c[f, k]``.
4. *Score*: the mutual information between the edit and the position of that token, edits equally likely,
   in percent of log F. Equally: the Jensen-Shannon divergence of the profiles. 100 when no two edits ever
   change the same position (each change names its edit); 0 when all edits change the same positions.
5. *Null*: the same after the edits' names are permuted within every scene, which keeps every pattern and
   every scene, and leaves the edits nothing in common. Its mean is above 0 for few scenes.

Shape legend: ``n`` scenes, ``F`` edits, ``G`` groups of edits, ``K`` message length, ``d`` code dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from comit_bench.errors import UsageError
from comit_bench.seeding import seed_for

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

ORIGINAL, UNCHANGED = "original", "unchanged"
SEPARATOR = "_"


@dataclass(frozen=True, slots=True)
class Pairs:
    """Which images are one scene.

    Attributes:
        scenes: Names [n], sorted.
        edits: Names [F], sorted; neither ``original`` nor ``unchanged``.
        original: int64 [n], rows of the originals.
        edited: int64 [n, F], rows of the edited images, -1 where there is none.
        unchanged: int64 [n], rows of the originals under another name, -1 where there is none.
    """

    scenes: tuple[str, ...]
    edits: tuple[str, ...]
    original: Ints
    edited: Ints
    unchanged: Ints

    def groups(self, part: int) -> dict[str, list[int]]:
        """Edits by a part of their name: 0 the attribute, 1 the object. Only those with two parts count."""
        found: dict[str, list[int]] = {}
        for number, name in enumerate(self.edits):
            parts = name.split(SEPARATOR)
            if len(parts) == 2:
                found.setdefault(parts[part], []).append(number)
        return found


def pair_up(names: Sequence[str]) -> Pairs:
    """Find the scenes among images named ``<edit>/<scene>``; scenes without an original are left out."""
    rows: dict[str, dict[str, int]] = {}
    for row, name in enumerate(names):
        edit, _, scene = name.rpartition("/")
        rows.setdefault(edit, {})[scene] = row
    edits = tuple(sorted(set(rows) - {ORIGINAL, UNCHANGED}))
    scenes = tuple(sorted(rows.get(ORIGINAL, {})))
    if len(edits) < 2 or not scenes:
        raise UsageError(
            f"counterfactual pairs need a class {ORIGINAL!r} and two edits or more; of {len(names)} images "
            f"there are {len(scenes)} originals and the edits {', '.join(edits) or 'none'}. Use more images "
            "(a larger --limit)."
        )

    def row_of(edit: str) -> list[int]:
        return [rows.get(edit, {}).get(scene, -1) for scene in scenes]

    pairs = Pairs(
        scenes=scenes,
        edits=edits,
        original=np.array(row_of(ORIGINAL)),
        edited=np.array([row_of(edit) for edit in edits]).T.reshape(len(scenes), len(edits)),
        unchanged=np.array(row_of(UNCHANGED)),
    )
    if lonely := [edit for edit, rows_of in zip(edits, pairs.edited.T, strict=True) if (rows_of < 0).all()]:
        raise UsageError(
            f"no scene has both its original and {', '.join(lonely)} among the {len(names)} images used. Use "
            "more of them (a larger --limit)."
        )
    return pairs


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """How much each position of a message changes.

    Attributes:
        change: float64 [n, F, K], 0 and more; 0 where there is no pair.
        present: bool [n, F], whether there is a pair.
        floor: float64 [m, K], the same for images that did not change at all; m may be 0.
    """

    change: Floats
    present: Bools
    floor: Floats


def changed_ids(ids: Ints, pairs: Pairs) -> Changes:
    """1 where ids differ, from ids int64 [N, K] of all images."""
    original = ids[pairs.original]  # [n, K]
    present = pairs.edited >= 0
    change = (ids[pairs.edited] != original[:, None]) & present[..., None]
    twice = pairs.unchanged >= 0
    floor = ids[pairs.unchanged[twice]] != original[twice]
    return Changes(change.astype(np.float64), present, floor.astype(np.float64))


def moved_codes(codes: NDArray[np.float32], pairs: Pairs) -> Changes:
    """Distances of codes, from codes float32 [N, K, d] of all images.

    The unit at a position is the root mean squared distance between the codes of two different originals.
    A position that is the same for all originals takes the root mean square over the positions.
    """
    original = codes[pairs.original].astype(np.float64)  # [n, K, d]
    count = len(original)
    spread = original.var(axis=0, ddof=1).sum(axis=-1) if count > 1 else np.zeros(original.shape[1])
    usual = math.sqrt(float(spread.mean())) if spread.any() else 1.0
    unit = math.sqrt(2) * np.where(spread > 0, np.sqrt(spread), usual)  # [K]

    def distance(rows: Ints, base: Floats) -> Floats:
        gap: Floats = np.sqrt(((codes[rows] - base) ** 2).sum(axis=-1)) / unit
        return gap

    present = pairs.edited >= 0
    columns = [distance(pairs.edited[:, f], original) for f in range(len(pairs.edits))]
    change = np.stack(columns, axis=1) * present[..., None]
    twice = pairs.unchanged >= 0
    return Changes(change, present, distance(pairs.unchanged[twice], original[twice]))


@dataclass(frozen=True, slots=True, eq=False)
class Patterns:
    """Where changes fall.

    Attributes:
        share: float64 [n, F, K], sums to 1 over the positions, or 0 where nothing changed.
        active: bool [n, F], whether anything changed.
        present: bool [n, F], whether there is a pair.
    """

    share: Floats
    active: Bools
    present: Bools

    @classmethod
    def of(cls, changes: Changes) -> Patterns:
        """The patterns of changes."""
        total = changes.change.sum(axis=-1)
        active = total > 0
        return cls(changes.change / np.where(active, total, 1.0)[..., None], active, changes.present)

    def edits(self, chosen: Sequence[int]) -> Patterns:
        """Some of the edits, in this order."""
        columns = list(chosen)
        return Patterns(self.share[:, columns], self.active[:, columns], self.present[:, columns])

    def permuted(self, order: Ints) -> Patterns:
        """The edits of every scene in another order, int64 [n, F]."""
        return Patterns(
            np.take_along_axis(self.share, order[..., None], axis=1),
            np.take_along_axis(self.active, order, axis=1),
            np.take_along_axis(self.present, order, axis=1),
        )

    def profiles(self) -> Floats:
        """Mean pattern of every edit, [F, K]; all 0 when no edit ever changes anything."""
        return _profiles(self.share.sum(axis=0), self.active.sum(axis=0), self.present.sum(axis=0))

    def profiles_without(self, scene: int) -> Floats:
        """The same without one of the scenes."""
        rest = [values.sum(axis=0) - values[scene] for values in (self.share, self.active, self.present)]
        return _profiles(*rest)


def _profiles(total: Floats, active: Ints, present: Ints) -> Floats:
    """Sums of patterns [F, K], numbers of patterns and of pairs [F] -> profiles [F, K]."""
    mean = total.sum(axis=0) / max(int(active.sum()), 1)
    filled = total + (present - active)[:, None] * mean
    profiles: Floats = np.where(present[:, None] > 0, filled / np.maximum(present, 1)[:, None], mean)
    return profiles


def grouped(profiles: Floats, groups: Sequence[Sequence[int]]) -> Floats:
    """Mean profile of the edits of every group, [G, K]."""
    return np.stack([profiles[list(members)].mean(axis=0) for members in groups])


def information(profiles: Floats) -> float:
    """Share of log G that a changed position tells about the group, 0 to 1, from profiles [G, K]."""
    if len(profiles) < 2:
        return 0.0
    mean = profiles.mean(axis=0)
    ratio = np.divide(profiles, mean, out=np.ones_like(profiles), where=profiles > 0)
    nats = float((profiles * np.log(ratio)).sum()) / len(profiles)
    return min(max(nats / math.log(len(profiles)), 0.0), 1.0)


def readout(patterns: Patterns) -> float:
    """How often the nearest profile names the edit of a pattern, 0 to 1, mean over the edits.

    The profile of the pattern's own edit is computed without the pattern's scene. Patterns of edits that
    changed nothing are left out here; equally near profiles share the hit.
    """
    total, count = patterns.share.sum(axis=0), patterns.active.sum(axis=0)  # [F, K], [F]
    profiles = total / np.maximum(count, 1)[:, None]
    shares = []
    for f in range(len(total)):
        chosen = patterns.share[patterns.active[:, f], f]  # [m, K]
        if count[f] < 2:
            continue
        own = (total[f] - chosen) / (count[f] - 1)
        gaps = ((chosen[:, None] - profiles) ** 2).sum(axis=-1)  # [m, F]
        gaps[:, f] = ((chosen - own) ** 2).sum(axis=-1)
        near = gaps <= gaps.min(axis=1, keepdims=True) + 1e-12
        shares.append(float((near[:, f] / near.sum(axis=1)).mean()))
    return float(np.mean(shares)) if shares else 1.0 / len(total)


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """One score with its null; shares in 0..1.

    Attributes:
        value: As measured.
        null: Of every draw of the null, [draws].
        left_out: Without each of the scenes, float64 [n].
    """

    value: float
    null: Floats
    left_out: Floats

    @property
    def chance(self) -> float:
        """Mean of the null."""
        return float(self.null.mean())


def score_groups(patterns: Patterns, groups: Sequence[Sequence[int]], *, draws: int, seed: int) -> Score:
    """How well a changed position tells the group of the edit.

    Args:
        patterns: Of all edits.
        groups: Edits of every group; only these edits are permuted in the null.
        draws: Permutations.
        seed: Of the permutations.
    """
    chosen = patterns.edits([member for members in groups for member in members])
    starts = np.cumsum([0, *(len(members) for members in groups)]).tolist()
    places = [range(start, stop) for start, stop in pairwise(starts)]
    scenes, edits = chosen.active.shape

    def told(profiles: Floats) -> float:
        return information(grouped(profiles, places))

    null = [told(chosen.permuted(o).profiles()) for o in permutations_within(scenes, edits, draws, seed)]
    left_out = [told(chosen.profiles_without(scene)) for scene in range(scenes)]
    return Score(told(chosen.profiles()), np.array(null), np.array(left_out))


def permutations_within(scenes: int, edits: int, draws: int, seed: int) -> list[Ints]:
    """Independent orders of the edits for every scene, int64 [n, F] per draw."""
    rng = np.random.default_rng(seed_for(seed, "counterfactual/null"))
    table = np.tile(np.arange(edits), (scenes, 1))
    return [rng.permuted(table, axis=1) for _ in range(draws)]


def object_gaps(patterns: Patterns, pairs: Pairs) -> Floats:
    """How much more alike two edits of one object are than edits of two objects, by scene, float64 [n].

    Of a scene, every two edits of *different attributes* are compared by the cosine of their patterns (0 to
    1). The gap is the mean over those that edit the same object minus the mean over those that edit
    different objects: 1 where each object has positions of its own, 0 where the object makes no difference.
    Attributes differ on both sides, so a message that knows attributes only is at 0 as well. Edits of no
    object (the background) are left out. For an edit that changes nothing the mean of all patterns stands in,
    as in the profiles.

    Permuting the edits' names within a scene makes both means the mean over all pairs in expectation, so
    chance is exactly 0. A scene without pairs of both sorts has no gap (NaN), whoever is measured.
    """
    parts = [name.split(SEPARATOR) for name in pairs.edits]
    edits = [f for f, names in enumerate(parts) if len(names) == 2]
    attributes, objects = (np.array([parts[f][place] for f in edits]) for place in (0, 1))
    mean = patterns.share.sum(axis=(0, 1)) / max(int(patterns.active.sum()), 1)
    filled = np.where(patterns.active[:, edits, None], patterns.share[:, edits], mean)
    length = np.linalg.norm(filled, axis=-1, keepdims=True)
    unit = filled / np.where(length > 0, length, 1.0)  # [n, E, K]
    first, second = np.triu_indices(len(edits), k=1)
    different = attributes[first] != attributes[second]
    first, second = first[different], second[different]
    cosine = (unit @ unit.swapaxes(1, 2))[:, first, second]  # [n, pairs]
    present = patterns.present[:, edits]
    there, same = present[:, first] & present[:, second], objects[first] == objects[second]

    def mean_over(chosen: Bools) -> Floats:
        mean: Floats = np.ma.masked_array(cosine, ~chosen).mean(axis=1).filled(np.nan)
        return mean

    return mean_over(there & same) - mean_over(there & ~same)
