"""Replays one FlexTok parity case: VAE, encoder, ids, decoder and sampler, tensor by tensor.

What the implementation shortens is compared in both forms: all rows and all registers written out, and
the short form that the adapter uses. A case may leave tensors out of ``io``, and a case without VAE weights
starts from ``vae_latents`` and ends at ``latents_out``; a setting this file does not know is a failure.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from flextok_plain import plain_condition, plain_null
from parity import ParityCase, expect, fill_exactly
from torch import Tensor

from comit_bench.tokenizers.flextok.checkpoint import VAE, Checkpoint, load_directory, read_checkpoint
from comit_bench.tokenizers.flextok.codec import Sampling, encode_latents, sample
from comit_bench.tokenizers.flextok.model import FlexTok, TimeStates

FLOAT = 1e-4
SETTINGS = {"vae_arch", "timesteps", "guidance_scale", "perform_norm_guidance", "keep_k", "latent_size"}


class Case(ParityCase):
    """One FlexTok case; the ``fixture`` node of its config holds the sampling settings."""

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return read_checkpoint(self.folder)

    @property
    def has_vae(self) -> bool:
        return any(key.startswith(VAE) for key in self.checkpoint.tensors)

    def load(self) -> FlexTok:
        if self.has_vae:
            return load_directory(self.folder, offline=True)[0]
        spec = self.checkpoint.spec
        scale = self.checkpoint.vae.values["scaling_factor"]
        model = FlexTok(replace(spec, vae=replace(spec.vae, scale=scale)))
        fill_exactly(model, self.checkpoint.tensors, but="vae.")
        return model

    def ids(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {"ids": (encode_latents(self.model, self.io["vae_latents"]).ids, self.io["ids"])}

    @cached_property
    def fixture(self) -> dict[str, Any]:
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        settings: dict[str, Any] = config.get("config", config)["fixture"]
        assert settings.keys() <= SETTINGS, f"fixture: unknown settings {settings.keys() - SETTINGS}"
        return settings

    @property
    def keep(self) -> list[int]:
        if "keep_k" in self.io:
            return [int(k) for k in self.io["keep_k"]]
        return [self.model.spec.registers] * self.io["noise"].shape[0]

    def weight(self, step: int) -> float:
        """Guidance weight of a step: one number, or one per step from t = 1 down."""
        scale = self.fixture["guidance_scale"]
        if isinstance(scale, list):
            assert len(scale) == self.fixture["timesteps"], f"fixture: guidance_scale {scale}"
            return float(scale[step])
        assert isinstance(scale, int | float), f"fixture: guidance_scale {scale!r} is no number"
        return float(scale)

    @property
    def sampling(self) -> Sampling:
        count = int(self.fixture["timesteps"])
        varies = isinstance(self.fixture["guidance_scale"], list)
        return Sampling(
            steps=count,
            guidance=(lambda t: self.weight(round(count - t * count))) if varies else self.weight(0),
            projected=bool(self.fixture["perform_norm_guidance"]),
        )

    def inputs(self) -> set[str]:
        given = {"images", "posterior_noise", "noise", "keep_k"}
        return given if self.has_vae else given | {"vae_latents"}

    def checks(self) -> dict[str, Callable[[], list[str]]]:
        jobs = {
            "settings": self.settings,
            "encoder": self.encoder,
            "encoder-prefix": self.prefix,
            "conditions": self.conditions,
            "decoder-step0": self.first_step,
            "sampler": self.sampler,
            "sampler-plain": self.plain_sampler,
        }
        return {"vae": self.vae, **jobs, "images": self.images} if self.has_vae else jobs

    def see(self, name: str, got: Tensor, *, exact: bool = False) -> list[str]:
        """Compare with a recorded tensor, if it was recorded."""
        if name not in self.io:
            return []
        return [expect(name, got, self.io[name], tolerance=None if exact else FLOAT)]

    def settings(self) -> list[str]:
        """The fixture says the same as the tensors."""
        assert self.fixture.get("keep_k") in (None, self.keep)
        assert self.fixture.get("latent_size") in (None, list(self.io["noise"].shape[-2:]))
        return ["keep_k"]

    def vae(self) -> list[str]:
        images, noise = self.io["images"], self.io.get("posterior_noise")
        mean, logvar = self.model.vae.posterior(images)
        return [
            *self.see("vae_posterior_mean", mean),
            *self.see("vae_posterior_logvar", logvar),
            *self.see("vae_latents", self.model.vae.encode(images, noise)),
        ]

    def encoder(self) -> list[str]:
        encoder, count = self.model.encoder, self.model.spec.registers
        latents = self.io["vae_latents"]
        h = encoder.sequence(latents, count)
        whole = encoder.trunk(h, count, registers_only=False)
        prequant = encoder.head(whole[:, -count:])
        short = encode_latents(self.model, latents)
        padded = torch.zeros_like(short.ids)
        for row, k in enumerate(self.keep):
            padded[row, :k] = short.ids[row, :k]
        quantizer = self.model.regularizer
        return [
            *self.see("enc_seq_in", h),
            *self.see("enc_seq_out", whole),
            *self.see("prequant", prequant),
            *self.see("prequant", short.prequant),
            *self.see("ids", short.ids, exact=True),
            *self.see("codes", short.codes, exact=True),
            *self.see("codes", quantizer.codes(short.ids), exact=True),
            *self.see("codes_padded", quantizer.codes(padded), exact=True),
        ]

    def prefix(self) -> list[str]:
        """Encoding fewer registers gives the first of the recorded tokens."""
        latents, total = self.io["vae_latents"], self.model.spec.registers
        for k in sorted({1, 2, total // 2, total - 1, *(k for k in self.keep if k)}):
            done = encode_latents(self.model, latents, k)
            expect(f"ids[:, :{k}]", done.ids, self.io["ids"][:, :k])
            expect(f"prequant[:, :{k}]", done.prequant, self.io["prequant"][:, :k], tolerance=FLOAT)
        return ["ids", "prequant"]

    def _first(self) -> TimeStates:
        return self.model.decoder.time_states(torch.ones(1, device=self.device)).at(0)

    def conditions(self) -> list[str]:
        decoder, io = self.model.decoder, self.io
        batch = io["noise"].shape[0]
        given = plain_condition(decoder, io["codes_padded"], self.keep)
        return [
            *self.see("dec_temb_step0", decoder.time_vector(torch.ones(batch, device=self.device))),
            *self.see("dec_seq_in_step0", decoder.sequence(io["noise"], given)),
            *self.see("dec_seq_in_uncond_step0", decoder.sequence(io["noise"], plain_null(decoder))),
        ]

    def first_step(self) -> list[str]:
        decoder, io, state = self.model.decoder, self.io, self._first()
        plain = plain_condition(decoder, io["codes_padded"], self.keep)
        h = decoder.sequence(io["noise"], plain)
        seen = self.see("dec_seq_out_step0", decoder.trunk(h, plain, state, patches_only=False))
        short = decoder.condition(io["codes_padded"], self.keep)
        rows = decoder.trunk(decoder.sequence(io["noise"], short), short, state)
        if "dec_seq_out_step0" in io:
            want = io["dec_seq_out_step0"][:, : rows.shape[1]]
            expect("dec_seq_out_step0 patches", rows, want, tolerance=FLOAT)
        return seen

    def sampler(self) -> list[str]:
        """The loop as the adapter runs it, velocities included."""
        steps: list[tuple[Tensor, Tensor]] = []
        decoder, io = self.model.decoder, self.io

        def observe(step: int, x: Tensor, conditional: Tensor, unconditional: Tensor | None) -> None:
            if unconditional is None:  # unguided: recorded all the same, perhaps
                state = decoder.time_states(
                    torch.tensor([1 - step / self.sampling.steps], device=self.device)
                ).at(0)
                unconditional = decoder(x, decoder.null(), state)
            steps.append((conditional, unconditional))

        out = sample(
            decoder, io["codes_padded"], io["noise"], keep=self.keep, sampling=self.sampling, observe=observe
        )
        return [
            *self.see("velocity_cond", torch.stack([c for c, _ in steps])),
            *self.see("velocity_uncond", torch.stack([u for _, u in steps])),
            *self.see("latents_out", out),
        ]

    def plain_sampler(self) -> list[str]:
        """The same equations once more, written out: all tokens, one image at a time."""
        decoder, io, count = self.model.decoder, self.io, self.sampling.steps
        projected, guided = self.sampling.projected, self.sampling.guided
        rows = []
        for row, k in enumerate(self.keep):
            x, m = io["noise"][row : row + 1], torch.zeros((), device=self.device)
            given = plain_condition(decoder, io["codes_padded"][row : row + 1], [k])
            for i in range(count, 0, -1):
                state = decoder.time_states(torch.tensor([i / count], device=self.device))
                v, g = decoder(x, given, state), self.weight(count - i)
                if guided:
                    u = decoder(x, plain_null(decoder), state)
                    if projected:
                        m = (v - u) - 0.5 * m
                        d = (m * min(1.0, 2.5 / float(m.norm()))).double()
                        n = v.double() / max(float(v.double().norm()), 1e-12)
                        v = v + (g - 1) * (d - (d * n).sum() * n).float()
                    else:
                        v = u + g * (v - u)
                x = x - v / count
            rows.append(x)
        return self.see("latents_out", torch.cat(rows))

    def images(self) -> list[str]:
        return self.see("images_out", self.model.vae.decode(self.io["latents_out"]))
