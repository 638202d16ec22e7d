"""Options of training that the paper leaves open: defaults change nothing, and each does what it says."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_tokenizers import SD_NANO, seeded, small_sd_vae
from torch import Tensor

from comit_bench import load_tokenizer
from comit_bench.errors import UsageError
from comit_bench.nn.vae import DctVae
from comit_bench.tokenizers.comit.codec import encode
from comit_bench.tokenizers.comit.crops import CropPolicy
from comit_bench.tokenizers.comit.model import PRESETS, Comit
from comit_bench.train.card import RunFacts, render
from comit_bench.train.config import TrainConfig, load_config
from comit_bench.train.data import MemoryImages, Steps
from comit_bench.train.loop import Trainer
from comit_bench.train.objectives.comit import TrainingModule, crop_locations
from comit_bench.train.objectives.comit_card import about
from comit_bench.train.sampling import ABSENT, WHOLE, TrainPlan, crop_counts, mean_crops, plan_step

SMALL = ("model.depth=2", "model.width=32", "model.heads=2", "model.message_length=4", "optim.name=adam",
         "model.representation_layer=1", "global_batch=8")  # fmt: skip
ONLY_GLOBAL = "max_crops: 1, count_global: true, global_first: 1, global_first_among: encoded"
GLOBAL_FIRST = f"curriculum=[{{until: 1, {ONLY_GLOBAL}}}]"
RUN = (*SMALL, "data.count=20", "data.val_count=2", GLOBAL_FIRST, "crops.mean=3", "steps=4",
       "log_every=1", "save_every=2", "validate_every=4", "validation.steps=1", "validation.pictures=1",
       "optim.warmup_steps=1")  # fmt: skip
IDS = tuple(range(40))


def config(*overrides: str) -> TrainConfig:
    return load_config("comit-nano-no-srepa", (*SMALL, "curriculum=[]", *overrides))


def images(count: int, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=seeded(1)) * 2 - 1


def module(run: TrainConfig) -> TrainingModule:
    spec = run.model.spec()
    network = Comit(spec, small_sd_vae() if spec.vae.startswith("sd") else DctVae(4))
    network.predictor.init_weights(seeded(), zero_gates=False)
    return TrainingModule(network, run, None)


# ------------------------------------------------------------------ defaults

# (loss, norm of the gradient, crops) of four steps, and plans, as they are with these options left alone
LOSSES = (
    (1.7687898874282837, 0.9450522661209106, 1),
    (1.7598069906234741, 0.9379189610481262, 3),
    (1.6585259437561035, 0.8903777003288269, 1),
    (1.6671441793441772, 0.9193335771560669, 1),
)
PLANS = (
    ("comit-nano", 0, 1, "fb117aa7075c"),
    ("comit-nano", 2009, 2, "eedb7e6fce4b"),
    ("comit-b", 22, 3, "d0004dd3c8d3"),
    ("comit-l", 1270, 4, "32af625e853e"),
)


def test_with_the_defaults_a_training_is_what_it_was(tmp_path: Path) -> None:
    trainer = Trainer(load_config("comit-nano", (*RUN, f"output={tmp_path}")), device="cpu", progress=False)
    trainer.fit()
    with (trainer.directory / "log.csv").open() as stream:
        rows = [(float(r["loss"]), float(r["grad_norm"]), int(r["crops"])) for r in csv.DictReader(stream)]
    assert rows == [pytest.approx(row, rel=1e-5) for row in LOSSES]


@pytest.mark.parametrize(("preset", "step", "crops", "digest"), PLANS)
def test_with_the_defaults_plans_are_what_they_were(preset: str, step: int, crops: int, digest: str) -> None:
    run = load_config(preset, ("data.kind=scenes",))
    plan = plan_step(run, step=step, samples=[0, 1, 150_123])
    times, noise = [f"{x:.4f}" for x in plan.times.tolist()], f"{float(plan.noise.double().sum()):.2f}"
    text = str([plan.crops, plan.corners.tolist(), plan.skip.tolist(), plan.relaxed.tolist(), times, noise])
    assert (plan.crops, sha256(text.encode()).hexdigest()[:12]) == (crops, digest)
    assert plan.posterior is None


# ----------------------------------------------------------- number of crops


def counts(plan: TrainPlan) -> list[int]:
    return [int(n) for n in (plan.corners[..., 0] != ABSENT).sum(dim=0)]


def test_every_image_may_have_a_number_of_crops_of_its_own() -> None:
    run = config("crops.per=image", "crops.max_crops=6", "crops.mean=2")
    plans = [plan_step(run, step=step, samples=IDS) for step in range(20)]
    seen = Counter(n for plan in plans for n in counts(plan))
    assert set(seen) == {1, 2, 3, 4, 5, 6}
    mean = sum(n * times for n, times in seen.items()) / sum(seen.values())
    assert 2.5 < mean < 3.2  # 1 + 2, clipped
    for plan in plans:
        there = plan.corners[..., 0] != ABSENT
        assert plan.crops == max(counts(plan)) and bool(there[-1].all())  # everybody ends together
        assert bool((there[1:] | ~there[:-1]).all())  # and nobody pauses
    drawn = set(crop_counts(run.crops, seed=run.seed, step=3, samples=IDS).tolist())
    assert len(drawn) > 2 and len(set(crop_counts(config().crops, seed=0, step=3, samples=IDS).tolist())) == 1


@pytest.mark.parametrize("more", [(), ("crops.count_global=false",), ("crops.global_first_among=all",)])
def test_a_plan_does_not_depend_on_the_company(more: tuple[str, ...]) -> None:
    run = config("crops.per=image", *more)
    whole = plan_step(run, step=5, samples=IDS[:12])
    for start, stop in ((0, 3), (3, 12), (7, 8)):
        one, part = plan_step(run, step=5, samples=IDS[start:stop]), whole.select(slice(start, stop))
        assert one.crops == part.crops
        for name in ("corners", "skip", "times", "noise", "relaxed"):
            assert torch.equal(getattr(one, name), getattr(part, name)), name
    order = [4, 1, 9]
    again = plan_step(run, step=5, samples=[IDS[i] for i in order])
    assert torch.equal(again.corners, whole.select(order).corners)
    assert mean_crops(run, step=5, samples=IDS[:12]) == sum(counts(whole)) / 12


def loss_and_gradient(train: TrainingModule, x: Tensor, plan: TrainPlan) -> tuple[float, Tensor]:
    train.zero_grad()
    total = train(x, plan, None, 1.0).total
    total.backward()
    return float(total.detach()), torch.cat(
        [p.grad.flatten() for p in train.parameters() if p.grad is not None]
    )


@pytest.mark.parametrize("mask_mode", ["hard", "additive"])
@pytest.mark.parametrize("updates", [1, 3])
def test_images_with_few_crops_are_not_disturbed_by_those_with_many(mask_mode: str, updates: int) -> None:
    """A batch of unequal images has the loss and the gradient of its images alone."""
    run = config(
        "crops.per=image", "crops.max_crops=4", "crops.mean=2", "objective.skip=0.3",
        f"model.mask_mode={mask_mode}", f"objective.backprop_updates={updates}",
    )  # fmt: skip
    train, x = module(run), images(6)
    step = next(s for s in range(99) if len(set(counts(plan_step(run, step=s, samples=IDS[:6])))) > 2)
    plan = plan_step(run, step=step, samples=IDS[:6])
    together = loss_and_gradient(train, x, plan)
    alone = [loss_and_gradient(train, x[i : i + 1], plan.select([i])) for i in range(6)]
    assert together[0] == pytest.approx(sum(loss for loss, _ in alone) / 6, rel=1e-5)
    torch.testing.assert_close(together[1], torch.stack([g for _, g in alone]).mean(0), atol=2e-5, rtol=1e-3)
    trimmed = plan.select(slice(0, 6))
    assert trimmed.crops == plan.crops


def test_only_skipped_images_may_have_the_most_crops() -> None:
    run = config("crops.per=image", "objective.skip=0.5", "crops.max_crops=5", "crops.mean=2")
    train, found = module(run), False
    for step in range(60):
        plan = plan_step(run, step=step, samples=IDS[:3])
        numbers = counts(plan)
        skipped = [n for n, out in zip(numbers, plan.skip.tolist(), strict=True) if out]
        seen = [n for n, out in zip(numbers, plan.skip.tolist(), strict=True) if not out]
        if seen and skipped and max(skipped) > max(seen):
            found = True
            assert torch.isfinite(train(images(3), plan, None, 1.0).total)
    assert found


def test_before_its_first_crop_an_image_is_where_that_crop_is() -> None:
    corners = torch.tensor([[[ABSENT] * 2, [4, 8]], [[10, 2], [WHOLE] * 2], [[0, 0], [3, 3]]])
    places = crop_locations(PRESETS["comit-nano"].geometry, corners)
    assert torch.equal(places[0, 0], places[1, 0]) and places[1, 1].tolist() == [0.0, 0.0]


def test_a_global_crop_need_not_count_among_the_nine() -> None:
    many = ("crops.mean=60", "crops.sigma=0.1")
    counted = plan_step(config(*many), step=0, samples=IDS)
    assert set(counts(counted)) == {4}  # max_crops of the preset
    run = config(*many, "crops.count_global=false", "crops.max_crops=9")
    plan = plan_step(run, step=0, samples=IDS)
    first = [int(plan.corners[plan.crops - n, i, 0]) for i, n in enumerate(counts(plan))]
    whole = [n for n, corner in zip(counts(plan), first, strict=True) if corner == WHOLE]
    local = [n for n, corner in zip(counts(plan), first, strict=True) if corner != WHOLE]
    assert set(whole) == {10} and set(local) == {9}  # as many as the ten-crop policies of Table 3
    few = config("crops.count_global=false", "crops.mean=0.5")
    assert set(counts(plan_step(few, step=2, samples=IDS))) <= {1, 2, 3, 4, 5}


# -------------------------------------------------- share of whole first crops


@pytest.mark.parametrize(("among", "encoded"), [("encoded", 0.55), ("all", 0.55 / 0.82)])
def test_whose_share_055_is(among: str, encoded: float) -> None:
    run = config("objective.skip=0.18", f"crops.global_first_among={among}")
    names = range(4000)
    plan = plan_step(run.model_copy(update={"crops": run.crops.model_copy(update={"max_crops": 1})}), step=0,
                     samples=names)  # fmt: skip
    whole = plan.corners[-1, :, 0] == WHOLE
    assert float(whole[~plan.skip].float().mean()) == pytest.approx(encoded, abs=0.03)
    if among == "all":
        assert float((whole & ~plan.skip).float().mean()) == pytest.approx(0.55, abs=0.03)


# ------------------------------------------------------------------ posterior


SD = "model.image_size=64"


@pytest.fixture
def sd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset ``comit-nano`` with an SD-VAE."""
    monkeypatch.setitem(PRESETS, "comit-nano", replace(SD_NANO, message_length=4))


def test_posterior_samples_are_keyed_by_the_image(sd: None) -> None:
    run = config(SD, "objective.posterior=sample", "crops.per=image", "crops.max_crops=4", "crops.mean=2")
    step = next(s for s in range(99) if len(set(counts(plan_step(run, step=s, samples=IDS[:4])))) > 1)
    whole = plan_step(run, step=step, samples=IDS[:4])
    assert whole.posterior is not None and whole.posterior.shape == (whole.crops + 1, 4, 4, 8, 8)
    assert (
        len({float(x) for x in whole.posterior[:, :, 0, 0, 0].flatten()})
        == whole.posterior[..., 0, 0, 0].numel()
    )
    for i in range(4):
        one = plan_step(run, step=step, samples=IDS[i : i + 1])
        assert one.posterior is not None
        assert torch.equal(one.posterior, whole.select([i]).posterior)  # type: ignore[arg-type]
    mode = plan_step(
        config(SD, "crops.per=image", "crops.max_crops=4", "crops.mean=2"), step=step, samples=IDS[:4]
    )
    assert torch.equal(mode.noise, whole.noise) and torch.equal(mode.corners, whole.corners)


def test_targets_and_crops_are_samples(sd: None) -> None:
    run = config(
        SD, "objective.posterior=sample", "crops.max_crops=3", "crops.mean=9", "crops.global_first=0.5"
    )
    train = module(run)
    x = images(3, 64)
    plan = plan_step(run, step=0, samples=IDS[:3])
    assert plan.posterior is not None and plan.crops == 3
    vae: Any = train.model.vae
    with torch.no_grad():
        mean, logvar = vae.posterior(x)
        mean, deviation = mean * vae.scale, (0.5 * logvar).exp() * vae.scale
        assert torch.allclose(mean, vae.encode(x))
        assert torch.allclose(mean + deviation * plan.posterior[0], vae.encode(x, plan.posterior[0]))
        clean, samples = train._image_latents(x, plan)
        steps = train._crop_latents(
            x, clean, torch.arange(3), plan.corners, samples=samples, noise=plan.posterior[1:]
        )
    assert samples is not None and torch.equal(clean, mean + deviation * plan.posterior[0])
    for number, entry in enumerate(steps):
        for side, (rows, latents) in entry.items():
            for row, latent in zip(rows.tolist(), latents, strict=True):
                top, left = plan.corners[number, row].tolist()
                window = x[row : row + 1]
                if side == 3:
                    window = window[:, :, top : top + 24, left : left + 24]
                noise = plan.posterior[1 + number, row : row + 1, :, :side, :side]
                with torch.no_grad():
                    torch.testing.assert_close(latent[None], vae.encode(window, noise), atol=1e-5, rtol=1e-4)
    loss = [float(train(x, p, None, 1.0).total.detach()) for p in (plan, replace(plan, posterior=None), plan)]
    assert loss[0] == loss[2] != loss[1]


def test_pieces_of_a_batch_see_the_same_samples(sd: None) -> None:
    run = config(SD, "objective.posterior=sample", "crops.per=image", "crops.max_crops=3", "objective.skip=0")
    train, x = module(run), images(4, 64)
    plan = plan_step(run, step=1, samples=IDS[:4])
    together = float(train(x, plan, None, 1.0).total.detach())
    parts = [
        float(train(x[i : i + 2], plan.select(slice(i, i + 2)), None, 1.0).total.detach()) for i in (0, 2)
    ]
    assert together == pytest.approx(sum(parts) / 2, rel=1e-5)


# --------------------------------------------------------------------- mirror


def steps_of(run: TrainConfig, *, rank: int = 0, ranks: int = 1) -> Steps:
    pixels = torch.randint(0, 256, (16, 3, 32, 32), generator=seeded(3), dtype=torch.uint8)
    return Steps(run, MemoryImages(tuple(f"m/{n}" for n in range(16)), pixels), rank=rank, ranks=ranks)


def test_images_are_mirrored_by_their_own_draw() -> None:
    plain, always, half = (steps_of(config(f"data.flip={share}")) for share in (0, 1, 0.5))
    mirrored = []
    for number in range(8):
        a, b, c = (source[number] for source in (plain, always, half))
        assert torch.equal(a.images.flip(-1), b.images)  # type: ignore[union-attr]
        for i in range(8):
            same = torch.equal(c.images[i], a.images[i])  # type: ignore[union-attr]
            assert same or torch.equal(c.images[i], b.images[i])  # type: ignore[union-attr]
            mirrored.append((a.ids[i], not same))  # type: ignore[union-attr]
    assert 16 < sum(flag for _, flag in mirrored) < 48
    by_image: dict[str, set[bool]] = {}
    for name, flag in mirrored:
        by_image.setdefault(name.split("@")[0], set()).add(flag)
    assert any(len(flags) == 2 for flags in by_image.values())  # another epoch draws anew
    pair = [steps_of(config("data.flip=0.5"), rank=rank, ranks=2)[3] for rank in range(2)]
    assert torch.equal(torch.cat([part.images for part in pair]), half[3].images)  # type: ignore[union-attr]


# ---------------------------------------------------------------- whole runs


EVERYTHING = ("crops.per=image", "crops.count_global=false", "crops.global_first_among=all", "data.flip=0.5",
              "model.mask_mode=additive", "objective.skip=0.2", "device_batch=4")  # fmt: skip


def test_a_run_with_every_option_continues_bit_for_bit(tmp_path: Path) -> None:
    def run(output: Path, *more: str) -> Trainer:
        settings = load_config("comit-nano", (*RUN, *EVERYTHING, f"output={output}", *more))
        trainer = Trainer(settings, device="cpu", progress=False)
        trainer.fit()
        return trainer

    straight = run(tmp_path / "a")
    run(tmp_path / "b", "steps=2")
    continued = run(tmp_path / "b")
    files = [t.checkpoints / "step-00000004" / "model.safetensors" for t in (straight, continued)]
    one, other = map(load_file, files)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    logs = [(t.directory / "log.csv").read_text().splitlines() for t in (straight, continued)]
    assert [line.rsplit(",", 1)[0] for line in logs[0]] == [line.rsplit(",", 1)[0] for line in logs[1]]
    crops = [float(row["crops"]) for row in csv.DictReader(logs[0])]
    assert crops[0] == 1 and any(value != int(value) for value in crops[1:])
    exported = straight.directory / "export" / "comit-nano"
    tokenizer: Any = load_tokenizer(str(exported), device="cpu")
    assert tokenizer.model.spec.mask_mode == "additive"
    assert "mask_mode" not in json.loads((exported / "config.json").read_text()).get("comit_bench", {})


def test_training_with_additive_masks_predicts_what_the_released_path_predicts() -> None:
    """Nothing is masked, as in the released weights: the loss is that of the tokenizer's own velocity."""
    run = config("model.mask_mode=additive", "objective.skip=0", "crops.max_crops=1", "crops.global_first=1")
    train, x = module(run), images(3)
    plan = plan_step(run, step=0, samples=IDS[:3])
    model = train.model.eval()
    with torch.no_grad():
        for name, parameter in model.predictor.named_parameters():
            if "qkv.weight" in name or "final_layer.linear.weight" in name:
                parameter.mul_(5.0)  # attention is sharp, and shows
        sent = encode(model, x, CropPolicy(global_crop=True, num_crops=1))
        clean = model.vae.encode(x)  # type: ignore[operator]
        t = plan.times[:, None, None, None]
        velocities = {}
        for mode in ("additive", "hard"):
            noisy = (1 - t) * plan.noise + t * clean
            found = model.predictor(noisy, sent.codes, sent.offset, plan.times, mode).velocity
            velocities[mode] = float((found - (clean - plan.noise)).square().mean())
    loss = float(train.train()(x, plan, None, 1.0).flow.detach())
    assert loss == pytest.approx(velocities["additive"], rel=1e-5)
    assert abs(loss - velocities["hard"]) > 1e-4


# ----------------------------------------------------------- refusals and card


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("objective.posterior=sample",), r"posterior sample needs the SD-VAE.*comit-nano \(dct\)"),
        (("crops.global_first_among=all", "crops.global_first=0.95"), r"0.95 of all images.*0.9 that are"),
        (("data.flip=2",), "data.flip"),
        (("crops.per=rank",), "crops.per"),
    ],
)
def test_what_does_not_fit_is_refused_first(overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_config("comit-nano", overrides)


def test_cards_name_the_choices(sd: None) -> None:
    facts = RunFacts(4, 0, 32, 20, 2, 1.0, "1 x CPU", "command", {})

    def card(*overrides: str) -> str:
        run = config(SD, *overrides)
        return render(run, facts, about(run, Comit(run.model.spec(), small_sd_vae())))

    plain = card()
    for says in ("as they are", "the mode of the autoencoder's posterior", "per step", "at most 4,"):
        assert says in plain
    assert "where none has looked" not in plain
    assert "where none has looked the flow's loss weighs 0.2" in card("crops.unseen_weight=0.2")
    every = card("objective.posterior=sample", *EVERYTHING)
    for says in (
        "mirrored with probability 0.5", "samples of the autoencoder's posterior", "per image",
        "at most 4 and a whole image before them", "among all images", "attention mask: additive",
    ):  # fmt: skip
        assert says in every
