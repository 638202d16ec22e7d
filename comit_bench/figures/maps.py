"""Figure ``maps`` (paper Figure 6): where single tokens look while an image is decoded. Needs no masks.

Which of K tokens are shown is decided by their maps alone: those whose largest values lie closest together,
each overlapping the ones before it by less than half. Nothing is compared with objects, so nothing is
claimed about them; figure ``attention`` and the task kind ``objectness`` do that.

Shape legend: ``n`` images, ``T`` tokens shown, ``S`` side of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from comit_bench.errors import UsageError
from comit_bench.figures.about import NOTHING, About, describe
from comit_bench.figures.attention import LAYER, TIME, each_map, make_spec, tint
from comit_bench.figures.inputs import Images
from comit_bench.figures.style import gallery, styled
from comit_bench.metrics.overlap import binary
from comit_bench.tokenizers.base import Tokenizer

SHARE = 20  # percent of the pixels that are kept
MOST_OVERLAP = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Maps:
    """Some tokens of ``n`` images.

    Attributes:
        names: Ids of the images [n].
        layer: Zero-based block.
        time: Of the evaluation that was read; None for a decoder of one pass.
        share: Percent of the pixels that are kept.
        images: uint8 [n, 3, S, S].
        tokens: int64 [n, T], positions in the message; -1 where no further token overlaps little enough.
        binary: bool [n, T, S, S], the pixels that each keeps.
        about: Words around the figure.
    """

    names: tuple[str, ...]
    layer: int
    time: float | None
    share: int
    images: NDArray[np.uint8]
    tokens: NDArray[np.int64]
    binary: NDArray[np.bool_]
    about: About = NOTHING


def spread(kept: Tensor) -> Tensor:
    """Mean squared distance of the pixels of each map from their centre: bool [K, S, S] -> float64 [K]."""
    side = torch.arange(kept.shape[-1], dtype=torch.float64)
    weights = kept.double()
    count = weights.sum(dim=(1, 2)).clamp(min=1)
    found = torch.zeros(len(kept), dtype=torch.float64)
    for axis in (1, 2):
        along = weights.sum(dim=3 - axis)  # [K, S]
        mean = (along * side).sum(dim=1) / count
        found += (along * (side - mean[:, None]).square()).sum(dim=1) / count
    return found


def choose(kept: Tensor, count: int) -> list[int]:
    """Tokens with the most compact maps that overlap by less than half; ties by position.

    Args:
        kept: bool [K, S, S].
        count: At most so many.
    """
    order = torch.argsort(spread(kept), stable=True).tolist()
    chosen: list[int] = []
    for token in order:
        if len(chosen) == count:
            break
        others = kept[chosen]
        both = (others & kept[token]).sum(dim=(1, 2)).double()
        either = (others | kept[token]).sum(dim=(1, 2)).clamp(min=1).double()
        if not chosen or float((both / either).max()) < MOST_OVERLAP:
            chosen.append(token)
    return chosen


def compute(
    tokenizer: Tokenizer,
    inputs: Images,
    *,
    tokens: int = 6,
    layer: int | float = LAYER,
    time: float = TIME,
    policy: str | None = None,
    seed: int = 0,
) -> Maps:
    """Choose tokens of every image and find the pixels they look at.

    Args:
        tokenizer: One with attention maps.
        inputs: Any images.
        tokens: How many of each image.
        layer: Zero-based block, negative from the end, or a relative depth in (0, 1).
        time: Flow time in [0, 1).
    """
    if tokens < 1:
        raise UsageError(f"--tokens {tokens}: at least one token is needed")
    spec = make_spec(layers=(layer,), times=(time,), shares=(SHARE,))
    request, read_at, found = each_map(tokenizer, inputs, spec, policy, seed)
    side = inputs.images.shape[-1]
    shown = np.full((len(inputs), tokens), -1, dtype=np.int64)
    pixels = np.zeros((len(inputs), tokens, side, side), dtype=np.bool_)
    for number, maps in enumerate(found[0, 0]):
        kept = binary(maps, side, SHARE, resize=spec.resize)
        chosen = choose(kept, tokens)
        shown[number, : len(chosen)] = chosen
        pixels[number, : len(chosen)] = kept[chosen].numpy()
    said = describe(tokenizer, inputs, policy=policy, decodes=True).plus(
        f"the {SHARE} % of the pixels with the largest attention (mean over heads) of the tokens of which "
        "these lie closest together, each overlapping those before it by less than half; no masks were used"
    )
    return Maps(
        inputs.names,
        request.layers[0],
        read_at[0] if read_at else None,
        SHARE,
        inputs.images.numpy(),
        shown,
        pixels,
        said,
    )


@styled
def draw(data: Maps) -> Figure:
    """A row per image: the image, then the pixels of each token, its position below."""
    rows, captions = [], []
    for image, tokens, kept in zip(data.images, data.tokens, data.binary, strict=True):
        here = [token >= 0 for token in tokens]
        rows.append([image, *(tint(image, own) if ok else None for own, ok in zip(kept, here, strict=True))])
        captions.append(
            ["", *(f"token {token}" if ok else "" for token, ok in zip(tokens, here, strict=True))]
        )
    when = "" if data.time is None else f", t = {data.time:.2g}"
    heads = ["image", f"layer {data.layer}{when}", *[""] * (data.tokens.shape[1] - 1)]
    figure, _ = gallery(rows, column_labels=heads, captions=captions, most_cell=0.92)
    return figure
