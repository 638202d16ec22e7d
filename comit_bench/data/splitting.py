"""Who goes to which side: hold-outs by a hash, and splits in which no pair of categories is shared.

**The pair-disjoint split.** Categories are the points of a graph; two are joined when images show exactly
these two. Every line (pair) goes to train or to val with all of its images, so that no pair is shared, and
every category shall have pairs on both sides. The steps, all decided by names and counts alone:

1. *Drop what cannot be covered.* A category with fewer than two pairs cannot be on both sides: it is dropped
   with its images, which may leave others with fewer than two, and so on. A group of categories whose
   pairs form one closed ring of odd length cannot be covered either (colours cannot alternate around it) and
   is dropped. Everything else can be covered; no category is dropped without need.
2. *Cover.* Each connected group is walked along an Euler tour (each line once), and its lines are given to
   val and train in turn. Points with an odd number of lines are first joined to one extra point, where the
   tour starts; without such points it starts at a point with at least four lines, if there is one. Each
   category is passed through with two different sides, hence covered (a lemma of Bondy and Murty,
   *Graph Theory with Applications*, 6.1).
3. *Move.* The pairs are visited in the order of ``sha256(seed, names)``. A pair changes sides if that brings
   the number of val images nearer to the target and leaves every category covered. Repeated until
   nothing changes.
4. *Swap.* While the target is missed, the two pairs whose exchange comes nearest to it (and keeps the cover)
   change places; then step 3 again. It ends when no single move and no exchange helps.
5. *Balance.* A reader that has learnt nothing but how often each category occurs in train should gain nothing
   by it, so every category's share of val images shall be near the target too: the *imbalance* is the sum
   over categories of (val images - target * images)^2 / images. Again and again the two pairs whose exchange
   lowers it most change places, among those that keep the cover and leave the number of val images within
   half a percent of all images of the target, or no farther from it than step 4 came. Ties go to the
   earlier pairs of step 3's order. It ends when none helps.
6. *Begin elsewhere.* Steps 3 to 5 end where no single change helps, which among few pairs may be far from the
   target. As long as more than half a percent of all images are missing, step 2 is taken with train and val
   exchanged, then with other orders of the pairs (``sha256(seed, attempt, names)``), :data:`STARTS` in all.
   The result nearest to the target counts, of equal ones the first.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from comit_bench.errors import CorruptFileError, UsageError

Pair = tuple[str, str]
Graph = dict[str, dict[str, int]]  # category -> partner -> images
STARTS = 24  # orders of the pairs, each with its complement


def holdout(ids: Sequence[str], fraction: float, salt: str) -> NDArray[np.bool_]:
    """Choose about ``fraction`` of the ids by a hash, each independently of all others.

    Args:
        ids: Sample ids; neither their order nor which others are there changes the choice.
        fraction: 0 (none) to 1 (all).
        salt: Another salt makes another choice.

    Returns:
        bool [n], True for the chosen ones.
    """
    if not 0.0 <= fraction <= 1.0:
        raise UsageError(f"holdout fraction {fraction} must be between 0 and 1")
    start = hashlib.sha256(salt.encode("utf-8") + b"\0")

    def draw(name: str) -> int:
        state = start.copy()
        state.update(name.encode("utf-8", "surrogateescape"))
        return int.from_bytes(state.digest()[:6], "big")

    draws = np.fromiter((draw(name) for name in ids), dtype=np.int64, count=len(ids))
    return draws < fraction * 2.0**48


@dataclass(frozen=True, slots=True)
class PairSplit:
    """A pair-disjoint split.

    Attributes:
        train: Pairs (names in alphabetical order) whose images go to train.
        val: Pairs whose images go to val.
        dropped: Category -> why it could not be on both sides; its images are in neither.
        target: Share of images that val was to have.
        share: Share that it has.
    """

    train: frozenset[Pair]
    val: frozenset[Pair]
    dropped: dict[str, str]
    target: float
    share: float


def pair_disjoint(counts: Mapping[Pair, int], share: float, *, seed: int = 0) -> PairSplit:
    """Divide pairs between train and val as the module's docstring says.

    Args:
        counts: Images per pair of two different categories; pairs without images are passed over.
        share: Share of images that val is to have, between 0 and 1.
        seed: Another seed makes another split.
    """
    if not 0.0 < share < 1.0:
        raise UsageError(f"val share {share} must be between 0 and 1")
    images: dict[Pair, int] = defaultdict(int)
    for (a, b), n in counts.items():
        if a == b:
            raise UsageError(f"({a!r}, {b!r}) is no pair: expected two different categories")
        if n > 0:
            images[(min(a, b), max(a, b))] += n
    graph: Graph = defaultdict(dict)
    for (a, b), n in images.items():
        graph[a][b] = graph[b][a] = n
    dropped = _drop_uncoverable(graph)
    kept = {pair: n for pair, n in images.items() if not dropped.keys() & set(pair)}
    val = _nearest(kept, share, seed)
    total = sum(kept.values())
    return PairSplit(
        train=frozenset(kept) - val,
        val=val,
        dropped=dict(sorted(dropped.items())),
        target=share,
        share=sum(kept[pair] for pair in val) / total if total else 0.0,
    )


def _nearest(images: Mapping[Pair, int], share: float, seed: int) -> frozenset[Pair]:
    """The pairs of val, from the start that comes nearest to the target (steps 2 to 6)."""
    total = sum(images.values())
    best: tuple[int, frozenset[Pair]] | None = None
    for attempt in range(STARTS):
        salt = (str(seed),) if attempt == 0 else (str(seed), str(attempt))
        pairs = sorted(
            images, key=lambda pair: (hashlib.sha256("\0".join((*salt, *pair)).encode()).digest(), pair)
        )
        sizes = np.array([images[pair] for pair in pairs], dtype=np.int64)
        start = _euler_sides(pairs)
        for begun in (start, ~start):
            sides = _Sides(pairs, sizes, begun, goal=round(share * total))
            sides.settle()
            sides.balance(share)
            if best is None or abs(sides.gap) < best[0]:
                chosen = zip(pairs, sides.val.tolist(), strict=True)
                best = abs(sides.gap), frozenset(pair for pair, inside in chosen if inside)
            if best[0] <= total // 200:
                return best[1]
    assert best is not None
    return best[1]


def check_pair_disjoint(train: Sequence[Pair], val: Sequence[Pair], where: str) -> None:
    """Verify a split from its samples alone."""
    shared = sorted(set(train) & set(val))
    if shared:
        raise CorruptFileError(f"{where}: {len(shared)} pairs are in train and in val: {shared[:3]}")
    lonely = sorted({c for pair in train for c in pair} ^ {c for pair in val for c in pair})
    if lonely:
        raise CorruptFileError(f"{where}: {len(lonely)} categories are on one side only: {lonely[:5]}")


def _drop_uncoverable(graph: Graph) -> dict[str, str]:
    """Remove categories that cannot be on both sides from ``graph``, and say why."""
    dropped: dict[str, str] = {}

    def drop(name: str, why: str) -> None:
        dropped[name] = why
        for partner in graph.pop(name):
            graph[partner].pop(name, None)

    while lonely := sorted(name for name, partners in graph.items() if len(partners) < 2):
        for name in lonely:
            partners = sorted(graph[name])
            drop(
                name, f"only one pair is left for it, with {partners[0]!r}" if partners else "no pair is left"
            )
    for group in _groups(graph):
        if len(group) % 2 and all(len(graph[name]) == 2 for name in group):
            for name in group:
                dropped[name] = f"its pairs form a ring of {len(group)} categories, an odd number"
                del graph[name]
    return dropped


def _groups(graph: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    """Connected groups, each sorted."""
    seen: set[str] = set()
    groups = []
    for start in sorted(graph):
        if start in seen:
            continue
        seen.add(start)
        group, stack = [], [start]
        while stack:
            name = stack.pop()
            group.append(name)
            new = [partner for partner in graph[name] if partner not in seen]
            seen.update(new)
            stack += new
        groups.append(sorted(group))
    return groups


def _euler_sides(pairs: Sequence[Pair]) -> NDArray[np.bool_]:
    """A side for every pair [n] (True: val) such that every category has both."""
    lines: dict[str, list[int]] = defaultdict(list)  # category -> numbers of its lines, in hash order
    graph: Graph = defaultdict(dict)
    for number, (a, b) in enumerate(pairs):
        lines[a].append(number)
        lines[b].append(number)
        graph[a][b] = graph[b][a] = 1
    ends: list[Pair] = list(pairs)
    val = np.zeros(len(pairs), dtype=np.bool_)
    for group in _groups(graph):
        odd = [name for name in group if len(lines[name]) % 2]
        start = next((name for name in group if len(lines[name]) >= 4), group[0])
        if odd:
            start = "\0"  # the extra point; no category is called that
            for name in odd:
                lines[start].append(len(ends))
                lines[name].append(len(ends))
                ends.append((start, name))
        for position, number in enumerate(_euler_tour(lines, ends, start)):
            if number < len(pairs):
                val[number] = position % 2 == 0
        lines.pop("\0", None)
    return val


def _euler_tour(lines: dict[str, list[int]], ends: Sequence[Pair], start: str) -> list[int]:
    """Numbers of all lines of a group in the order of a closed walk from ``start`` (Hierholzer)."""
    waiting = {name: list(reversed(numbers)) for name, numbers in lines.items()}
    used: set[int] = set()
    tour: list[int] = []
    stack: list[tuple[str, int]] = [(start, -1)]
    while stack:
        here, came_by = stack[-1]
        while waiting[here] and waiting[here][-1] in used:
            waiting[here].pop()
        if not waiting[here]:
            stack.pop()
            if came_by >= 0:
                tour.append(came_by)
            continue
        number = waiting[here].pop()
        used.add(number)
        a, b = ends[number]
        stack.append((b if here == a else a, number))
    return tour


class _Sides:
    """The state of steps 3 and 4: which pairs are in val, and how often each category is on each side."""

    def __init__(
        self, pairs: Sequence[Pair], sizes: NDArray[np.int64], val: NDArray[np.bool_], goal: int
    ) -> None:
        self.pairs, self.sizes, self.val = pairs, sizes, val
        self.covers: dict[bool, dict[str, int]] = {True: defaultdict(int), False: defaultdict(int)}
        for pair, side in zip(pairs, val.tolist(), strict=True):
            for name in pair:
                self.covers[side][name] += 1
        self.gap = int(sizes[val].sum()) - goal  # images that val has too many

    def settle(self) -> None:
        """Steps 3 and 4."""
        while self._move() or self._swap():
            pass

    def _flip(self, number: int) -> None:
        side = bool(self.val[number])
        for name in self.pairs[number]:
            self.covers[side][name] -= 1
            self.covers[not side][name] += 1
        self.val[number] = not side
        self.gap += int(self.sizes[number]) * (-1 if side else 1)

    def _may_leave(self, number: int) -> bool:
        side = bool(self.val[number])
        return all(self.covers[side][name] > 1 for name in self.pairs[number])

    def _move(self) -> bool:
        """One walk over all pairs; whether something changed."""
        changed = False
        for number, size in enumerate(self.sizes.tolist()):
            new = self.gap - size if self.val[number] else self.gap + size
            if abs(new) < abs(self.gap) and self._may_leave(number):
                self._flip(number)
                changed = True
        return changed

    def _swap(self) -> bool:
        """The best exchange of two pairs; whether there was one."""
        if self.gap == 0:
            return False
        inside, outside = np.flatnonzero(self.val), np.flatnonzero(~self.val)
        gaps = np.abs(self.gap + self.sizes[outside][None, :] - self.sizes[inside][:, None]).ravel()
        candidates = np.flatnonzero(gaps < abs(self.gap))
        for flat in candidates[np.argsort(gaps[candidates], kind="stable")].tolist():
            leaving, entering = divmod(flat, len(outside))
            if self._exchange(int(inside[leaving]), int(outside[entering])):
                return True
        return False

    def _exchange(self, leaving: int, entering: int) -> bool:
        """Exchange two pairs if every category stays covered."""
        self._flip(leaving)
        self._flip(entering)
        names = {*self.pairs[leaving], *self.pairs[entering]}
        if all(self.covers[side][name] > 0 for side in (True, False) for name in names):
            return True
        self._flip(leaving)
        self._flip(entering)
        return False

    def balance(self, share: float) -> None:
        """Step 5."""
        if not self.pairs:
            return
        names = sorted({name for pair in self.pairs for name in pair})
        column = {name: i for i, name in enumerate(names)}
        member = np.zeros((len(self.pairs), len(names)))  # images of a pair, in the columns of its two
        for number, (a, b) in enumerate(self.pairs):
            member[number, [column[a], column[b]]] = self.sizes[number]
        total = member.sum(axis=0)
        weighted = member / total
        alone = (member * weighted).sum(axis=1)  # [pairs], the square term of one pair that moves
        most = max(abs(self.gap), int(self.sizes.sum()) // 200)
        while True:
            excess = member[self.val].sum(axis=0) - share * total
            slope = 2 * weighted @ excess
            inside, outside = np.flatnonzero(self.val), np.flatnonzero(~self.val)
            if not len(inside) or not len(outside):
                return
            change = (alone - slope)[inside][:, None] + (alone + slope)[outside][None, :]
            change -= 2 * member[inside] @ weighted[outside].T
            gaps = np.abs(self.gap + self.sizes[outside][None, :] - self.sizes[inside][:, None])
            change[gaps > most] = np.inf
            while (number := int(change.argmin())) >= 0 and change.flat[number] < -1e-9:
                if self._exchange(int(inside[number // len(outside)]), int(outside[number % len(outside)])):
                    break
                change.flat[number] = np.inf
            else:
                return
