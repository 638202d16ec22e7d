"""Replays one TiTok parity case: every tensor of ``io.safetensors``, through the adapter's own loader."""

from __future__ import annotations

from collections.abc import Callable

import torch
from parity import ParityCase, expect
from torch import Tensor, nn

from comit_bench.nn.vit import run_blocks
from comit_bench.tokenizers.titok.adapter import load
from comit_bench.tokenizers.titok.model import Titok

FLOAT = 1e-4


class Case(ParityCase):
    """Encoder, quantizer, decoder and pixels of one checkpoint; nothing in TiTok is random."""

    def load(self) -> Titok:
        return load(str(self.folder), device=torch.device("cpu")).model

    def ids(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {"ids": (self.model.encode(self.io["images"])[0], self.io["ids"])}

    def inputs(self) -> set[str]:
        return {"images", "ids_random"}

    def checks(self) -> dict[str, Callable[[], list[str]]]:
        return {
            "encoder": self.encoder,
            "quantizer": self.quantizer,
            "decoder": self.decoder,
            "random_ids": self.random_ids,
        }

    def close(self, name: str, got: Tensor | None) -> str:
        return expect(name, got, self.io[name], tolerance=FLOAT)

    def caught(self, modules: dict[str, nn.Module], run: Callable[[], object]) -> dict[str, Tensor]:
        """Outputs of some modules during one call."""
        seen: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out))
            for name, module in modules.items()
        ]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def encoder(self) -> list[str]:
        encoder, images = self.model.encoder, self.io["images"]
        seen = self.caught(
            {
                "enc_after_ln_pre": encoder.ln_pre,
                "enc_block0": encoder.transformer[0],
                "enc_latents_ln_post": encoder.ln_post,
            },
            lambda: self.model.vectors(images),
        )
        every_row = run_blocks(encoder.transformer, encoder.sequence(images, self.model.latent_tokens))
        return [
            *(self.close(name, value) for name, value in seen.items()),
            self.close("enc_after_blocks", every_row),
            self.close("z_e", self.model.vectors(images).transpose(1, 2).unsqueeze(2)),
        ]

    def quantizer(self) -> list[str]:
        io = self.io
        ids, codes = self.model.encode(io["images"])
        columns = codes.transpose(1, 2).unsqueeze(2)
        return [
            expect("ids", ids, io["ids"]),
            self.close("codes", codes),
            self.close("z_q_from_encode", columns),
        ]

    def decoder(self) -> list[str]:
        model, io = self.model, self.io
        watched: dict[str, nn.Module] = {"dec_after_ln_pre": model.decoder.ln_pre}
        if model.pixel_decoder is not None and model.pixel_quantize is not None:
            watched |= {
                "dec_logits": model.decoder.ffn,
                "pixel_latent": model.pixel_quantize,
                "pixel_after_mid": model.pixel_decoder.mid[-1],
                "pixel_after_first_up": model.pixel_decoder.up[-1],
            }
        watched["dec_patches_ln_post"] = model.decoder.ln_post
        seen = self.caught(watched, lambda: model.decode(io["codes"]))
        again = model.decode(model.encode(io["images"])[1])
        return [
            *(self.close(name, value) for name, value in seen.items()),
            self.close("recon", model.decode(io["codes"])),
            self.close("recon", again),
        ]

    def random_ids(self) -> list[str]:
        model, io = self.model, self.io
        codes = model.quantize.codes(io["ids_random"])
        assert torch.equal(model.quantize.ids(codes), io["ids_random"])
        return [
            self.close("codes_random", codes),
            self.close("recon_from_ids_random", model.decode(codes)),
        ]
