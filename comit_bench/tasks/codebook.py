"""Codebook use: how much of its vocabulary a tokenizer uses, and how much its positions repeat each other.

Everything is counted over the whole report split; nothing is fitted. Definitions, with ``n`` messages of
``K`` ids out of ``V``, and ``c`` the counts of ids:

* ``entropy``: bits per position, ``-sum p log2 p`` of the ids at one position, mean over the positions.
* ``perplexity``: ``2 ** H`` of all n K ids together.
* ``unused``: percent of the V ids that never occur.
* ``mutual_information``: percent; how far the ids at two positions tell about each other, see
  :func:`excess_information`.

Counting n things can show no more than log2 n bits, so entropies of large vocabularies are too small.
The chance level beside the first three is what ids drawn evenly and independently would give with these
n, K and V, exactly; a tokenizer is compared with that, not with log2 V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comit_bench.recipes.kinds import CodebookSpec
from comit_bench.recipes.specs import TaskSpec
from comit_bench.results.schema import Metric
from comit_bench.seeding import seed_for
from comit_bench.tasks.base import Inputs, Task, check_main_metric
from comit_bench.tasks.result import Result
from comit_bench.tokenizers.base import Tokenizer

Ids = NDArray[np.int64]
METRICS = ("perplexity", "entropy", "unused", "mutual_information")
LEAST_ROOM = 1e-3  # bits; a pair of positions with less room says nothing about dependence
RANKS = 40  # points of the rank-frequency curve in the details


def entropy_bits(counts: NDArray[np.int64]) -> float:
    """Entropy of counted things, in bits; zeros do not matter."""
    used = np.asarray(counts, dtype=np.float64).ravel()
    used = used[used > 0]
    total = used.sum()
    return max(0.0, float(np.log2(total) - (used * np.log2(used)).sum() / total)) if len(used) else 0.0


def even_entropy(draws: int, vocab: int) -> float:
    """Expected entropy in bits of the counts of ``draws`` even, independent draws out of ``vocab``.

    ``log2 m - V / m E[c log2 c]`` with c binomial (m, 1 / V), summed over all c that matter.
    """
    from scipy.stats import binom

    if vocab == 1:
        return 0.0
    mean = draws / vocab
    most = int(min(draws, mean + 12 * np.sqrt(mean + 1) + 30))
    least = int(max(2, mean - 12 * np.sqrt(mean + 1) - 30))  # 0 and 1 add nothing
    c = np.arange(least, most + 1, dtype=np.float64)
    expected = float((binom.pmf(c, draws, 1 / vocab) * c * np.log2(c)).sum()) if len(c) else 0.0
    return float(np.log2(draws)) - vocab / draws * expected


def even_unused(draws: int, vocab: int) -> float:
    """Expected share of a vocabulary that even, independent draws leave out."""
    return float((1 - 1 / vocab) ** draws)


@dataclass(frozen=True, slots=True, eq=False)
class PairInformation:
    """What the ids at pairs of positions tell about each other, in bits.

    Attributes:
        pairs: int64 [P, 2], positions, the first before the second.
        plain: float64 [P], mutual information of the counts.
        null: float64 [P], its mean after shuffling one position over the images.
        null_std: float64 [P], the standard deviation of one shuffle.
        room: float64 [P], ``min(H1, H2) - null``: the most that ``plain - null`` can be.
    """

    pairs: Ids
    plain: NDArray[np.float64]
    null: NDArray[np.float64]
    null_std: NDArray[np.float64]
    room: NDArray[np.float64]

    @property
    def excess(self) -> NDArray[np.float64]:
        """Mutual information beyond the null, [P]."""
        excess: NDArray[np.float64] = self.plain - self.null
        return excess

    @property
    def determined(self) -> NDArray[np.bool_]:
        """Pairs about which this many images can say anything, [P]."""
        determined: NDArray[np.bool_] = self.room > LEAST_ROOM
        return determined

    def share(self) -> float:
        """Sum of the excess over the sum of the room, of the determined pairs; 0 when there is none."""
        chosen = self.determined
        return float(self.excess[chosen].sum() / self.room[chosen].sum()) if chosen.any() else 0.0

    def share_std(self) -> float:
        """Standard deviation of :meth:`share` where positions are independent."""
        chosen = self.determined
        spread = float(np.sqrt((self.null_std[chosen] ** 2).sum()))
        return spread / float(self.room[chosen].sum()) if chosen.any() else 0.0


def sample_pairs(length: int, count: int, seed: int) -> Ids:
    """Different pairs of positions, sorted, int64 [<= count, 2]: all of them when there are not more."""
    every = length * (length - 1) // 2
    first, second = np.triu_indices(length, k=1)
    if every > count:
        chosen = np.sort(np.random.default_rng(seed_for(seed, "codebook/pairs")).permutation(every)[:count])
        first, second = first[chosen], second[chosen]
    return np.stack([first, second], axis=1).astype(np.int64)


def _joint_entropy(one: Ids, other: Ids, width: int) -> float:
    return entropy_bits(np.unique(one * width + other, return_counts=True)[1])


def excess_information(ids: Ids, pairs: Ids, *, shuffles: int, seed: int) -> PairInformation:
    """Mutual information of pairs of positions against that of shuffled ones.

    Counted on n messages, the mutual information of independent ids is far from zero: with V as large as n
    nearly every pair of ids occurs once, and the plain number is about ``H1 + H2 - log2 n``. So one of the
    two columns is shuffled over the images, which keeps both entropies and removes every dependence; the
    mean of ``shuffles`` such numbers is taken off. What is left is divided by the most it could be. The
    result is 0 in the mean for independent positions and 1 for positions that determine each other, for any
    n and V; where all ids differ there is no room, and the pair cannot be judged.

    Args:
        ids: int64 [n, K].
        pairs: int64 [P, 2], positions.
        shuffles: At least 2.
        seed: Of the shuffles; the same for every tokenizer.
    """
    compact = np.stack([np.unique(column, return_inverse=True)[1] for column in ids.T], axis=1)
    entropies = [entropy_bits(np.bincount(column)) for column in compact.T]
    rng = np.random.default_rng(seed_for(seed, "codebook/shuffles"))
    orders = [rng.permutation(len(ids)) for _ in range(shuffles)]
    rows = []
    for a, b in pairs.tolist():
        one, other = compact[:, a], compact[:, b]
        width, both = int(other.max()) + 1, entropies[a] + entropies[b]
        null = both - np.array([_joint_entropy(one, other[order], width) for order in orders])
        mean = float(null.mean())
        room = min(entropies[a], entropies[b]) - mean
        rows.append((both - _joint_entropy(one, other, width), mean, float(null.std(ddof=1)), room))
    columns = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return PairInformation(pairs, *columns)


@dataclass(frozen=True, slots=True, eq=False)
class CodebookUse:
    """All that is counted about a split's messages.

    Attributes:
        images: n.
        vocab: V.
        counts: int64 [V], how often each id occurs anywhere.
        entropy: float64 [K], bits per position.
        used: int64 [K], different ids per position.
        information: Pairs of positions.
    """

    images: int
    vocab: int
    counts: Ids
    entropy: NDArray[np.float64]
    used: Ids
    information: PairInformation

    @property
    def draws(self) -> int:
        """All ids there are, n K."""
        return self.images * len(self.entropy)

    @property
    def perplexity(self) -> float:
        """Of all ids together."""
        return float(2.0 ** entropy_bits(self.counts))

    @property
    def unused(self) -> float:
        """Share of the vocabulary."""
        return float((self.counts == 0).mean())

    @property
    def unused_of_possible(self) -> float:
        """Share of ``min(V, n K)``, the most that so many ids can use."""
        return 1.0 - int((self.counts > 0).sum()) / min(self.vocab, self.draws)


def count_use(ids: Ids, vocab: int, spec: CodebookSpec) -> CodebookUse:
    """Count the ids of a split.

    Args:
        ids: int64 [n, K] below ``vocab``, n at least 1.
        vocab: V.
        spec: How many pairs and shuffles.
    """
    columns = [np.unique(column, return_counts=True)[1] for column in ids.T]
    pairs = sample_pairs(ids.shape[1], spec.pairs, spec.seed)
    return CodebookUse(
        images=len(ids),
        vocab=vocab,
        counts=np.bincount(ids.ravel(), minlength=vocab).astype(np.int64),
        entropy=np.array([entropy_bits(column) for column in columns]),
        used=np.array([len(column) for column in columns], dtype=np.int64),
        information=excess_information(ids, pairs, shuffles=spec.shuffles, seed=spec.seed),
    )


def summary(use: CodebookUse, seeds: int = 1) -> Result:
    """Metrics and details of what was counted; none is a mean over images, and every seed has the same."""
    even = even_entropy(use.images, use.vocab)
    percent = 100.0 * even_unused(use.draws, use.vocab)
    pairs = use.information

    def counted(value: float, unit: str, chance: float, *, more: bool = True) -> Metric:
        return Metric.from_seeds(
            [value] * seeds, n=use.images, unit=unit, chance=chance, higher_is_better=more
        )

    metrics: dict[str, Metric] = {
        "perplexity": counted(use.perplexity, "", 2.0 ** even_entropy(use.draws, use.vocab)),
        "entropy": counted(float(use.entropy.mean()), "bits", even),
        "unused": counted(100 * use.unused, "%", percent, more=False),
        "mutual_information": counted(100 * pairs.share(), "%", 0.0, more=False),
    }
    ranked = np.sort(use.counts)[::-1]
    places = np.unique(np.geomspace(1, use.vocab, RANKS).round().astype(np.int64)) - 1
    details: dict[str, Any] = {
        "vocabulary": use.vocab,
        "messages": use.images,
        "used_ids": int((use.counts > 0).sum()),
        "unused_of_possible": 100 * use.unused_of_possible,
        "entropy_limit": float(np.log2(min(use.images, use.vocab))),
        "entropy_by_position": use.entropy.tolist(),
        "used_by_position": use.used.tolist(),
        "rank_frequency": {"rank": (places + 1).tolist(), "count": ranked[places].tolist()},
        "pairs": {
            "positions": pairs.pairs.tolist(),
            "bits": pairs.plain.tolist(),
            "null_bits": pairs.null.tolist(),
            "room_bits": pairs.room.tolist(),
            "determined": int(pairs.determined.sum()),
            "null_std": 100 * pairs.share_std(),
        },
    }
    return Result(metrics=metrics, details=details)


class Codebook(Task):
    """How ids are used."""

    def refuses(self, spec: TaskSpec, tokenizer: Tokenizer) -> str | None:
        """Continuous codes have no vocabulary."""
        if tokenizer.info.vocab_size is None:
            return "its codes are continuous, so there is no vocabulary whose use could be counted"
        return None

    def run(self, inputs: Inputs) -> Result | None:
        """Count; the first process does it alone."""
        check_main_metric(inputs.spec, dict.fromkeys(METRICS))
        if not inputs.ranks.first:
            return None
        role = inputs.roles["report"]
        inputs.check()
        assert role.store is not None and role.store.layout.vocab_size is not None
        ids = np.asarray(role.store.ids(role.rows), dtype=np.int64)
        use = count_use(ids, role.store.layout.vocab_size, inputs.spec.codebook)
        return summary(use, len(inputs.seeds))
