"""FlexTok's conditions with every masked position written out: the long form of what the decoder takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from comit_bench.tokenizers.flextok.model import Condition, Decoder


def plain_condition(decoder: Decoder, codes: Tensor, keep: Sequence[int] | None = None) -> Condition:
    """All K registers: the long form of ``Decoder.condition``."""
    counts = [codes.shape[1]] * codes.shape[0] if keep is None else list(keep)
    total = decoder.spec.registers
    r = decoder.registers(nn.functional.pad(codes, (0, 0, 0, total - codes.shape[1])))
    kept = torch.arange(total, device=codes.device) < torch.tensor(counts, device=codes.device).unsqueeze(1)
    return Condition(torch.where(kept[..., None], r, decoder.mask_token.to(r.dtype)))


def plain_null(decoder: Decoder) -> Condition:
    """K null tokens: the long form of ``Decoder.null``."""
    return Condition(decoder.null_token.expand(1, decoder.spec.registers, -1))
