"""Figure ``edit``: swap tokens between two images and decode; what do positions of a message carry?

For every pair (A, B): A with a span of positions taken from B, for spans at several places, and A with its
first k positions taken from B, for k up to all. Everything else is A's: decoding offset and noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from comit_bench.errors import UsageError
from comit_bench.figures.about import NOTHING, About, describe
from comit_bench.figures.inputs import Images, decode, encode, noise_seeds, rows_of, together
from comit_bench.figures.style import gallery, styled
from comit_bench.tokenizers.base import Tokenizer, Tokens

PLACES = 4  # default number of spans; there are as many prefixes as spans
MOST = 8  # spans of a given length that fit beside each other; of more, so many are shown


@dataclass(frozen=True, slots=True, eq=False)
class Edits:
    """``n`` pairs of images with tokens swapped.

    Attributes:
        names: Ids of (A, B) [n].
        spans: Half-open ranges of positions (start, stop) that come from B [E]: the spans first, then the
            prefixes (0, k).
        prefixes: How many of ``spans``, at the end, are prefixes.
        images: uint8 [n, 2, 3, S, S], A and B.
        reconstructions: uint8 [n, 2, 3, S, S], both from A's noise.
        edited: uint8 [n, E, 3, S, S].
        way: float64 [n, E], how far an edited image is from A's reconstruction to B's: the share
            ``a / (a + b)`` of its root mean squared distances a to A's and b to B's; 0 is A, 1 is B.
        about: Words around the figure.
    """

    names: tuple[tuple[str, str], ...]
    spans: tuple[tuple[int, int], ...]
    prefixes: int
    images: NDArray[np.uint8]
    reconstructions: NDArray[np.uint8]
    edited: NDArray[np.uint8]
    way: NDArray[np.float64]
    about: About = NOTHING


def swap(into: Tokens, other: Tokens, start: int, stop: int) -> Tokens:
    """Messages of ``into`` with the positions ``start`` to ``stop`` (exclusive) of ``other``."""

    def mixed(mine: Tensor, its: Tensor) -> Tensor:
        result = mine.clone()
        result[:, start:stop] = its[:, start:stop]
        return result

    ids = None if into.ids is None or other.ids is None else mixed(into.ids, other.ids)
    return Tokens(ids, mixed(into.codes, other.codes), into.offsets)


def default_spans(length: int, places: int = PLACES) -> tuple[tuple[int, int], ...]:
    """Equal parts of a message of ``length`` positions, in order."""
    edges = np.linspace(0, length, min(places, length) + 1).round().astype(int).tolist()
    return tuple(pairwise(edges))


def compute(
    tokenizer: Tokenizer,
    inputs: Images,
    *,
    span: int | None = None,
    starts: Sequence[int] | None = None,
    policy: str | None = None,
    seed: int = 0,
) -> Edits:
    """Swap spans of tokens between neighbouring images (first and second, third and fourth, ...).

    Args:
        tokenizer: Must decode.
        inputs: An even number of images.
        span: Positions per span; None: a quarter of the message.
        starts: First positions of the spans; None: one span after the other, or eight spread evenly.
    """
    if len(inputs) < 2 or len(inputs) % 2:
        raise UsageError(f"swapping needs pairs of images, got {len(inputs)}: give an even number of them")
    tokens = encode(tokenizer, inputs, policy=policy, seed=seed)
    length = tokens.codes.shape[1]
    spans = _spans(length, span, starts)
    prefixes = tuple((0, stop) for _, stop in default_spans(length, len(spans)))
    a, b = (rows_of(tokens, slice(first, None, 2)) for first in (0, 1))
    seeds = noise_seeds(inputs.names[::2], seed)
    messages = [a, b, *(swap(a, b, start, stop) for start, stop in spans + prefixes)]
    decoded = decode(tokenizer, together(messages), seeds * len(messages))
    decoded = decoded.unflatten(0, (len(messages), -1)).transpose(0, 1)  # [n, 2 + E, 3, S, S]
    pair, edited = decoded[:, :2], decoded[:, 2:]
    return Edits(
        tuple(zip(inputs.names[::2], inputs.names[1::2], strict=True)),
        spans + prefixes,
        len(prefixes),
        inputs.images.unflatten(0, (-1, 2)).numpy(),
        pair.numpy(),
        edited.numpy(),
        _way(pair, edited),
        describe(tokenizer, inputs, policy=policy, decodes=True).plus(
            "below: positions that come from B, and how far the picture went from A's reconstruction (0 %) "
            "to B's (100 %)"
        ),
    )


def _spans(length: int, span: int | None, starts: Sequence[int] | None) -> tuple[tuple[int, int], ...]:
    if span is None and starts is None:
        return default_spans(length)
    size = span if span is not None else max(1, length // PLACES)
    chosen = list(starts) if starts is not None else list(range(0, length - size + 1, max(size, 1)))
    if starts is None and len(chosen) > MOST:
        chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, MOST).round().astype(int)]
    bad = [start for start in chosen if start < 0 or start + size > length]
    if size < 1 or bad or not chosen:
        raise UsageError(
            f"a span of {size} tokens at {bad or chosen or 'no place'} does not lie in a message of {length}"
        )
    return tuple((start, start + size) for start in chosen)


def _way(pair: Tensor, edited: Tensor) -> NDArray[np.float64]:
    """See :attr:`Edits.way`; NaN where both reconstructions are equal to the edited image."""
    ends = pair.double().flatten(2)  # [n, 2, D]
    points = edited.double().flatten(2)  # [n, E, D]
    to_a, to_b = ((points - ends[:, end : end + 1]).square().mean(dim=-1).sqrt().numpy() for end in (0, 1))
    with np.errstate(invalid="ignore"):
        way: NDArray[np.float64] = to_a / (to_a + to_b)
    return way


@styled
def draw(data: Edits) -> Figure:
    """Two rows per pair: A, its reconstruction and A with spans from B; B, its own and growing prefixes."""
    cut = len(data.spans) - data.prefixes
    columns = max(cut, data.prefixes)
    rows: list[list[Any]] = []
    captions: list[list[str] | None] = []
    for i in range(len(data.names)):
        for side, part in enumerate((range(cut), range(cut, len(data.spans)))):
            empty = columns - len(part)
            pictures = [data.edited[i, e] for e in part]
            rows.append([data.images[i, side], data.reconstructions[i, side], *pictures, *[None] * empty])
            texts = [_caption(data.spans[e], data.way[i, e]) for e in part]
            captions.append(["", "", *texts, *[""] * empty])
    figure, _ = gallery(
        rows,
        row_labels=["A, spans from B", "B, prefixes of B in A"] * len(data.names),
        column_labels=["original", "reconstruction", *[""] * columns],
        captions=captions,
        block=2,
    )
    return figure


def _caption(span: tuple[int, int], way: float) -> str:
    share = "" if np.isnan(way) else f": {100 * way:.0f} %"
    return f"{span[0] + 1}–{span[1]}{share}" if span[1] - span[0] > 1 else f"{span[1]}{share}"
