"""Training settings: presets, overrides, and everything that is refused before the first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from comit_bench.commands.app import app
from comit_bench.errors import MissingError, UsageError
from comit_bench.tokenizers.comit.crops import CropGeometry
from comit_bench.tokenizers.comit.model import PRESETS
from comit_bench.train.config import TrainConfig, load_config, presets
from comit_bench.train.data import Order, list_images, open_images, paint_scenes
from comit_bench.train.schedule import alignment_ramp, learning_rate
from comit_bench.train.setup import check_device, divide

SOURCE = "data.source=images"


def load(name: str, *overrides: str) -> TrainConfig:
    scenes = name.startswith("comit-nano")
    return load_config(name, overrides if scenes else (SOURCE, *overrides))


@pytest.mark.parametrize("name", sorted(n for n in presets() if n.startswith("comit-")))
def test_every_preset_is_valid(name: str) -> None:
    config = load(name)
    assert config.name == name
    assert presets()[name].read_text().startswith("# ")
    assert config.model.spec().mask_mode == "hard"


@pytest.mark.parametrize("name", ["comit-b", "comit-l", "comit-xl"])
def test_the_paper_presets_are_as_printed(name: str) -> None:
    config = load(name)
    optim, objective = config.optim, config.objective
    assert config.global_batch == 512
    assert config.steps == -(-200 * 1281167 // 512)
    assert (optim.learning_rate, optim.warmup_steps, optim.clip, optim.ema) == (3e-4, 5000, 1.0, 0.999)
    assert (optim.betas, optim.weight_decay) == ((0.9, 0.999), 0.0)
    assert (objective.skip, config.crops.global_first, config.crops.max_crops) == (0.18, 0.55, 9)
    assert (objective.projector_layers, objective.projector_width, objective.backprop_updates) == (3, 768, 1)
    spec = config.model.spec()
    assert (config.teacher.name, spec.representation_layer, spec.image_size) == ("dinov2-b", 4, 256)
    assert divide(config, 32).pieces == (2 if name == "comit-xl" else 1)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("comit-b-no-srepa", {"objective.srepa_weight"}),
        ("comit-b-no-local-crops", {"crops.max_crops", "crops.global_first"}),
        ("comit-b-bottleneck-s", {"model.message_length", "model.fsq_levels", "model.vocab_size"}),
        ("comit-nano-no-srepa", {"objective.srepa_weight", "objective.alignment_ramp", "teacher.name"}),
        ("comit-nano-no-local-crops", {"crops.max_crops", "crops.global_first"}),
    ],
)
def test_ablations_differ_only_where_they_say(name: str, keys: set[str]) -> None:
    def flat(value: dict[str, Any]) -> dict[str, Any]:
        return {
            f"{a}.{b}": c for a, inner in value.items() if isinstance(inner, dict) for b, c in inner.items()
        }

    base = "comit-nano" if "nano" in name else "comit-b"
    one, other = flat(load(name).model_dump()), flat(load(base).model_dump())
    assert {key for key in one if one[key] != other[key]} == keys


def test_overrides_reach_sections() -> None:
    config = load("comit-nano", "train.steps=7", "optim.learning_rate=1e-3", "model.fsq_levels=[5,5,5]")
    assert (config.steps, config.optim.learning_rate) == (7, 1e-3)
    assert config.model.spec().code_dim == 3


def test_a_file_may_extend_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: comit-nano\nname: mine\noptim: {clip: 2.0}\n")
    config = load_config(str(path))
    assert (config.name, config.optim.clip, config.optim.learning_rate) == ("mine", 2.0, 2e-3)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.learning_rat=1", "learning_rate"),
        ("stepz=3", "steps"),
        ("data.kind=webdataset", "data.kind"),
        ("strategy=fsdp2", "strategy: unknown key"),
        ("model.vocab_size=7", "make 1000"),
        ("model.image_size=64", "model.image_size is 64"),
        ("model.width=90", "multiple of heads"),
        ("model.representation_layer=4", "depth"),
        ("model.preset=comit-nanno", "comit-nano"),
        ("crops.max_crops=10", "max_crops"),
        ("objective.backprop_updates=5", "backprop_updates"),
        ("teacher.name=none", "teacher.name is none"),
        ("data.kind=class-folders", "needs data.source"),
        ("sharding=fsdp2", "use optim.name=adam"),
        ("steps=0", "steps"),
        ("steps", "key=value"),
    ],
)
def test_bad_settings_are_refused_with_a_hint(override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load("comit-nano", override)


def test_rules_about_several_keys_say_only_what_is_wrong() -> None:
    with pytest.raises(UsageError) as refused:
        load_config("comit-b")
    assert str(refused.value).endswith(
        "(top level): data.kind class-folders needs data.source: give data.source=DIR"
    )


def test_crops_must_fit_the_patches_and_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    nano = PRESETS["comit-nano"]
    for crop, words in ((10, "multiple of"), (nano.image_size, "smaller than the image")):
        geometry = replace(nano.geometry, crop=crop)
        monkeypatch.setitem(PRESETS, "comit-nano", replace(nano, geometry=geometry))
        with pytest.raises(UsageError, match=words):
            load_config("comit-nano")


def test_crops_need_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    tight = replace(PRESETS["comit-nano"], vae="none", vae_factor=1, in_channels=3, out_channels=3,
                    geometry=CropGeometry(crop=7, half=4))  # fmt: skip
    monkeypatch.setitem(PRESETS, "comit-nano", tight)
    with pytest.raises(UsageError, match=r"7 px leave no room for a 3 x 3 grid .* 8 px.*crops\.places=grid"):
        load_config("comit-nano", ("crops.places=grid", "model.image_size=8"))


def test_latents_may_have_other_channels_and_pixels() -> None:
    changes = ("model.vae_factor=8", "model.in_channels=22", "model.image_size=64")
    spec = load("comit-nano", *changes).model.spec()
    assert (spec.image_size, spec.in_channels, spec.out_channels, spec.max_input_size) == (64, 22, 22, 8)
    assert spec.geometry == CropGeometry(crop=24, half=32)
    for name, change, words in (
        ("comit-nano", "model.vae_factor=8", "image_size is 32, but comit-nano has 64"),
        ("comit-nano", "model.in_channels=13", "12 or 22 or 35 channels of the DCT, got 13"),
        ("comit-nano", "model.vae_factor=2", "3 pixels a side or more, got 2"),
        ("comit-b", "model.vae_factor=4", r"for the DCT, but comit-b has sd-mse"),
    ):
        with pytest.raises(UsageError, match=words):
            load(name, change)


def test_unknown_presets_are_named() -> None:
    with pytest.raises(UsageError, match="comit-nano"):
        load_config("comit-nanoo")


def test_work_is_divided_exactly() -> None:
    config = load("comit-nano", "global_batch=64", "device_batch=8")
    work = divide(config, 2)
    assert (work.ranks, work.pieces, work.device_batch) == (2, 4, 8)
    with pytest.raises(UsageError, match="no multiple of 3 processes"):
        divide(config, 3)
    with pytest.raises(UsageError, match="divisors of 32"):
        divide(load("comit-nano", "device_batch=12"), 2)


def test_devices_are_checked() -> None:
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES"):
        check_device(load("comit-nano"), "cuda:1")
    with pytest.raises(UsageError, match="bfloat16"):
        check_device(load("comit-nano", "precision=bfloat16"), "cpu")


def test_the_schedule_is_the_printed_one() -> None:
    rates = [learning_rate(s, peak=2.0, warmup=100) for s in (0, 49, 99, 399)]
    assert rates == pytest.approx([0.02, 1.0, 2.0, 1.0])
    assert learning_rate(9, peak=2.0, warmup=0) == 2.0
    assert [alignment_ramp(s, 10) for s in (0, 5, 20)] == [0.0, 0.5, 1.0]


def test_order_visits_every_image_once_per_epoch() -> None:
    order = Order(10, seed=3)
    places = [order.places(step, 4) for step in range(5)]
    indices = [number for part in places for number in order.numbers(part).tolist()]
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10))
    assert indices[:10] != indices[10:]
    assert indices[8:12] == Order(10, seed=3).numbers(places[2]).tolist()  # from the step alone


def test_scenes_for_validation_are_no_probe_images() -> None:
    train, held = open_images(load("comit-nano", "data.count=20", "data.val_count=8"))
    assert list(train.ids)[:1] == ["scenes/train/000000"]
    assert {int(name.rsplit("/", 1)[1]) for name in held.ids} == set(range(1000, 1008))
    assert train.read(3).shape == (3, 32, 32)
    with pytest.raises(UsageError, match="splits train and val"):
        paint_scenes("test", 0, 4, 32)


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (40, 50), (i * 9 % 256, 80, 200)).save(folder / f"{i}.png")


def test_directories_with_and_without_splits(tmp_path: Path) -> None:
    write_images(tmp_path / "a" / "train" / "x", 4)
    write_images(tmp_path / "a" / "train" / "y", 1)
    write_images(tmp_path / "a" / "val" / "x", 3)
    write_images(tmp_path / "b" / "deep" / "er", 20)
    write_images(tmp_path / "b" / "deep" / "est", 10)
    folders = ("data.kind=class-folders", "data.val_count=4")
    train, held = open_images(load("comit-nano", *folders, f"data.source={tmp_path}/a"))
    assert (len(train.ids), len(held.ids)) == (5, 3)
    train, held = open_images(load("comit-nano", *folders, f"data.source={tmp_path}/b"))
    assert (len(train.ids), len(held.ids)) == (27, 3)
    assert not set(train.ids) & set(held.ids)
    assert train.read(0).shape == (3, 32, 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no image below it"):
        list_images(tmp_path / "empty")
    with pytest.raises(MissingError, match="no such directory"):
        list_images(tmp_path / "nowhere")


def test_the_command_lists_and_plans() -> None:
    runner = CliRunner()
    listed = runner.invoke(app, ["train", "--list"])
    assert "comit-xl" in listed.stdout
    planned = runner.invoke(
        app, ["train", "--config", "comit-nano", "data.count=64", "device_batch=16", "--dry-run"]
    )
    assert planned.exit_code == 0
    assert "4 pieces x 16 images" in planned.stdout


def test_one_class_folder_is_refused_and_a_flat_folder_is_not(tmp_path: Path) -> None:
    for i in range(6):
        path = tmp_path / "data" / "cats" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i * 20, 0, 0)).save(path)
    folders = ("data.kind=class-folders", "data.val_count=2")
    with pytest.raises(UsageError, match=r"one class folder, cats/.*data\.source="):
        open_images(load("comit-nano", *folders, f"data.source={tmp_path}/data"))
    train, held = open_images(load("comit-nano", *folders, f"data.source={tmp_path}/data/cats"))
    assert len(train.ids) + len(held.ids) == 6
