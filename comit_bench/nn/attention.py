"""Message-to-image attention: what can be asked of a decoder, and how its maps are handed out.

A map says, for one head of one block, how strongly a token of the message and every place of the image
attend to each other while an image is decoded. Maps are streamed: a receiver gets those of one block as
soon as they are computed, so no more than one block's are in memory unless the receiver keeps them.

Shape legend: ``B`` batch, ``H`` heads, ``K`` message length, ``h w`` grid of image tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

# (position in request.layers, position in request.times, maps [B, H, K, h, w])
MapReceiver = Callable[[int, int, Tensor], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionRequest:
    """Attention maps wanted from one decoding.

    Attributes:
        layers: Zero-based blocks, all different.
        times: Flow times, all different. Each is read at the first evaluation with t >= time; two may fall
            on the same evaluation. A decoder of a single pass has no time: it answers the first entry only.
        path: ``hard`` runs every conditional evaluation with the hard mask, as the released COMiT does when
            it extracts maps; ``model`` leaves the model as it always runs. Other families have one path.
        softmax: Attention weights (softmax over *all* keys) instead of scaled logits before mask and
            softmax. Where image places are the queries (TiTok, ALIT) only weights can be compared between
            places, so those always come.
    """

    layers: tuple[int, ...]
    times: tuple[float, ...] = (0.5,)
    path: Literal["hard", "model"] = "hard"
    softmax: bool = False

    def check(self, depth: int) -> None:
        """Refuse a request that a decoder of ``depth`` blocks cannot answer."""
        if not self.layers or not all(0 <= layer < depth for layer in self.layers):
            raise ValueError(f"attention layers must be 0..{depth - 1}, got {list(self.layers)}")
        if not self.times:
            raise ValueError("attention needs at least one time")
        for what, values in (("layer", self.layers), ("time", self.times)):
            if len(set(values)) < len(values):
                raise ValueError(f"an attention {what} is asked for twice: {list(values)}")
