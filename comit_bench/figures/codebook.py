"""Figure ``codebook``: entropy per position, how often each id is used, what pairs of positions repeat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import binom

from comit_bench.errors import UnsupportedOperation
from comit_bench.figures.about import NOTHING, About, describe
from comit_bench.figures.inputs import Images, encode
from comit_bench.figures.style import (
    BLACK,
    BLUE,
    FULL,
    SEQUENTIAL,
    SMALL,
    VERMILION,
    literal,
    new_figure,
    styled,
)
from comit_bench.recipes.kinds import CodebookSpec
from comit_bench.tasks.codebook import CodebookUse, count_use, even_entropy, even_unused, excess_information
from comit_bench.tokenizers.base import Tokenizer

POSITIONS = 24  # most positions of the matrix


@dataclass(frozen=True, slots=True, eq=False)
class CodebookFigure:
    """What a set of messages shows of a codebook.

    Attributes:
        tokenizer: Its name.
        use: What was counted.
        positions: int64 [M], the positions of the matrix.
        shared: float64 [M, M], excess mutual information in percent of its room; NaN on the diagonal and
            where the images are too few to say.
        about: Words around the figure.
    """

    tokenizer: str
    use: CodebookUse
    positions: NDArray[np.int64]
    shared: NDArray[np.float64]
    about: About = NOTHING


def compute(
    tokenizer: Tokenizer,
    inputs: Images,
    *,
    positions: int = POSITIONS,
    policy: str | None = None,
    seed: int = 0,
) -> CodebookFigure:
    """Count the ids of all images; the matrix has at most ``positions``, evenly spaced."""
    vocab = tokenizer.info.vocab_size
    if vocab is None:
        raise UnsupportedOperation(
            f"{tokenizer.info.name} has continuous codes, so there is no codebook to show"
        )
    found = encode(tokenizer, inputs, policy=policy, seed=seed).ids
    assert found is not None
    ids = found.numpy().astype(np.int64)
    spec = CodebookSpec(seed=seed)
    length = ids.shape[1]
    places = np.unique(np.linspace(0, length - 1, min(positions, length)).round().astype(np.int64))
    first, second = np.triu_indices(len(places), k=1)
    pairs = np.stack([places[first], places[second]], axis=1)
    told = excess_information(ids, pairs, shuffles=spec.shuffles, seed=seed)
    share = np.where(told.determined, 100 * told.excess / np.where(told.determined, told.room, 1.0), np.nan)
    shared = np.full((len(places), len(places)), np.nan)
    shared[first, second] = shared[second, first] = share
    said = describe(tokenizer, inputs, policy=policy).plus(
        "shared information: beyond what shuffled positions share, so that 0 is the null"
    )
    return CodebookFigure(tokenizer.info.name, count_use(ids, vocab, spec), places, shared, said)


@styled
def draw(data: CodebookFigure) -> Figure:
    """Three panels: entropy by position, use by rank, and the matrix of pairs."""
    figure = new_figure(FULL, 2.0, layout="constrained")
    left, middle, right = figure.subplots(1, 3, gridspec_kw={"width_ratios": (1.15, 1, 1)})
    _entropy(left, data.use)
    _ranks(middle, data.use)
    _matrix(figure, right, data)
    use = data.use
    even = 2.0 ** even_entropy(use.draws, use.vocab)
    name = literal(data.about.label(data.tokenizer))
    figure.suptitle(
        f"{name}: {use.images} messages of {len(use.entropy)} ids out of "
        f"{use.vocab}, perplexity {use.perplexity:.0f} (even use {even:.0f}), unused "
        f"{100 * use.unused:.1f} % (even use {100 * even_unused(use.draws, use.vocab):.1f} %)",
        fontsize=SMALL,
    )
    return figure


def _entropy(axes: Axes, use: CodebookUse) -> None:
    positions = np.arange(1, len(use.entropy) + 1)
    axes.bar(positions, use.entropy, width=0.8 if len(positions) <= 64 else 1.0, color=BLUE)
    even = even_entropy(use.images, use.vocab)
    axes.axhline(even, color=BLACK, linestyle=(0, (4, 2)), linewidth=0.9)
    axes.text(
        positions[-1] + 0.5, even, "even use", ha="right", va="bottom", fontsize=SMALL - 0.5, color=BLACK
    )
    axes.set(
        xlabel="position", ylabel="entropy (bits)", ylim=(0, 1.14 * even), xlim=(0.3, positions[-1] + 0.7)
    )


def _ranks(axes: Axes, use: CodebookUse) -> None:
    ranked = np.sort(use.counts)[::-1]
    ranks = np.arange(1, use.vocab + 1)
    even = binom.ppf(1 - (ranks - 0.5) / use.vocab, use.draws, 1 / use.vocab)
    used = ranked > 0
    axes.plot(ranks[used], ranked[used], color=BLUE, label="ids")
    axes.plot(
        ranks[even > 0], even[even > 0], color=BLACK, linestyle=(0, (4, 2)), linewidth=0.9, label="even use"
    )
    axes.set(xscale="log", yscale="log", xlabel="rank of the id", ylabel="occurrences")
    if not used.all():
        last = int(used.sum())
        axes.plot([last], [ranked[last - 1]], marker="o", color=VERMILION)
        axes.annotate(
            f"{use.vocab - last} unused", (last, ranked[last - 1]), xytext=(-4, 3),
            textcoords="offset points", ha="right", fontsize=SMALL - 0.5, color=VERMILION,
        )  # fmt: skip
    axes.legend(loc="lower left", handlelength=1.8)


def _matrix(figure: Figure, axes: Axes, data: CodebookFigure) -> None:
    known = data.shared[np.isfinite(data.shared)]
    top = max(float(known.max()), 1.0) if len(known) else 1.0
    picture = axes.imshow(data.shared, cmap=SEQUENTIAL, vmin=0, vmax=top)
    ticks = np.unique(
        np.linspace(0, len(data.positions) - 1, min(5, len(data.positions))).round().astype(int)
    )
    labels = [str(data.positions[tick] + 1) for tick in ticks]
    axes.set(xticks=ticks, yticks=ticks, xticklabels=labels, yticklabels=labels)
    axes.set(xlabel="position", ylabel="position")
    axes.spines[:].set_visible(True)
    below = "min" if len(known) and known.min() < 0 else "neither"  # negative ones have the colour of 0
    figure.colorbar(picture, ax=axes, label="shared information (%)", fraction=0.046, pad=0.03, extend=below)
