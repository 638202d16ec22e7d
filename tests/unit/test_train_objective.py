"""The training objective: what is drawn, what is computed, where gradients go."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from comit_bench.nn.teachers import TeacherFeatures
from comit_bench.nn.vae import DctVae, StandInVae
from comit_bench.tokenizers.comit.codec import crop_latents, encode_sequence, locate, update
from comit_bench.tokenizers.comit.crops import CropGeometry, encoding_offsets
from comit_bench.tokenizers.comit.fast import FastPredictor
from comit_bench.tokenizers.comit.model import PRESETS, Comit, ComitSpec
from comit_bench.train.config import CropsConfig, TrainConfig
from comit_bench.train.objectives.comit import LossParts, TrainingModule, crop_locations, cut_crops
from comit_bench.train.sampling import WHOLE, TrainPlan, crop_counts, plan_step

SMALL = {"depth": 2, "width": 32, "representation_layer": 1, "message_length": 8}
ALIGNED = {"repa_weight": 0.5, "srepa_weight": 0.5, "projector_width": 24}
OFF = {"repa_weight": 0.0, "srepa_weight": 0.0}


def config(**sections: Any) -> TrainConfig:
    """A tiny run; alignment is off unless asked for."""
    top = {k: v for k, v in sections.items() if not isinstance(v, dict)}
    model = {**SMALL, **sections.get("model", {})}
    objective = {**OFF, **sections.get("objective", {})}
    aligned = objective["repa_weight"] + objective["srepa_weight"] > 0
    return TrainConfig.model_validate(
        {
            "name": "t",
            "steps": 10,
            "global_batch": 8,
            "model": model,
            "crops": sections.get("crops", {}),
            "objective": objective,
            "teacher": {"name": "scenes-teacher" if aligned else "none"},
            **top,
        }
    )


def network(run: TrainConfig, *, zero_gates: bool = False) -> Comit:
    model = Comit(run.model.spec(), DctVae(4))
    model.predictor.init_weights(torch.Generator().manual_seed(0), zero_gates=zero_gates)
    return model


def module(run: TrainConfig, **options: Any) -> TrainingModule:
    dims = (20, 12) if run.objective.repa_weight + run.objective.srepa_weight else None
    return TrainingModule(network(run, **options), run, dims)


def images(count: int) -> Tensor:
    """Coarse blocks, so that every crop of every image looks different."""
    blocks = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return F.interpolate(blocks, (32, 32), mode="bicubic").mul(1.5).clamp(-1, 1)


def features(count: int, *, tokens: int = 64) -> TeacherFeatures:
    generator = torch.Generator().manual_seed(2)
    draw = (torch.randn(*shape, generator=generator) for shape in ((count, 20), (count, tokens, 12)))
    return TeacherFeatures(*draw)


def plan_of(run: TrainConfig, count: int, *, crops: int | None = None, step: int = 0) -> TrainPlan:
    """The plan of the first step, from ``step`` on, that has this many crops."""
    while crops is not None and crop_counts(run.crops, seed=run.seed, step=step)[0] != crops:
        step += 1
    return plan_step(run, step=step, samples=range(count))


def with_(plan: TrainPlan, **changes: Any) -> TrainPlan:
    return replace(plan, **changes)


def grads(part: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(part, parameters, retain_graph=True, materialize_grads=True))


# ------------------------------------------------------------------ sampling


def test_a_plan_does_not_depend_on_company_order_or_ranks() -> None:
    run = config()
    whole = plan_of(run, 6, crops=3)
    step = next(s for s in range(1000) if crop_counts(run.crops, seed=0, step=s)[0] == 3)
    order = [4, 1, 5]
    some = plan_step(run, step=step, samples=order)
    picked = whole.select(order)
    assert some.crops == picked.crops == 3
    for name in ("corners", "skip", "times", "noise", "relaxed"):
        assert torch.equal(getattr(some, name), getattr(picked, name)), name
    assert torch.equal(whole.select(slice(1, 3)).noise, whole.select(torch.tensor([1, 2])).noise)
    assert not torch.equal(plan_step(run, step=step + 1, samples=range(6)).noise, whole.noise)
    assert not torch.equal(plan_step(config(seed=1), step=step, samples=range(6)).noise, whole.noise)


def test_number_of_crops_has_mode_one_and_the_mean_that_is_documented() -> None:
    crops = CropsConfig()
    counts = Counter(int(crop_counts(crops, seed=0, step=step)[0]) for step in range(4000))
    assert counts.most_common(1)[0][0] == 1
    assert list(counts) and max(counts) <= 9 and min(counts) == 1
    mean = sum(k * n for k, n in counts.items()) / 4000
    assert abs(mean - 2.0) < 0.08  # 1 + crops.mean; standard error 0.018
    busy = CropsConfig(mean=30.0, max_crops=4)
    assert {int(crop_counts(busy, seed=0, step=step)[0]) for step in range(50)} == {4}


def test_shares_corners_and_times_are_distributed_as_configured() -> None:
    run = config(crops={"mean": 3.0})
    plans = [plan_step(run, step=s, samples=range(200)) for s in range(12)]
    skip = torch.cat([p.skip for p in plans]).float()
    first = torch.cat([(p.corners[0, :, 0] < 0) for p in plans]).float()
    assert abs(skip.mean() - 0.18) < 0.03
    assert abs(first.mean() - 0.55) < 0.04
    assert abs((skip * first).mean() - skip.mean() * first.mean()) < 0.02  # independent
    local = torch.cat([p.corners[1:].flatten(0, 1) for p in plans if p.crops > 1])
    assert local.unique().tolist() == list(range(21))  # 32 - 12 + 1 positions, also the last
    counts = torch.bincount(local.flatten(), minlength=21).float()
    assert counts.std() / counts.mean() < 0.1
    wholes = torch.cat([p.corners[0] for p in plans])
    assert torch.equal(wholes[:, 0] < 0, wholes[:, 1] < 0)
    normal = torch.logit(torch.cat([p.times for p in plans]))
    assert abs(normal.mean() + 0.5) < 0.08
    assert abs(normal.std() - 1.0) < 0.06
    noise = torch.cat([p.noise for p in plans])
    assert noise.shape[1:] == (12, 8, 8)
    assert abs(noise.std() - 1) < 0.01


def test_settings_do_not_disturb_each_others_draws() -> None:
    a, b = plan_of(config(), 8), plan_of(config(objective={"skip": 0.9}, crops={"global_first": 0.0}), 8)
    assert torch.equal(a.noise, b.noise)
    assert torch.equal(a.times, b.times)
    seen = a.corners >= 0
    assert torch.equal(a.corners[seen], b.corners[seen])
    assert (b.corners >= 0).all()


def test_a_phase_of_the_curriculum_ends_before_its_step() -> None:
    phase = {"until": 5, "max_crops": 1, "global_first": 1.0}
    run = config(crops={"mean": 20.0, "global_first": 0.0}, curriculum=[phase])
    plan = plan_step(run, step=4, samples=range(5))
    assert plan.crops == 1
    assert (plan.corners == -1).all()
    after = plan_step(run, step=5, samples=range(5))
    assert after.crops > 1
    assert (after.corners >= 0).all()


# ------------------------------------------------------------------ geometry


def test_locations_agree_with_the_grid_of_the_codec_and_crops_with_slices() -> None:
    geometry = CropGeometry()
    corners = torch.tensor([[r * 80, c * 80] for r in range(3) for c in range(3)] + [[-1, -1]])[:, None]
    expected = torch.cat([geometry.locations(256), torch.zeros(1, 2)])
    assert torch.equal(crop_locations(geometry, corners)[:, 0], expected)
    x = images(3)
    rows, places = torch.tensor([2, 0, 2]), torch.tensor([[0, 20], [7, 3], [20, 20]])
    cut = cut_crops(x, rows, places, 12)
    for window, row, (top, left) in zip(cut, rows.tolist(), places.tolist(), strict=True):
        assert torch.equal(window, x[row, :, top : top + 12, left : left + 12])


@pytest.mark.parametrize("crops", [1, 2])
def test_messages_are_those_of_the_codec_with_mixed_first_crops(crops: int) -> None:
    """Grid positions as a plan give the messages, not rounded, that the codec gives for those cells."""
    run = config(objective={"message_dropout": 1.0})
    train = module(run)
    cells = torch.tensor([[-1, 4, -1, 0], [8, 2, 3, 5]])[:crops]
    stride = PRESETS["comit-nano"].geometry.stride(32)
    corners = torch.stack([cells // 3, cells % 3], dim=-1) * stride
    corners[cells < 0] = -1
    plan = with_(plan_of(run, 4, crops=crops), corners=corners, skip=torch.tensor([False] * 4))
    x = images(4)
    with torch.no_grad():
        places = crop_locations(train.model.spec.geometry, corners)
        got = train._message(x, train._latents(x), places, plan)
        latents = crop_latents(train.model, x, cells)
        done = encode_sequence(train.model, latents, cells, locate(train.model, cells, 32))
        want = train.model.quantizer.relaxed(done.steps[-1].prequant)
    assert torch.equal(got, want)
    assert len(got.flatten(1).unique(dim=0)) == 4


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_only_the_last_updates_get_gradient(kept: int) -> None:
    """Against the definition: the message before the last ``kept`` updates is a constant."""
    run = config(crops={"max_crops": 4}, objective={"skip": 0.0, "backprop_updates": kept})
    train, plan, x = module(run), plan_of(run, 3, crops=3), images(3)
    model = train.model
    parameters = [p for p in model.predictor.parameters() if p.requires_grad]
    places = crop_locations(model.spec.geometry, plan.corners)
    latents = train._crop_latents(x, train._latents(x), torch.arange(3), plan.corners)
    weight = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(3))

    full = encode_sequence(model, latents, plan.corners, places)
    message = model.prior(1, x.device)[:, :1] if kept == 3 else full.steps[2 - kept].codes.detach()
    for k in range(3 - kept, 3):
        message = model.quantizer(
            update(FastPredictor(model.predictor), latents[k], message, encoding_offsets(places)[k])
        )
    want = grads((message * weight).sum(), parameters)
    codes = train._message(x, train._latents(x), places, plan)
    got = grads((codes * weight).sum(), parameters)
    assert torch.equal(codes, full.codes)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    trace = encode_sequence(model, latents, plan.corners, places, backprop_updates=kept).steps
    assert [step.codes.requires_grad for step in trace] == [k >= 3 - kept for k in range(3)]
    everything = grads((full.codes * weight).sum(), parameters)
    same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, everything, strict=True))
    assert same is (kept == 3)


def written_out(train: TrainingModule, x: Tensor, plan: TrainPlan, kept: int) -> Tensor:
    """The flow loss, image by image, by the equations of ``model.py``; gradient through ``kept`` updates."""
    model, geometry = train.model, train.model.spec.geometry
    quantize, losses = model.quantizer, []
    for image in range(len(x)):
        codes, before, own = model.prior(1, x.device), None, plan.corners[:, image]
        own = own[own[:, 0] >= -1]
        for number, (top, left) in enumerate(own.tolist()):
            window, place = x[image : image + 1], torch.zeros(1, 2)
            if top >= 0:
                window = window[:, :, top : top + geometry.crop, left : left + geometry.crop]
                place = (torch.tensor([[left, top]]) + geometry.crop // 2) / geometry.half - 1
            offset = torch.zeros(1, 2) if before is None else place - before
            if not plan.skip[image]:
                z = model.predictor(model.codec.encode(window), codes, offset, torch.ones(1)).message
                smooth = quantize.relaxed(z)
                codes = smooth + (quantize(z) - smooth).detach()
                codes = codes if len(own) - number <= kept else codes.detach()
            before = place
        assert before is not None
        clean, noise = model.codec.encode(x[image : image + 1]), plan.noise[image : image + 1]
        t = plan.times[image : image + 1]
        velocity = model.predictor((1 - t) * noise + t * clean, codes, -before, t).velocity
        losses.append((velocity - (clean - noise)).square().mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("kept", "mask_mode"), [(1, "hard"), (2, "hard"), (2, "additive"), (3, "additive"), ("all", "hard")]
)
def test_gradients_through_updates_are_those_of_the_equations(kept: int | str, mask_mode: str) -> None:
    """Images with different numbers of crops, some with a global one first, some skipped."""
    crops = {"places": "grid", "count": "uniform", "per": "image", "max_crops": 4}
    run = config(
        model={"mask_mode": mask_mode}, crops=crops, objective={"skip": 0.3, "backprop_updates": kept}
    )
    train, x, plan = module(run), images(6), plan_step(run, step=0, samples=range(6))
    for step in range(1, 99):
        own = (plan.corners[..., 0] >= -1).sum(dim=0)
        four = bool(((own == 4) & ~plan.skip & (plan.corners[0, :, 0] == -1)).any())
        if four and len(set(own.tolist())) > 2 and 0 < int(plan.skip.sum()) < 3:
            break
        plan = plan_step(run, step=step, samples=range(6))
    assert four
    train.model.predictor.favour_message()
    with torch.no_grad():
        for name, parameter in train.model.predictor.named_parameters():
            if "qkv.weight" in name:
                parameter.mul_(3.0)  # attention is sharp, so the message before an update matters
    parameters = [p for p in train.model.predictor.parameters() if p.requires_grad]
    total = train(x, plan, None, 1.0).total
    updates = [0, 1, 2, 3, 4]
    losses = [written_out(train, x, plan, number) for number in updates]
    assert all(torch.allclose(total, loss, rtol=1e-5) for loss in losses)
    got, *others = (torch.cat([g.flatten() for g in grads(loss, parameters)]) for loss in (total, *losses))
    right = 4 if kept == "all" else int(kept)
    distances = [float((got - other).norm() / other.norm()) for other in others]
    assert distances[right] < 1e-5
    assert min(distances[number] for number in updates if number != right) > 1e-4


@pytest.mark.parametrize("mask_mode", ["hard", "additive"])
@pytest.mark.parametrize("everything_skipped", [False, True])
def test_every_trainable_parameter_gets_a_gradient(mask_mode: str, everything_skipped: bool) -> None:
    """DDP waits for all of them on every rank."""
    run = config(model={"mask_mode": mask_mode}, objective=ALIGNED)
    train = module(run)
    plan = plan_of(run, 3, crops=2)
    plan = with_(plan, skip=torch.tensor([everything_skipped] * 3))
    parts = train(images(3), plan, features(3), 0.5)
    parts.total.backward()
    missing = [n for n, p in train.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    frozen = {n for n, p in train.named_parameters() if not p.requires_grad}
    assert all(
        "y_pos_offset" in n or "c_final_layer" in n or n.endswith("predictor.pos_embed") for n in frozen
    )
    update_head = train.model.predictor.r_final_layer.linear.weight.grad
    assert update_head is not None
    assert bool(update_head.abs().sum() > 0) is not everything_skipped


# ----------------------------------------------------------------------- loss


def test_flow_loss_and_alignment_are_the_formulas() -> None:
    run = config(objective={**ALIGNED, "skip": 0.0, "repa_weight": 0.3, "srepa_weight": 0.7})
    train, x, teacher = module(run), images(3), features(3)
    plan = plan_of(run, 3, crops=2)
    parts = train(x, plan, teacher, 0.25)
    network = FastPredictor(train.model.predictor)
    places = crop_locations(train.model.spec.geometry, plan.corners)
    codes = train._message(x, train._latents(x), places, plan)
    t, clean = plan.times[:, None, None, None], train._latents(x)
    velocity, (image, message) = network.velocity_and_hidden(
        (1 - t) * plan.noise + t * clean,
        network.condition(codes, -places[-1]),
        network.time_state(plan.times),
        layer=1,
    )
    flow = ((velocity - (clean - plan.noise)) ** 2).mean(dim=(1, 2, 3)).mean()
    assert torch.allclose(parts.flow, flow, atol=1e-5)
    a = train.heads["repa"](image)
    b = train.heads["srepa"](message).mean(1)
    unit = F.normalize
    repa = (1 - (unit(a, dim=-1) * unit(teacher.patches, dim=-1)).sum(-1)).mean()
    srepa = (1 - (unit(b, dim=-1) * unit(teacher.cls, dim=-1)).sum(-1)).mean()
    assert torch.allclose(parts.repa, repa, atol=1e-5)
    assert torch.allclose(parts.srepa, srepa, atol=1e-5)
    total = parts.flow + 0.25 * (0.3 * parts.repa + 0.7 * parts.srepa)
    assert torch.allclose(parts.total, total, atol=1e-6)


@pytest.mark.parametrize("places", ["grid", "uniform"])
def test_what_no_crop_has_seen_weighs_less(places: str) -> None:
    crops = {"places": places, "per": "image", "count": "uniform", "max_crops": 4, "global_first": 0.2}
    run = config(objective={"skip": 0.2}, crops={**crops, "unseen_weight": 0.1})
    train, x, count = module(run), images(24), 24
    plan = plan_of(run, count)
    spec, weights = train.model.spec, plan.weights
    assert weights is not None
    for image in range(count):  # pixel by pixel, cell by cell
        seen = torch.zeros(len(plan.corners), spec.image_size, spec.image_size)
        for crop, (top, left) in zip(seen, plan.corners[:, image].tolist(), strict=True):
            if top >= 0:
                crop[top : top + spec.geometry.crop, left : left + spec.geometry.crop] = 1
            elif top == WHOLE or bool(plan.skip[image]):
                crop[:] = 1
        cells = F.avg_pool2d(seen, spec.vae_factor).amax(dim=0)
        expected = torch.ones(8, 8) if plan.skip[image] else 0.1 + 0.9 * cells
        assert torch.allclose(weights[image, 0], expected / expected.mean(), atol=1e-5)
    plain = with_(plan, weights=None)
    assert plan_of(config(objective={"skip": 0.2}, crops=crops), count).weights is None
    with torch.no_grad():
        weighed, even = train(x, plan, None, 0.0).flow, train(x, plain, None, 0.0).flow
        halves = [train(x[r], plan.select(r), None, 0.0).flow for r in (slice(0, 12), slice(12, 24))]
    assert abs(weighed - even) > 1e-3
    assert abs(weighed - sum(halves) / 2) < 1e-6
    assert plan.to("cpu").weights is not None


@pytest.mark.parametrize("mask_mode", ["hard", "additive"])
def test_parts_of_a_batch_are_the_mean_of_its_halves(mask_mode: str) -> None:
    run = config(model={"mask_mode": mask_mode}, objective={**ALIGNED, "skip": 0.4})
    train, x, teacher = module(run), images(8), features(8)
    plan = plan_of(run, 8, crops=2)
    assert 0 < int(plan.skip[:4].sum()) + int(plan.skip[4:].sum()) < 8
    with torch.no_grad():
        whole = train(x, plan, teacher, 1.0)
        halves = [
            train(x[rows], plan.select(rows), teacher.select(rows), 1.0)
            for rows in (slice(0, 4), slice(4, 8))
        ]
    for name, a, b, c in zip(LossParts._fields, whole, *halves, strict=True):
        assert abs(a - (b + c) / 2) < 1e-6, name


def test_the_other_images_do_not_notice_that_some_are_skipped() -> None:
    run = config(objective={"message_dropout": 1.0})
    train, x, plan = module(run), images(5), plan_of(run, 5, crops=1)
    corners = plan.corners.clone()
    corners[0, :3] = -1
    corners[0, 3:] = 7
    skip = torch.tensor([True, False, False, True, False])
    places = crop_locations(train.model.spec.geometry, corners)
    with torch.no_grad():
        every = train._message(
            x, train._latents(x), places, with_(plan, corners=corners, skip=torch.zeros(5, dtype=torch.bool))
        )
        some = train._message(x, train._latents(x), places, with_(plan, corners=corners, skip=skip))
    assert torch.allclose(some[~skip], every[~skip], atol=1e-6)
    assert len(every.flatten(1).unique(dim=0)) == 5
    assert torch.equal(some[skip], train.model.prior(2, x.device))
    assert not torch.equal(every[skip], train.model.prior(2, x.device))


@pytest.mark.parametrize("skipped_offset", ["zero", "last-crop"])
def test_a_skipped_image_does_not_see_its_crops(skipped_offset: str) -> None:
    run = config(objective={**ALIGNED, "skipped_offset": skipped_offset, "message_dropout": 1.0})
    train, x, teacher = module(run), images(2), features(2)
    plan = plan_of(run, 2, crops=3)
    moved = plan.corners.clone()
    moved[:2, 0] = torch.tensor([3, 17])  # not the last crop: its location is the offset
    last = plan.corners.clone()
    last[2, 0] = (last[2, 0] + 5) % 20

    def loss(corners: Tensor, skip: bool) -> LossParts:
        chosen = with_(plan, corners=corners, skip=torch.tensor([skip, False]))
        with torch.no_grad():
            return train(x, chosen, teacher, 1.0)

    assert loss(moved, True) == loss(plan.corners, True)
    assert loss(moved, False).srepa != loss(plan.corners, False).srepa
    assert (loss(last, True) == loss(plan.corners, True)) is (skipped_offset == "zero")


def test_srepa_of_skipped_images_is_a_choice() -> None:
    teacher, x = features(2), images(2)
    values = []
    for chosen in (False, True):
        run = config(objective={**ALIGNED, "srepa_on_skipped": chosen})
        plan = with_(plan_of(run, 2), skip=torch.tensor([True, True]))
        with torch.no_grad():
            parts = module(run)(x, plan, teacher, 1.0)
        assert parts.repa > 0
        values.append(float(parts.srepa))
    assert values[0] == 0.0
    assert values[1] > 0.0


def test_message_dropout_leaves_the_message_unrounded() -> None:
    run = config(objective={"message_dropout": 0.5, "skip": 0.0})
    plan = plan_of(run, 40)
    assert 8 < int(plan.relaxed.sum()) < 32
    train, x = module(run), images(40)
    with torch.no_grad():
        places = crop_locations(train.model.spec.geometry, plan.corners)
        codes = train._message(x, train._latents(x), places, plan)
    steps = codes * train.model.quantizer.half_width
    exact = (steps - steps.round()).abs().flatten(1).amax(1) < 1e-5
    assert torch.equal(exact, ~plan.relaxed)
    assert not plan_of(config(), 40).relaxed.any()


@pytest.mark.parametrize("mask_mode", ["hard", "additive"])
def test_sixteen_images_are_learnt(mask_mode: str) -> None:
    run = config(model={"mask_mode": mask_mode}, objective={**ALIGNED, "skip": 0.1})
    train, teacher = module(run, zero_gates=True), features(16)
    grey = torch.linspace(-1, 1, 16)[:, None, None, None] * torch.tensor([1.0, -1.0, 0.5])[:, None, None]
    x = grey.expand(16, 3, 32, 32).contiguous()
    optimizer = torch.optim.Adam([p for p in train.parameters() if p.requires_grad], lr=3e-3)
    history = []
    for step in range(60):
        parts = train(x, plan_step(run, step=step, samples=range(16)), teacher, 1.0)
        optimizer.zero_grad()
        parts.total.backward()
        optimizer.step()
        history.append([float(p.detach()) for p in parts])
    early, late = (torch.tensor(part).mean(0) for part in (history[:5], history[-10:]))
    assert late[1] < 0.65 * early[1], (early, late)  # flow
    assert late[2] < early[2] - 0.03  # repa
    assert late[3] < early[3] - 0.03  # srepa


def test_nothing_stale_outlives_a_step_of_a_fused_optimizer() -> None:
    """Fused Adam leaves the version counters alone, which the network's cache goes by."""
    run = config(crops={"mean": 3.0, "global_first": 0.0}, objective={"skip": 0.0})
    train, x = module(run), images(2)
    optimizer = torch.optim.Adam([p for p in train.parameters() if p.requires_grad], lr=0.05, fused=True)
    plan = plan_of(run, 2, crops=3)
    train(x, plan, None, 1.0).total.backward()
    optimizer.step()
    places = crop_locations(train.model.spec.geometry, plan.corners)
    fresh = network(run)
    fresh.load_state_dict(train.model.state_dict())
    other = TrainingModule(fresh, run, None)
    with torch.no_grad():
        assert torch.equal(
            train._message(x, train._latents(x), places, plan), other._message(x, x, places, plan)
        )


def test_bfloat16_autocast_keeps_losses_and_messages_in_float32() -> None:
    run = config(crops={"mean": 3.0}, objective={**ALIGNED, "skip": 0.0})
    train, x, teacher = module(run), images(4), features(4)
    plan = plan_of(run, 4, crops=3)
    exact = train(x, plan, teacher, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = train(x, plan, teacher, 1.0)
        places = crop_locations(train.model.spec.geometry, plan.corners)
        assert train._message(x, train._latents(x), places, plan).dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in parts)
    assert torch.allclose(parts.repa, exact.repa, atol=0.05)
    parts.total.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in train.model.predictor.blocks.parameters()
    )


def test_a_vae_encodes_target_and_local_crops_without_gradient() -> None:
    spec = ComitSpec(
        depth=2,
        width=32,
        heads=2,
        message_length=8,
        fsq_levels=(5, 5),
        max_input_size=8,
        patch_size=1,
        representation_layer=1,
        mask_mode="hard",
        vae="stand-in",
        vae_factor=4,
        geometry=CropGeometry(crop=12, half=16),
    )
    run = config(objective={"skip": 0.0}, crops={"mean": 3.0})

    class Own(type(run.model)):  # type: ignore[misc]
        def spec(self) -> ComitSpec:
            return spec

    run = run.model_copy(update={"model": Own()})
    vae = StandInVae(4)
    generator = torch.Generator().manual_seed(4)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    model = Comit(spec, vae)
    model.predictor.init_weights(torch.Generator().manual_seed(0), zero_gates=False)
    train = TrainingModule(model, run, None)
    calls: list[int] = []
    encode = vae.encode
    vae.encode = lambda pixels, noise=None: calls.append(len(pixels)) or encode(pixels)  # type: ignore
    plan = plan_of(run, 3, crops=3)
    parts = train(images(3), plan, None, 1.0)
    parts.total.backward()
    assert calls == [3, int((plan.corners[..., 0] >= 0).sum())]
    assert all(p.grad is None for p in vae.parameters())
    assert not train.train().model.vae.training


# ------------------------------------------------------------------ bad input


def test_what_does_not_fit_is_refused() -> None:
    run = config(objective=ALIGNED)
    train, plan = module(run), plan_of(run, 2)
    with pytest.raises(ValueError, match="no teacher"):
        TrainingModule(network(run), run, None)
    with pytest.raises(ValueError, match="another spec"):
        TrainingModule(network(run), config(model={"depth": 3}), None)
    with pytest.raises(ValueError, match="no teacher features"):
        train(images(2), plan, None, 1.0)
    with pytest.raises(ValueError, match="64 tokens"):
        train(images(2), plan, features(2, tokens=49), 1.0)
    with pytest.raises(ValueError, match="plan is for 2"):
        train(images(3), plan, features(3), 1.0)
    with pytest.raises(ValueError, match="images must be"):
        train(torch.zeros(2, 3, 16, 16), plan, features(2), 1.0)
