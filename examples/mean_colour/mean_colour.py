"""A third-party tokenizer in thirty lines: the mean colour of each of 4 x 4 cells, 8 levels per channel."""

import torch
from torch.nn import functional as F

from comit_bench.tokenizers.base import TokenizerInfo, Tokens, check_images


class MeanColour:
    def __init__(self, device):
        self.device = device
        self.info = TokenizerInfo(
            name="mean-colour", family="mean-colour", kind="baseline", weights="none", parameters=0,
            message_length=16, vocab_size=512, code_dim=3, resolution=32,
            preprocessing="resize_short(32,bicubic)|center_crop(32)", training_data="none",
        )  # fmt: skip

    def encode(self, images_u8, *, policy=None, generators=None):
        check_images(images_u8, self.info)
        cells = F.avg_pool2d(images_u8.to(self.device).float(), 8).flatten(2).transpose(1, 2)  # [B, 16, 3]
        ids = (cells // 32).long() @ torch.tensor([64, 8, 1], device=self.device)
        return Tokens(ids, self.codes_from_ids(ids))

    def codes_from_ids(self, ids):
        levels = torch.stack([ids // 64, ids // 8 % 8, ids % 8], dim=-1)
        return (levels.float() - 3.5) / 3.5

    def decode(self, tokens, *, seeds):
        cells = (tokens.codes * 3.5 + 3.5) * 32 + 16
        grid = cells.transpose(1, 2).unflatten(2, (4, 4))
        return F.interpolate(grid, scale_factor=8).round().clamp(0, 255).to(torch.uint8)


def load(name, *, weights=None, device="cpu", offline=False, seed=0, **options):
    return MeanColour(device)
