"""Replays one ALIT parity case: encoder, halting, decoder and pixels of every iteration."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from parity import ParityCase, expect, fill_exactly
from torch import Tensor

from comit_bench.nn.attention import AttentionRequest
from comit_bench.tokenizers.alit.adapter import load
from comit_bench.tokenizers.alit.base_model import Vae, Vqgan
from comit_bench.tokenizers.alit.config import spec_from_config, without_losses
from comit_bench.tokenizers.alit.model import Alit, Iteration, select_length
from comit_bench.tokenizers.checkpoints import on_meta, read_config, read_tensors

FLOAT, CODES, ATTENTION = 1e-4, 1e-5, 1e-5


class Case(ParityCase):
    """One ALIT case. Tensors are named ``<what>_t<iteration>``."""

    @cached_property
    def omitted(self) -> list[str]:
        """Prefixes of weights that a vendored case leaves out, with the tensors that need them."""
        omitted: list[str] = read_config(self.folder).get("omitted_weights", [])
        return omitted

    def load(self) -> Alit:
        config = read_config(self.folder)
        if not self.omitted:
            return load(str(self.folder), device=torch.device("cpu")).model
        spec = spec_from_config(config, self.folder / "config.json")
        tensors = without_losses(read_tensors(self.folder / "weights.safetensors"))
        model = on_meta(Alit, spec)
        for name, value in model.state_dict().items():
            if name.startswith(tuple(self.omitted)):
                assert name not in tensors, f"{name} is said to be left out"
                tensors[name] = torch.full(value.shape, float("nan"))  # whoever uses it is found out
        fill_exactly(model, tensors)
        return model

    def ids(self) -> dict[str, tuple[Tensor, Tensor]]:
        steps = enumerate(self.steps())
        return {
            n: (s.ids, self.io[n]) for t, s in steps if s.ids is not None and (n := f"ids_t{t}") in self.io
        }

    @property
    def count(self) -> int:
        return self.model.spec.iterations

    def inputs(self) -> set[str]:
        given = set() if self.has_encoder else {"base_latents"}
        return {"images", "vae_eps", *given, *(n for n in self.io if n.startswith("halt_uniform_t"))}

    def of(self, what: str) -> list[Tensor] | None:
        """``what_t0`` … of all iterations, or None when the case has none."""
        found = [self.io.get(f"{what}_t{t}") for t in range(self.count)]
        return [t for t in found if t is not None] or None

    def steps(self, iterations: int | None = None) -> list[Iteration]:
        with torch.no_grad():
            done = self.model.iterate(
                self.io["images"],
                iterations=iterations,
                noise=self.io.get("vae_eps"),
                uniforms=self.of("halt_uniform"),
                features=None if self.has_encoder else self.io["base_latents"],
            )
            return list(done)

    @property
    def has_encoder(self) -> bool:
        return not any(".encoder." in prefix for prefix in self.omitted)

    @cached_property
    def trace(self) -> list[Iteration]:
        return self.steps()

    def checks(self) -> dict[str, Callable[[], list[str]]]:
        jobs: dict[str, Callable[[], list[str]]] = {
            "base": self.base,
            "encoder": self.encoder,
            "shorter": self.shorter,
            "decoder": self.decoder,
        }
        if self.of("halt_uniform"):
            jobs["halting"] = self.halting
        if "l1_batch_mean" in self.io:
            jobs["pixels"] = self.pixels
        if self.of("attn"):
            jobs["attention"] = self.attention
        return jobs

    def base(self) -> list[str]:
        io, base, seen = self.io, self.model.base, []
        if isinstance(base, Vae):
            moments = base.moments(io["images"])
            seen.append(expect("vae_moments", moments, io["vae_moments"], tolerance=FLOAT))
        features = io["base_latents"]
        if self.has_encoder:
            features = base.encode(io["images"], io.get("vae_eps"))
            seen.append(expect("base_latents", features, io["base_latents"], tolerance=FLOAT))
        if isinstance(base, Vqgan):
            seen.append(expect("gt_indices", base.indices(features), io["gt_indices"]))
        return seen

    def _step(self, t: int, step: Iteration) -> list[str]:
        parts = {
            "encoder_in": (step.entered, FLOAT),
            "latents": (step.latents, FLOAT),
            "prequant": (step.prequant, FLOAT),
            "codes": (step.codes, CODES if self.model.quantize is not None else FLOAT),
            "ids": (step.ids, None),
        }
        return [
            expect(f"{k}_t{t}", value, self.io[f"{k}_t{t}"], tolerance=tolerance)
            for k, (value, tolerance) in parts.items()
            if f"{k}_t{t}" in self.io
        ]

    def encoder(self) -> list[str]:
        seen = [name for t, step in enumerate(self.trace) for name in self._step(t, step)]
        last = self.trace[-1]
        for name, value in (("codes", last.codes), ("ids", last.ids)):
            if name in self.io:
                seen.append(expect(name, value, self.io[name], tolerance=CODES if name == "codes" else None))
        return seen

    def shorter(self) -> list[str]:
        """Asking for fewer iterations gives the same rows, although their last block computes less."""
        for count in range(1, self.count):
            self._step(count - 1, self.steps(count)[-1])
        return ["images"]

    def halting(self) -> list[str]:
        uniforms, seen = self.of("halt_uniform"), []
        assert uniforms is not None and isinstance(self.model.base, Vqgan)
        for t, step in enumerate(self.trace):
            # the last iteration has no successor, so the encoder does not halt there; the recording does
            done = self.model.halt(step, self.io["gt_indices"], uniforms[t]) if t + 1 == self.count else step
            want = self.io[f"halt_prob_t{t}"]
            seen.append(expect(f"halt_prob_t{t}", done.halt_probability, want, tolerance=FLOAT))
            seen.append(expect(f"drop_mask_t{t}", done.dropped.to(want), self.io[f"drop_mask_t{t}"]))
            if f"logits_t{t}" in self.io:
                seen.append(expect(f"logits_t{t}", done.predicted, self.io[f"logits_t{t}"], tolerance=FLOAT))
        return seen

    def decoder(self) -> list[str]:
        seen = []
        for t, step in enumerate(self.trace):
            predicted = self.model.predict(step.codes)
            code = self.model.grid_code(predicted)
            for name, value in ((f"logits_t{t}", predicted), (f"decoded_code_t{t}", code)):
                if name in self.io:
                    seen.append(expect(name, value, self.io[name], tolerance=FLOAT))
        return seen

    def pixels(self) -> list[str]:
        io, seen = self.io, []
        for t, step in enumerate(self.trace):
            image = self.model.reconstruct(step.codes)
            seen.append(expect(f"recon_t{t}", image, io[f"recon_t{t}"], tolerance=FLOAT))
        want = io["l1_batch_mean"]
        chosen, errors = select_length(
            iter(self.trace), self.model.reconstruct, io["images"], threshold=-1.0, per_image=False
        )
        seen.append(expect("l1_batch_mean", torch.stack(errors)[:, 0], want, tolerance=FLOAT))
        assert chosen.tolist() == [int(want.argmin())] * len(chosen)
        return seen

    def attention(self) -> list[str]:
        seen = []
        for t, step in enumerate(self.trace):
            if f"attn_t{t}" in self.io:
                layers = range(self.model.spec.decoder_layers)
                found: dict[int, Tensor] = {}
                self.model.attention(
                    step.codes,
                    AttentionRequest(layers=tuple(layers)),
                    lambda n, _, m, found=found: found.update({n: m}),
                )
                stacked = torch.stack([found[layer] for layer in layers])
                maps = stacked.mean(dim=2).flatten(-2).transpose(-2, -1)
                seen.append(expect(f"attn_t{t}", maps, self.io[f"attn_t{t}"], tolerance=ATTENTION))
        return seen
