"""The training loss of COMiT.

One step: the planned crops go through the message, one update each; the full image is noised and the
same network predicts the velocity from the message. Gradients reach the message through the last
``backprop_updates`` updates only. Two small MLPs compare hidden tokens of that one decoding pass with
a frozen teacher: REPA the image tokens with its patches, SREPA the averaged message with its [CLS].

What is unusual, beside that:

- A global crop *is* the image, so its latent is the target's (or another sample of the same posterior);
  only local crops cost a VAE call, one for all of them.
- Images with fewer crops than others of the batch see theirs last; until then they keep the empty message.
- Skipped images are not encoded at all. If a batch has only such images, the first one is encoded and
  its message thrown away, so that every parameter has a (zero) gradient on every rank.
- Every term is a sum over images divided by the batch size, also where images are left out, so
  averages over equal batches are those of the joint batch.

Precision: runs in float32, or under an ambient autocast; the VAE, the message head, the quantizer and the
losses compute in float32 in any case.

Shape legend: ``B`` images, ``K`` crops, ``M`` message length, ``d`` code dimension, ``C h w`` latent,
``X`` image tokens, ``D`` width, ``S`` image side.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.nn.teachers import TeacherFeatures
from comit_bench.nn.vae import KLVae
from comit_bench.seeding import generator_for
from comit_bench.tokenizers.comit.codec import Latents, encode_sequence
from comit_bench.tokenizers.comit.crops import CropGeometry
from comit_bench.tokenizers.comit.fast import BlockRunner, FastPredictor
from comit_bench.tokenizers.comit.model import Comit
from comit_bench.train.config import TrainConfig
from comit_bench.train.sampling import ABSENT, WHOLE, TrainPlan, idle_steps


class LossParts(NamedTuple):
    """Scalars; ``repa`` and ``srepa`` are before weights and ramp, 0 when they are switched off.

    A named tuple, so that wrappers (DDP, FSDP) find the tensors in it.
    """

    total: Tensor
    flow: Tensor
    repa: Tensor
    srepa: Tensor


class Projector(nn.Sequential):
    """MLP with SiLU from the network's width to the teacher's; ``layers`` Linears."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, layers: int, generator: torch.Generator
    ) -> None:
        sizes = [inputs, *[hidden] * (layers - 1), outputs]
        parts: list[nn.Module] = []
        for size, following in pairwise(sizes):
            parts += [nn.Linear(size, following), nn.SiLU()]
        super().__init__(*parts[:-1])
        with torch.no_grad():
            for parameter in self.parameters():  # Xavier and zero, like the network itself
                if parameter.ndim == 1:
                    parameter.zero_()
                else:
                    bound = math.sqrt(6.0 / sum(parameter.shape))
                    parameter.uniform_(-bound, bound, generator=generator)


def crop_locations(geometry: CropGeometry, corners: Tensor) -> Tensor:
    """Normalised centres, x first: int64 [K, B, 2] (top, left) -> float32 [K, B, 2]; global is (0, 0).

    Steps before an image's first crop have the location of that crop, so that its first offset is (0, 0).
    """
    centres = (corners.flip(-1) + geometry.crop // 2) / geometry.half - 1.0
    places = centres.masked_fill(corners == WHOLE, 0.0)
    for step in reversed(range(len(places) - 1)):  # before its first crop an image is where that crop is
        absent = corners[step] == ABSENT
        if bool(absent.any()):
            places[step] = torch.where(absent, places[step + 1], places[step])
    return places


def cut_crops(images: Tensor, rows: Tensor, corners: Tensor, side: int) -> Tensor:
    """Windows at any position: images [B, 3, S, S], rows [n], corners [n, 2] -> [n, 3, side, side]."""
    ramp = torch.arange(side)
    down = (corners[:, :1] + ramp)[:, :, None].to(images.device, non_blocking=True)
    right = (corners[:, 1:] + ramp)[:, None, :].to(images.device, non_blocking=True)
    image = rows[:, None, None].to(images.device, non_blocking=True)
    return images.permute(0, 2, 3, 1)[image, down, right].permute(0, 3, 1, 2).contiguous()


class TrainingModule(nn.Module):
    """Network, projectors and loss as one module, the thing to wrap for many GPUs.

    Parameters that the loss never reaches (VAE, and two that exist only in the released files) are
    frozen here.

    Args:
        model: The network; its weights are left as they are.
        config: The run.
        teacher_dims: Sizes of the teacher's [CLS] and patch features; None without a teacher.

    Raises:
        ValueError: The model is not the config's, or an alignment weight without a teacher.
    """

    def __init__(self, model: Comit, config: TrainConfig, teacher_dims: tuple[int, int] | None) -> None:
        super().__init__()
        spec, objective = model.spec, config.objective
        if spec != config.model.spec():
            raise ValueError("the network was built from another spec than config.model")
        self.model = model
        self.config = config
        self.runner: BlockRunner | None = None  # how blocks are called; see train/scaling.py
        self.heads = nn.ModuleDict()
        dims = {"srepa": 0, "repa": 1}
        for name, weight in (("repa", objective.repa_weight), ("srepa", objective.srepa_weight)):
            if weight == 0:
                continue
            if teacher_dims is None:
                raise ValueError(f"objective.{name}_weight is {weight}, but there is no teacher")
            self.heads[name] = Projector(
                spec.width,
                objective.projector_width,
                teacher_dims[dims[name]],
                objective.projector_layers,
                generator_for(config.seed, f"train-heads/{name}"),
            )
        model.vae.requires_grad_(False).eval()
        model.predictor.y_pos_offset.requires_grad_(False)
        model.predictor.c_final_layer.requires_grad_(False)

    def train(self, mode: bool = True) -> TrainingModule:
        """As for any module, but the VAE always evaluates."""
        super().train(mode)
        self.model.vae.eval()
        return self

    def forward(
        self, images: Tensor, plan: TrainPlan, features: TeacherFeatures | None, ramp: float
    ) -> LossParts:
        """The loss of some images.

        Args:
            images: float32 [B, 3, S, S] in [-1, 1].
            plan: Random choices for these images, in this order.
            features: Of the same images; None without a teacher.
            ramp: Factor on both alignment weights, in [0, 1].

        Raises:
            ValueError: Images of another size than the network's, a plan for another number of images,
                or teacher features that are missing or lie on another grid.
        """
        self._check(images, plan, features)
        model, spec, objective = self.model, self.model.spec, self.config.objective
        clean, samples = self._image_latents(images, plan)
        skip = plan.skip.to(images.device, non_blocking=True)
        places = crop_locations(spec.geometry, plan.corners.cpu()).to(images.device, non_blocking=True)
        network = FastPredictor(model.predictor, self.runner)  # for this step: its weights change after it
        codes = self._message(images, clean, places, plan, samples, network)
        offset = -places[-1]
        if objective.skipped_offset == "zero":
            offset = offset.masked_fill(skip[:, None], 0.0)
        times, noise = plan.times.to(images.device), plan.noise.to(images.device)
        t = times[:, None, None, None]
        velocity, hidden = network.velocity_and_hidden(
            (1 - t) * noise + t * clean,
            network.condition(codes, offset),
            network.time_state(times),
            layer=spec.representation_layer if len(self.heads) else None,
        )
        error = (velocity.float() - (clean - noise)).square()
        flow = (error if plan.weights is None else error * plan.weights.to(images.device)).mean()
        repa, srepa = self._alignment(hidden, features, skip, flow)
        alignment = objective.repa_weight * repa + objective.srepa_weight * srepa
        return LossParts(flow + ramp * alignment, flow, repa, srepa)

    def _check(self, images: Tensor, plan: TrainPlan, features: TeacherFeatures | None) -> None:
        spec, batch = self.model.spec, images.shape[0]
        side = spec.image_size
        if images.shape[1:] != (3, side, side):
            raise ValueError(f"images must be [B, 3, {side}, {side}], got {list(images.shape)}")
        if plan.skip.shape[0] != batch:
            raise ValueError(f"the plan is for {plan.skip.shape[0]} images, got {batch}")
        if not len(self.heads):
            return
        if features is None:
            raise ValueError("an alignment weight is not 0, but there are no teacher features")
        tokens = features.patches.shape[1]
        if "repa" in self.heads:
            tokens = (spec.max_input_size // spec.patch_size) ** 2
        if features.patches.shape[:2] != (batch, tokens) or features.cls.shape[0] != batch:
            raise ValueError(
                f"the teacher gives patches {list(features.patches.shape)} and cls "
                f"{list(features.cls.shape)} for {batch} images of {tokens} tokens"
            )

    def _latents(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Mode of the VAE, or a sample of its posterior, float32, without gradient."""
        with torch.no_grad():
            return self.model.codec.encode(pixels, noise).float()

    def _image_latents(self, images: Tensor, plan: TrainPlan) -> tuple[Tensor, Tensor | None]:
        """The target [B, C, h, w] and, where a global crop is no part of it, samples [K, B, C, h, w]."""
        if plan.posterior is None:
            return self._latents(images), None
        with torch.no_grad():
            vae = cast(KLVae, self.model.vae)
            mean, logvar = vae.posterior(images)
            deviation = torch.exp(0.5 * logvar) * vae.scale
            samples = mean * vae.scale + deviation * plan.posterior.to(images.device)
        return samples[0], samples[1:]

    def _message(
        self,
        images: Tensor,
        clean: Tensor,
        places: Tensor,
        plan: TrainPlan,
        samples: Tensor | None = None,
        network: FastPredictor | None = None,
    ) -> Tensor:
        """Codes [B, M, d]: after the last crop, or the prior for skipped images."""
        model = self.model
        skipped = plan.skip.cpu()
        rows = torch.nonzero(~skipped).flatten()
        if rows.numel() == 0:
            rows = torch.zeros(1, dtype=torch.int64)
        corners = plan.corners.cpu()[:, rows]
        idle = idle_steps(corners)
        index = rows.to(images.device, non_blocking=True)
        noise = None if plan.posterior is None else plan.posterior[1 + idle :].to(images.device)
        updates = self.config.objective.backprop_updates
        seen = None if samples is None else samples[idle:]
        encoded = encode_sequence(
            model,
            self._crop_latents(images, clean, rows, corners[idle:], samples=seen, noise=noise),
            corners[idle:],  # kept in the trace, which nobody reads here
            places[idle:, index],
            backprop_updates=None if updates == "all" else updates,
            network=network,
        )
        codes = encoded.codes
        if self.config.objective.message_dropout > 0:
            relaxed = plan.relaxed.cpu()[rows].to(images.device, non_blocking=True)[:, None, None]
            codes = torch.where(relaxed, model.quantizer.relaxed(encoded.steps[-1].prequant), codes)
        empty = model.prior(images.shape[0], images.device)
        skip = skipped.to(images.device, non_blocking=True)[:, None, None]
        return torch.where(skip, empty, empty.index_copy(0, index, codes))

    def _crop_latents(
        self,
        images: Tensor,
        clean: Tensor,
        rows: Tensor,
        corners: Tensor,
        *,
        samples: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> list[Latents]:
        """Latents of corners [K, n, 2] of the images ``rows`` [n]; the indices inside are 0..n-1.

        Args:
            images: [B, 3, S, S].
            clean: Their latents [B, C, h, w].
            rows: Images that are encoded.
            corners: Their crops.
            samples: [K, B, C, h, w], what global crops show instead of ``clean``.
            noise: [K, B, C, h, w], for the posterior of local crops; None takes its mode.
        """
        device = images.device
        is_local = corners[..., 0] >= 0
        step, image = is_local.nonzero().unbind(1)  # ordered by step
        local = None
        if step.numel():
            side, drawn = self.model.spec.geometry.crop, None
            if noise is not None:
                cells = side // self.model.spec.vae_factor
                where = tuple(x.to(device, non_blocking=True) for x in (step, rows[image]))
                drawn = noise[where][..., :cells, :cells]
            local = self._latents(cut_crops(images, rows[image], corners[is_local], side), drawn)
        steps: list[Latents] = []
        start = 0
        for number, chosen in enumerate(is_local):
            entry: Latents = {}
            inside = chosen.nonzero().flatten()
            whole = (corners[number, :, 0] == WHOLE).nonzero().flatten()
            if whole.numel():
                index = rows[whole].to(device, non_blocking=True)
                shown = clean if samples is None else samples[number]
                entry[clean.shape[-1]] = (whole.to(device, non_blocking=True), shown[index])
            if local is not None and inside.numel():
                part = local[start : start + inside.numel()]
                entry[local.shape[-1]] = (inside.to(device, non_blocking=True), part)
                start += inside.numel()
            steps.append(entry)
        return steps

    def _alignment(
        self,
        hidden: tuple[Tensor, Tensor],
        features: TeacherFeatures | None,
        skip: Tensor,
        like: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """REPA and SREPA, 1 - cosine each; 0 for a head that is switched off."""
        zero = torch.zeros_like(like)
        if features is None:
            return zero, zero
        repa = srepa = zero
        if "repa" in self.heads:
            projected = self.heads["repa"](hidden[0]).float()
            repa = (1 - F.cosine_similarity(projected, features.patches.float(), dim=-1)).mean()
        if "srepa" in self.heads:
            pooled = self.heads["srepa"](hidden[1]).float().mean(dim=1)
            each = 1 - F.cosine_similarity(pooled, features.cls.float(), dim=-1)
            if not self.config.objective.srepa_on_skipped:
                each = each.masked_fill(skip, 0.0)
            srepa = each.mean()
        return repa, srepa
