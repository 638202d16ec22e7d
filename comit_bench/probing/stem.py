"""``cnn``: a small convolutional network that a probe learns in front of its own input layer.

A tokenizer whose tokens are patches of pixels asks for it by ``TokenizerInfo.stem``; the reference row
``supervised-cnn`` does. Stem and probe are one network, trained from scratch with the labels of the task:
heads, losses, early stopping and seeds are those of every other row.

    patches [B, K, d] -> image [B, 3, S, S] -> n x (convolution, group norm, ReLU) -> [B, K', c]

What is unusual: norms over groups of channels, not over the batch, so that no answer depends on the other
images of a batch or chunk. Convolutions of stride 2 follow the first one until the map has at most 4 x 4
places: one for 32 px, two for 64 px. With 2 x 2 places relations of the embedded scenes were not learned.

Shape legend: ``B`` batch, ``K`` patches in raster order, ``S`` image side, ``d`` = 3 x patch x patch,
``K'`` places of the last map, ``c`` its channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.tokenizers.pixels import from_patches, patch_sides

VERSION = "1"  # raised when scores may change; part of the protocol of rows that have a stem
FIRST = 4  # stride of the first convolution, 7 x 7; all others are 3 x 3 of stride 2
PLACES = 4  # of the last map, per side, at most
CHANNELS = 32  # of the first map; every next one has as many more, up to LARGEST
LARGEST = 96
GROUP = 8  # channels of one group of a norm


class ConvStem(nn.Module):
    """Patches of an image to the places of a feature map.

    Args:
        message_length: K, a square number.
        code_dim: d, three times a square number.

    Attributes:
        message_length: K'.
        code_dim: c.

    Raises:
        UsageError: Tokens of this number and length are no patches of a square image.
    """

    def __init__(self, message_length: int, code_dim: int) -> None:
        super().__init__()
        grid, self.patch = patch_sides(message_length, code_dim, "probe")
        side, count = -(-grid * self.patch // FIRST), CHANNELS
        self.convolutions = nn.ModuleList([nn.Conv2d(3, count, 7, FIRST, padding=3, bias=False)])
        self.norms = nn.ModuleList([nn.GroupNorm(count // GROUP, count)])
        while side > PLACES:
            before, count = count, min(count + CHANNELS, LARGEST)
            self.convolutions.append(nn.Conv2d(before, count, 3, 2, padding=1, bias=False))
            self.norms.append(nn.GroupNorm(count // GROUP, count))
            side = -(-side // 2)
        self.message_length, self.code_dim = side * side, count

    def forward(self, codes: Tensor) -> Tensor:
        """Map [B, K, d] to [B, K', c]."""
        x = from_patches(codes, self.patch).contiguous(memory_format=torch.channels_last)
        for convolve, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolve(x)))
        return x.flatten(2).transpose(1, 2)
