"""COMiT's plain network behind the calls of the fast one, so that the codec can run on either."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from comit_bench.tokenizers.comit.codec import NoiseSource
from comit_bench.tokenizers.comit.fast import Condition, MessageProbe
from comit_bench.tokenizers.comit.model import MaskMode, Output, Predictor, attention_bias


class PlainPredictor:
    """``network=PlainPredictor(model.predictor)`` in :mod:`comit_bench.tokenizers.comit.codec`."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def condition(self, codes: Tensor, offset: Tensor) -> Condition:
        return Condition(codes, offset)

    def time_state(self, time: Tensor) -> Tensor:
        return time

    def state_at(self, time: float, device: torch.device) -> Tensor:
        return torch.full((1,), time, device=device)

    def call(self, latents: Tensor, given: Condition, time: Tensor, mode: MaskMode | None = None) -> Output:
        return self.predictor(latents, given.message, given.offset, time, mode)  # type: ignore[no-any-return]

    def message(self, latents: Tensor, given: Condition, time: Tensor) -> Tensor:
        return self.call(latents, given, time).message

    def velocity(
        self,
        latents: Tensor,
        given: Condition,
        time: Tensor,
        *,
        mask_mode: MaskMode | None = None,
        probe: MessageProbe | None = None,
    ) -> Tensor:
        out, spec = self.call(latents, given, time, mask_mode), self.predictor.spec
        if probe is not None:
            length = spec.message_length
            tokens = out.states[0].shape[1] - 1 - 2 * length
            bias = attention_bias(tokens, length, mask_mode or spec.mask_mode)
            for layer in sorted(probe.layers):
                maps = out.logits[layer]
                if probe.softmax:
                    maps = (maps + bias).softmax(dim=-1)
                probe.receive(layer, maps[:, :, 1 + tokens : 1 + tokens + length, 1 : 1 + tokens])
        return out.velocity

    def velocity_and_hidden(
        self, latents: Tensor, given: Condition, time: Tensor, layer: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, length = self.call(latents, given, time), self.predictor.spec.message_length
        state = out.states[layer]
        return out.velocity, (state[:, 1 : -2 * length], state[:, -2 * length : -length])


def noise_from_tensors(
    *, adaptive: Tensor | None = None, latent: Sequence[Tensor] | None = None
) -> NoiseSource:
    """Stored noise: ``adaptive`` [K, B, C, h, w]; ``latent[k]`` [B, C, h', w'] for crop k."""

    def draw(what: str, step: int, images: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        stored = adaptive if what == "adaptive" else latent
        assert stored is not None, f"{what} noise is needed but was not given"
        return stored[step][list(images)]

    return draw
