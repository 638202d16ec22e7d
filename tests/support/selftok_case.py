"""Replays one SelfTok parity case: VAE, encoder, quantizer, schedule, decoder and pixels.

What the implementation shortens is compared in both forms: with all tokens and a mask, all rows of the last
block, and the short form that the adapter uses. A case may leave tensors out of ``io``; a vendored one may
leave the decoder's weights out (``omitted_weights``). A setting that this file does not know is a failure.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from parity import ParityCase, expect, fill_exactly
from torch import Tensor

from comit_bench.tokenizers.checkpoints import on_meta, read_config, read_tensors, weight_file
from comit_bench.tokenizers.selftok.checkpoint import OWN_VAE, find_vae, load_files
from comit_bench.tokenizers.selftok.codec import (
    decode_latents,
    encode,
    encode_latents,
    render,
    sample,
    time_grid,
    visible_counts,
)
from comit_bench.tokenizers.selftok.config import spec_from_config, used
from comit_bench.tokenizers.selftok.fast import FastSelftok
from comit_bench.tokenizers.selftok.model import Selftok

FLOAT = 2e-5
SETTINGS = {
    "kind", "image_size", "k", "stages", "k_per_stage", "in_channels", "encoder_hidden_size", "encoder",
    "quantizer", "decoder", "context_see_xt", "num_steps", "vae", "batch", "omitted_weights", "system",
}  # fmt: skip


class Case(ParityCase):
    """One SelfTok case."""

    @cached_property
    def config(self) -> dict[str, Any]:
        config = read_config(self.folder)
        assert config.keys() <= SETTINGS, f"unknown settings {config.keys() - SETTINGS}"
        return config

    @property
    def omitted(self) -> dict[str, list[int]]:
        """Weights that a vendored case leaves out, with their shapes."""
        found: dict[str, list[int]] = self.config.get("omitted_weights", {})
        return found

    @property
    def has_vae(self) -> bool:
        return (self.folder / OWN_VAE).is_file()

    def load(self) -> Selftok:
        vae = find_vae(self.config, self.folder, None, offline=True) if self.has_vae else None
        if not self.omitted:
            return load_files(weight_file(self.folder), self.config, self.folder / "config.json", vae)
        tensors = used(read_tensors(self.folder / "weights.safetensors"))
        for key, shape in self.omitted.items():
            assert key not in tensors, f"{key} is said to be left out"
            tensors[key] = torch.full(shape, float("nan"))  # whoever uses it is found out
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        spec = spec_from_config(self.config, shapes, self.folder, None if vae is None else vae[0])
        model = on_meta(Selftok, spec)
        fill_exactly(model, tensors, but="vae.")
        if vae is not None and model.vae is not None:
            fill_exactly(model.vae.vae, read_tensors(vae[1]))
        return model

    def ids(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {"ids": (encode_latents(self.model, self.io["latents"]).ids, self.io["ids"])}

    def inputs(self) -> set[str]:
        given = {"images", "noise"}
        return given if self.has_vae else given | {"latents"}

    def checks(self) -> dict[str, Callable[[], list[str]]]:
        jobs = {"sizes": self.sizes, "encoder": self.encoder, "quantizer": self.quantizer}
        if self.config["kind"] == "tokenizer":
            jobs["schedule"] = self.schedule
        if not self.omitted:
            jobs["decoder"] = self.sampler if self.config["kind"] == "tokenizer" else self.renderer
            jobs["decoder-plain"] = self.plain_decoder
        elif "pred_latents" in self.io:
            jobs["given-latents"] = lambda: ["pred_latents"]
        return {**jobs, "pixels": self.pixels} if self.has_vae else jobs

    def see(self, name: str, got: Tensor, *, exact: bool = False) -> list[str]:
        """Compare with a recorded tensor, if it was recorded."""
        if name not in self.io:
            return []
        return [expect(name, got, self.io[name], tolerance=None if exact else FLOAT)]

    def sizes(self) -> list[str]:
        """The config says the same as tensors and network."""
        spec, config = self.model.spec, self.config
        assert (spec.tokens, spec.vocab_size) == (config["k"], config["quantizer"]["codebook_size"])
        assert config.get("batch", len(self.io["latents"])) == len(self.io["latents"])
        return ["latents"]

    def encoder(self) -> list[str]:
        io, encoder = self.io, self.model.encoder
        state = FastSelftok(self.model).query_states[0]
        x, q = encoder.blocks[0](encoder.embed(io["latents"]), encoder.query_tokens, state)
        short = encode_latents(self.model, io["latents"])
        plain = encoder(io["latents"])
        return [
            *self.see("latent_tokens_block0", x),
            *self.see("query_block0", q),
            *self.see("query_last", short.queries),
            *self.see("query_last", plain),
            *self.see("z_proj", short.prequant),
            *self.see("ids", short.ids, exact=True),
            *self.see("codes", short.codes),
        ]

    def quantizer(self) -> list[str]:
        encoder, io = self.model.encoder, self.io
        ids = encoder.quantizer.ids(io["z_proj"])
        return [
            *self.see("z_proj", encoder.quantizer.project(io["query_last"])),
            *self.see("ids", ids, exact=True),
            *self.see("codes_raw", encoder.quantizer.rows(io["ids"])),
            *self.see("codes", encoder.codes(io["ids"])),
        ]

    @property
    def steps(self) -> int:
        return int(self.config["num_steps"])

    def schedule(self) -> list[str]:
        grid, schedule = time_grid(self.steps)[:-1], self.model.spec.schedule
        assert schedule is not None
        counts = torch.tensor(visible_counts(grid, schedule, self.model.spec.tokens))
        seen = self.see("k_visible", counts, exact=True)
        if "t" in self.io:
            recorded = visible_counts(self.io["t"], schedule, self.model.spec.tokens)
            assert recorded == counts.tolist(), "the recorded times give other counts"
        return [*seen, *self.see("t", grid)]

    def sampler(self) -> list[str]:
        """The loop as the adapter runs it, and single steps from the recorded x."""
        io, seen = self.io, []
        steps: dict[int, tuple[int, Tensor, Tensor]] = {}
        assert self.model.spec.schedule is not None

        def observe(step: int, visible: int, x: Tensor, velocity: Tensor) -> None:
            steps[step] = (visible, x, velocity)

        out = sample(
            self.model,
            io["codes"],
            io["noise"],
            schedule=self.model.spec.schedule,
            steps=self.steps,
            observe=observe,
        )
        for step, (visible, x, velocity) in steps.items():
            assert "k_visible" not in io or visible == int(io["k_visible"][step])
            seen += [*self.see(f"step{step}_x", x), *self.see(f"step{step}_v", velocity)]
        return [*seen, *self.see("pred_latents", out)]

    def renderer(self) -> list[str]:
        return self.see("pred_latents", render(self.model, self.io["codes"]))

    def plain_decoder(self) -> list[str]:
        """The plain equations: all tokens, a key mask, one time at a time."""
        io, decoder, seen = self.io, self.model.model, []
        if self.config["kind"] == "renderer":
            return self.see("pred_latents", decoder(None, io["codes"], torch.ones(1, device=self.device)))
        grid, schedule = time_grid(self.steps), self.model.spec.schedule
        assert schedule is not None
        counts = visible_counts(grid[:-1], schedule, self.model.spec.tokens)
        for step, visible in enumerate(counts):
            if f"step{step}_x" in io:
                time = grid[step : step + 1].to(self.device)
                velocity = decoder(io[f"step{step}_x"], io["codes"], time, visible)
                seen += self.see(f"step{step}_v", velocity)
        return seen

    def pixels(self) -> list[str]:
        io, seen = self.io, []
        vae = self.model.vae
        assert vae is not None
        if "images" in io:
            seen += self.see("latents", vae.encode(io["images"]))
            seen += self.see("ids", encode(self.model, io["images"]).ids, exact=True)
        if "pred_latents" in io:
            seen += self.see("recon", decode_latents(self.model, io["pred_latents"]))
        return seen
