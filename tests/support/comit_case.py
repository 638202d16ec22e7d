"""Replays one COMiT parity case: every call in ``calls.json``, every tensor in ``io.safetensors``.

Each check returns the names of the tensors it compared; what nobody compared is a failure, and so is
a call or a tensor group this file does not know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from comit_plain import noise_from_tensors
from parity import ParityCase, expect
from torch import Tensor

from comit_bench.nn.attention import AttentionRequest
from comit_bench.nn.flow import Guidance
from comit_bench.tokenizers.comit.adapter import load
from comit_bench.tokenizers.comit.codec import (
    crop_latents,
    decode,
    encode,
    one_step_decode,
)
from comit_bench.tokenizers.comit.crops import CropPolicy
from comit_bench.tokenizers.comit.fast import FastPredictor
from comit_bench.tokenizers.comit.model import Comit

FLOAT, SAMPLED = 1e-4, 1e-4  # stricter than the case READMEs, which allow 2e-4 for sampled latents
INPUTS = {"images", "dec.noise", "adapt.noise", "vel.t", "vel.t_batch"}


class Case(ParityCase):
    """One COMiT case: ``calls.json`` says which calls of the original were recorded."""

    def load(self) -> Comit:
        return load(str(self.folder), device=torch.device("cpu"), offline=True).model

    def ids(self) -> dict[str, tuple[Tensor, Tensor]]:
        done = encode(self.model, self.images, CropPolicy(global_crop=True, num_crops=1))
        found = {"global": (done.ids, self.io["ids"])}
        for name, arguments in self.calls.get("enc", {}).items():
            done = encode(self.model, self.images, self._policy(name, arguments))
            found[name] = (done.ids, self.io[f"enc.{name}.ids"][:, -1])
        return found

    @cached_property
    def calls(self) -> dict[str, Any]:
        calls: dict[str, Any] = json.loads((self.folder / "calls.json").read_text(encoding="utf-8"))
        return calls

    @property
    def images(self) -> Tensor:
        return self.io["images"].float()

    def inputs(self) -> set[str]:
        return INPUTS

    def checks(self) -> dict[str, Callable[[], list[str]]]:
        """One named check per recorded call and per tensor group. Unknown names become failures."""
        jobs: dict[str, Callable[[], list[str]]] = {
            "basics": self.basics,
            "velocity": self.velocity,
        }
        for key, value in self.calls.items():
            if key == "enc":
                jobs |= {f"enc.{n}": lambda n=n, a=a: self.encode(n, a) for n, a in value.items()}
            elif key == "adapt":
                jobs |= {f"adapt.{n}": lambda n=n, a=a: self.adaptive(n, a) for n, a in value.items()}
            elif key == "dec":
                jobs["dec"] = lambda a=value: self.message(a)
            elif key == "detok":
                jobs |= {n: lambda n=n, a=a: self.detokenize(n, a) for n, a in value.items()}
            elif key.startswith("detok_default_pixels"):
                jobs[key] = lambda k=key, a=value: self.detokenize(k.replace("_", ".", 1), a)
            elif key == "attn":
                jobs["attn"] = lambda a=value: self.attention(a)
            else:
                jobs[key] = lambda k=key: self.unknown(k)
        if any(name.startswith("dbg.") for name in self.io):
            jobs["dbg"] = self.internals
        return jobs

    def unknown(self, key: str) -> list[str]:
        raise AssertionError(f"{self.folder}: calls.json records {key!r}, which this test does not know")

    def basics(self) -> list[str]:
        model, io = self.model, self.io
        batch, side = self.images.shape[0], self.images.shape[-1]
        grid = torch.arange(9)[:, None].expand(-1, batch)
        table = torch.cat([torch.full((1, batch), -1), grid])
        steps = crop_latents(model, self.images, table)
        latents = [next(iter(step.values()))[1] for step in steps]
        seen = [
            expect("prior.codes", model.prior(batch, self.device), io["prior.codes"]),
            expect("grid.locations", model.spec.geometry.locations(side), io["grid.locations"]),
            expect("latents.global", latents[0], io["latents.global"], tolerance=FLOAT),
            expect("latents.grid", torch.stack(latents[1:], 1), io["latents.grid"], tolerance=FLOAT),
        ]
        done = encode(model, self.images, CropPolicy(global_crop=True, num_crops=1))
        seen += [expect("ids", done.ids, io["ids"]), expect("codes", done.codes, io["codes"])]
        codes = io["codes"]
        assert torch.equal(model.quantizer.codes(model.quantizer.ids(codes)), codes)
        return seen

    def _trace(self, prefix: str, done: Any) -> list[str]:
        model, io = self.model, self.io
        codes = torch.stack([s.codes for s in done.steps], 1)
        parts = {
            "prequant": (torch.stack([s.prequant for s in done.steps], 1), FLOAT),
            "codes": (codes, None),
            "ids": (model.quantizer.ids(codes), None),
            "offsets": (torch.stack([s.offsets for s in done.steps], 1), None),
            "decode_offsets": (done.offset, None),
        }
        return [expect(f"{prefix}.{k}", v, io[f"{prefix}.{k}"], tolerance=t) for k, (v, t) in parts.items()]

    @staticmethod
    def _order(value: Any) -> Any:
        if not isinstance(value, list):
            return {"raster_scan": "raster", None: "raster"}.get(value, value)
        return tuple(tuple(row) if isinstance(row, list) else row for row in value)

    def encode(self, name: str, arguments: dict[str, Any]) -> list[str]:
        done = encode(self.model, self.images, self._policy(name, arguments))
        return self._trace(f"enc.{name}", done)

    def _policy(self, name: str, arguments: dict[str, Any]) -> CropPolicy:
        known = {"global_crop", "order", "num_crops"}
        assert set(arguments) <= known, f"enc.{name}: unknown arguments {set(arguments) - known}"
        return CropPolicy(
            order=self._order(arguments.get("order")),
            global_crop=arguments.get("global_crop", False),
            num_crops=arguments.get("num_crops"),
        )

    def adaptive(self, name: str, arguments: dict[str, Any]) -> list[str]:
        io, model, prefix = self.io, self.model, f"adapt.{name}"
        policy = CropPolicy(
            order="adaptive",
            global_crop=arguments["global_crop"],
            num_crops=arguments["num_crops"],
            shared=not arguments["per_image"],
        )
        noise = io["adapt.noise"].float()
        done = encode(model, self.images, policy, noise=noise_from_tensors(adaptive=noise.cpu()))
        first = int(arguments["global_crop"])
        cells = torch.stack([s.cells for s in done.steps], 1) + first
        scores = torch.stack([s.scores for s in done.steps[:-1]], 1)
        want = io[f"{prefix}.scores"]
        seen = [
            *self._trace(prefix, done),
            expect(f"{prefix}.crop_ids", cells, io[f"{prefix}.crop_ids"]),
            expect(f"{prefix}.scores", scores / want, torch.ones_like(want), tolerance=1e-4),
        ]
        if f"{prefix}.onestep" in io:
            # the released program also reconstructs after the last crop; ours does not need to
            location = torch.cumsum(torch.stack([s.offsets for s in done.steps]), 0)
            if not arguments["global_crop"]:
                location = location + model.spec.geometry.locations(self.images.shape[-1])[4].to(self.device)
            latents = [
                one_step_decode(model, step.codes, -place, noise[k])
                for k, (step, place) in enumerate(zip(done.steps, location, strict=True))
            ]
            seen.append(
                expect(f"{prefix}.onestep", torch.stack(latents, 1), io[f"{prefix}.onestep"], tolerance=FLOAT)
            )
        return seen

    def message(self, arguments: dict[str, Any]) -> list[str]:
        match = re.fullmatch(r"(\S+) \(last crop\)", arguments["msgs_from"])
        assert match and set(arguments) == {"msgs_from"}, f"dec: unknown arguments {arguments}"
        source = match[1]
        return [
            expect("dec.msgs", self.io[f"{source}.codes"][:, -1], self.io["dec.msgs"]),
            expect("dec.offsets", self.io[f"{source}.decode_offsets"], self.io["dec.offsets"]),
        ]

    def _at(self, t: Tensor) -> Tensor:
        t = t.view(-1, 1, 1, 1)
        return (1 - t) * self.io["dec.noise"] + t * self.io["latents.global"]

    def velocity(self) -> list[str]:
        """Both forms: the plain network and the one that computes only what is read."""
        io, predictor, network = self.io, self.model.predictor, FastPredictor(self.model.predictor)
        batch, msgs, offsets = self.images.shape[0], io["dec.msgs"], io["dec.offsets"]
        empty = self.model.prior(batch, self.device)[:1, :1]
        given, prior = network.condition(msgs, offsets), network.condition(empty, offsets)
        found: dict[str, list[Tensor]] = {"cond": [], "plain": [], "bounded_msg": [], "uncond": []}
        for t in io["vel.t"].tolist():
            state, times = network.state_at(t, self.device), torch.full((batch,), t, device=self.device)
            full = predictor(self._at(times), msgs, offsets, times[:1])
            found["plain"].append(full.velocity)
            found["bounded_msg"].append(self.model.quantizer.relaxed(full.message))
            found["uncond"].append(network.velocity(self._at(times), prior, state))
            found["cond"].append(network.velocity(self._at(times), given, state))
        seen = [
            expect(name, torch.stack(found[part], 1), io[name], tolerance=FLOAT)
            for part in found
            for name in [f"vel.{part.replace('plain', 'cond')}"]
        ]
        if "vel.cond_t_batch" in io:
            t = io["vel.t_batch"]
            for out in (
                network.velocity(self._at(t), given, network.time_state(t)),
                predictor(self._at(t), msgs, offsets, t).velocity,
            ):
                seen.append(expect("vel.cond_t_batch", out, io["vel.cond_t_batch"], tolerance=FLOAT))
        return seen

    def detokenize(self, name: str, arguments: dict[str, Any]) -> list[str]:
        known = {"num_steps", "odesolver", "cfg_weight", "apg_momentum", "decode", "stored"}
        assert set(arguments) <= known, f"{name}: unknown arguments {set(arguments) - known}"
        io = self.io
        out = decode(
            self.model,
            io["dec.msgs"],
            io["dec.offsets"],
            io["dec.noise"],
            steps=arguments["num_steps"],
            solver=arguments["odesolver"],
            guidance=Guidance(weight=arguments["cfg_weight"], momentum=arguments["apg_momentum"]),
        ).latents
        if arguments["decode"]:
            out = self.model.vae.decode(out)  # type: ignore[operator]
        if "stored" in arguments:
            match = re.fullmatch(r"\[:, :, ::(\d+), ::(\d+)\]", arguments["stored"])
            assert match, f"{name}: cannot read stored = {arguments['stored']!r}"
            out = out[:, :, :: int(match[1]), :: int(match[2])]
        return [expect(name, out, io[name], tolerance=SAMPLED)]

    def attention(self, arguments: dict[str, Any]) -> list[str]:
        known = {"layer_zero_based", "t", "row_step", "detok"}
        assert set(arguments) <= known, f"attn: unknown arguments {set(arguments) - known}"
        io, model, step = self.io, self.model, arguments["row_step"]
        network, layer, batch = (
            FastPredictor(model.predictor),
            arguments["layer_zero_based"],
            len(self.images),
        )
        given = network.condition(io["dec.msgs"], io["dec.offsets"])
        state = network.state_at(arguments["t"], self.device)
        times = torch.full((batch,), float(arguments["t"]), device=self.device)
        x = self._at(times)
        hard = model.predictor(x, io["dec.msgs"], io["dec.offsets"], times[:1], "hard")
        logits = hard.logits[layer]
        lean = network.velocity(x, given, state, mask_mode="hard")  # no buffer at all
        soft = network.velocity(x, given, state)
        want = io["attn.velocity_hard_mask"]
        relaxed = model.quantizer.relaxed(hard.message)
        seen = [
            expect("attn.velocity_hard_mask", hard.velocity, want, tolerance=FLOAT),
            expect("attn.velocity_hard_mask", lean, want, tolerance=FLOAT),
            expect("attn.bounded_msg_hard_mask", relaxed, io["attn.bounded_msg_hard_mask"], tolerance=FLOAT),
            expect("attn.velocity_soft_mask", soft, io["attn.velocity_soft_mask"], tolerance=FLOAT),
        ]
        tokens, length = x.shape[-1] ** 2 // model.spec.patch_size**2, model.spec.message_length
        if "attn.logits_full" in io:
            seen.append(expect("attn.logits_full", logits[:1], io["attn.logits_full"], tolerance=FLOAT))
        if "attn.logits_msg_to_image" in io:
            rows = logits[:, :, 1 + tokens : 1 + tokens + length : step, 1 : 1 + tokens]
            want = io["attn.logits_msg_to_image"]
            seen.append(expect("attn.logits_msg_to_image", rows, want, tolerance=FLOAT))
        run = arguments["detok"]
        assert set(run) == {"num_steps", "cfg_weight", "apg_momentum", "attn_weights_time"}, (
            f"attn.detok: {run}"
        )
        out = decode(
            model,
            io["dec.msgs"],
            io["dec.offsets"],
            io["dec.noise"],
            steps=run["num_steps"],
            guidance=Guidance(weight=run["cfg_weight"], momentum=run["apg_momentum"]),
            attention=AttentionRequest(layers=(layer,), times=(run["attn_weights_time"],)),
        )
        every = tuple(range(model.spec.depth))  # several layers and times in one pass: the same numbers
        request = AttentionRequest(layers=every, times=(0.0, run["attn_weights_time"]))
        together = decode(
            model,
            io["dec.msgs"],
            io["dec.offsets"],
            io["dec.noise"],
            steps=run["num_steps"],
            guidance=Guidance(weight=run["cfg_weight"], momentum=run["apg_momentum"]),
            attention=request,
            finish=False,
        )
        assert torch.equal(together.attention[layer, 1], out.attention[0, 0])
        maps = out.attention[0, 0].flatten(-2)[:, :, ::step]
        return [
            *seen,
            expect("attn.detok.latents", out.latents, io["attn.detok.latents"], tolerance=SAMPLED),
            expect(
                "attn.detok.logits_msg_to_image", maps, io["attn.detok.logits_msg_to_image"], tolerance=FLOAT
            ),
        ]

    def internals(self) -> list[str]:
        """Token embeddings and block outputs of one encoding and one decoding call, first image."""
        io = self.io
        crop = crop_latents(self.model, self.images, torch.full((1, self.images.shape[0]), 5))[0]
        x = next(iter(crop.values()))[1][:1]
        prior = self.model.prior(1, self.device), torch.tensor([[0.625, -0.625]], device=self.device)
        seen = self._internal("dbg.encode", x, *prior, torch.ones(1, device=self.device))
        t = io["vel.t"][2:3]
        return seen + self._internal(
            "dbg.decode", self._at(t)[:1], io["dec.msgs"][:1], io["dec.offsets"][:1], t
        )

    def _internal(self, prefix: str, x: Tensor, codes: Tensor, offset: Tensor, t: Tensor) -> list[str]:
        predictor, io = self.model.predictor, self.io
        groups = {
            "offset": predictor.offset_token(offset),
            "image": predictor.image_tokens(x),
            "message": predictor.message_tokens(codes),
            "buffer": predictor.buffer_tokens(),
        }
        inputs = {**groups, "temb": predictor.t_embedder(t)}
        seen = [
            expect(f"{prefix}.in.{k}", v, io[f"{prefix}.in.{k}"], tolerance=FLOAT) for k, v in inputs.items()
        ]
        states = predictor(x, codes, offset, t).states
        sizes = [group.shape[1] for group in groups.values()]
        for name in io:
            match = re.fullmatch(re.escape(prefix) + r"\.block(\d+)\.(\w+)", name)
            if match:
                part = states[int(match[1])].split(sizes, dim=1)[list(groups).index(match[2])]
                seen.append(expect(name, part, io[name], tolerance=FLOAT))
        return seen
