"""Scenes of drawings as training images: painted once, whole or absent, told apart by all that makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretend_cuda import pretend_cuda
from versions import needs_muon

from comit_bench import load_tokenizer
from comit_bench.data.scenes.painting import paint
from comit_bench.errors import CorruptFileError, UsageError
from comit_bench.recipes.specs import GeneratorSpec
from comit_bench.train import drawings
from comit_bench.train.config import AutoencoderRun, TrainConfig, load_config
from comit_bench.train.data import MemoryImages, Steps, TrainBatch, open_images
from comit_bench.train.drawings import paint_drawings
from comit_bench.train.loop import Trainer
from comit_bench.train.objectives.autoencoder import AutoencoderObjective, make_network
from comit_bench.train.objectives.base import Process

MODEL = ("model.depth=1", "model.width=16", "model.heads=2", "model.message_length=4",
         "model.representation_layer=0", "model.vae_factor=8", "model.in_channels=22", "model.image_size=64",
         "teacher.name=none", "objective.srepa_weight=0")  # fmt: skip
DATA = ("data.kind=drawings", "data.count=24", "data.val_count=12")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(drawings, "AT_ONCE", 7)


def folders(tmp_path: Path) -> list[Path]:
    return sorted(p for p in (tmp_path / "cache" / "training-scenes").iterdir() if p.is_dir())


def test_scenes_are_the_painter_s_and_painted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, concepts = paint_drawings("train", 3, 20, 64)
    spec = GeneratorSpec(name="drawings", layout="mixture", image_size=64)
    scenes = paint(spec, "train", range(3, 23))
    assert np.array_equal(images.numpy(), scenes.images.transpose(0, 3, 1, 2))
    alone = (scenes.boxes[..., 2] > 0).sum(axis=1) == 1
    assert np.array_equal(concepts.numpy(), np.where(alone, scenes.concepts[:, 0], -1))
    (folder,) = folders(tmp_path)
    assert {path.name for path in folder.iterdir()} == {"images.npy", "concepts.npy", "key.json"}

    painted: list[int] = []
    monkeypatch.setattr(drawings, "paint", lambda s, p, rows: painted.append(len(rows)) or paint(s, p, rows))
    again, _ = paint_drawings("train", 3, 20, 64)
    assert torch.equal(again, images) and painted == [drawings.PROOF]
    for other in (("val", 3, 20, 64), ("train", 4, 20, 64), ("train", 3, 21, 64)):
        paint_drawings(*other)
    assert len(folders(tmp_path)) == 4


def test_several_processes_paint_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, concepts = (tensor.clone() for tensor in paint_drawings("train", 3, 20, 64))
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path / "other"))
    again, shown = paint_drawings("train", 3, 20, 64, workers=2)
    assert torch.equal(again, images) and torch.equal(shown, concepts)


def test_images_and_noise_on_the_device() -> None:
    config = load_config("comit-nano", (*MODEL, *DATA, "global_batch=8", "data.flip=0.5"))
    assert isinstance(config, TrainConfig)
    source, _ = open_images(config)
    here, there = Steps(config, source)[5], Steps(config, source, device=torch.device("cpu"))[5]
    assert isinstance(here, TrainBatch) and isinstance(there, TrainBatch)
    assert torch.equal(there.images, here.images) and there.ids == here.ids
    assert torch.equal(there.plan.times, here.plan.times)
    torch.testing.assert_close(there.plan.noise, here.plan.noise, rtol=1e-4, atol=1e-5)
    with pretend_cuda():
        batch = Steps(config, source, device=torch.device("cuda"))[5]
        assert isinstance(batch, TrainBatch)
        assert batch.images.device.type == batch.plan.noise.device.type == "cuda"
        assert torch.equal(batch.images.cpu(), here.images)


@needs_muon
def test_a_training_with_its_images_on_the_device(tmp_path: Path) -> None:
    often = ("global_batch=4", "steps=2", "data.on_device=true", "validation.steps=1", "curriculum=[]")
    config = load_config("comit-nano", (*MODEL, *DATA, *often, f"output={tmp_path}"))
    exported = Trainer(config, device="cpu", progress=False).fit()
    assert exported is not None and load_tokenizer(str(exported), device="cpu").info.trained


@pytest.mark.parametrize("wrong", ["data.workers=1", "data.kind=class-folders"])
def test_what_cannot_lie_on_the_device(wrong: str) -> None:
    with pytest.raises(UsageError, match=r"data.on_device is for images that are painted"):
        load_config("comit-nano", ("data.source=x", "data.on_device=true", wrong))


@pytest.mark.parametrize("name", ["vq-grid-nano", "titok-nano"])
def test_autoencoders_find_their_images_on_the_device(name: str) -> None:
    settings = ("data=drawings", "image_size=64", "count=24", "val_count=4", "batch=4", "flip=0.5")
    config = load_config(name, (*settings, "on_device=true"))
    assert isinstance(config, AutoencoderRun)
    plain = AutoencoderObjective(config.model_copy(update={"on_device": False}), Process(torch.device("cpu")))
    with pretend_cuda():
        objective = AutoencoderObjective(config, Process(torch.device("cuda")))
        objective.build()
        (shown,) = objective.inputs(objective.steps[3], slice(None))
        assert objective.pixels.device.type == shown.device.type == "cuda"
        assert torch.equal(shown.cpu(), plain.inputs(plain.steps[3], slice(None))[0])
        assert objective.validate(objective.network)[0]["psnr"] > 0


def test_another_painter_does_not_meet_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint_drawings("val", 0, 9, 64)

    def darker(spec: Any, split: Any, rows: Any) -> Any:
        scenes = paint(spec, split, rows)
        scenes.images[:] //= 2
        return scenes

    monkeypatch.setattr(drawings, "paint", darker)
    images, _ = paint_drawings("val", 0, 9, 64)
    assert len(folders(tmp_path)) == 2 and int(images.max()) <= 127


def test_a_kill_while_painting_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(spec: Any, split: Any, rows: range) -> Any:
        if rows.start >= 7:
            raise KeyboardInterrupt
        return paint(spec, split, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(drawings, "paint", interrupted)
        paint_drawings("train", 0, 20, 64)
    assert not folders(tmp_path)
    assert paint_drawings("train", 0, 20, 64)[0].shape == (20, 3, 64, 64)


def test_what_cannot_be_painted_or_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="drawings have the splits train and val"):
        paint_drawings("test", 0, 8, 64)
    with pytest.raises(UsageError, match=r"image_size = 32.*do not fit"):
        paint_drawings("train", 0, 8, 32)
    paint_drawings("train", 0, 9, 64)
    (folder,) = folders(tmp_path)
    content = (folder / "images.npy").read_bytes()
    (folder / "images.npy").write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptFileError, match=r"not the painted scenes .* Remove this folder"):
        paint_drawings("train", 0, 9, 64)


def test_train_and_validation_are_other_hands_and_other_numbers() -> None:
    train, held = open_images(load_config("comit-nano", (*MODEL, *DATA)))  # type: ignore[arg-type]
    assert isinstance(train, MemoryImages) and isinstance(held, MemoryImages)
    assert (train.ids[0], held.ids[0]) == ("drawings/train/0000000", "drawings/val/0000000")
    assert held.labels is not None and bool((held.labels >= 0).any()) and bool((held.labels < 0).any())
    same = load_config("comit-nano", (*MODEL, *DATA, "data.val_split=train"))
    assert open_images(same)[1].ids[0] == "drawings/train/0000024"  # type: ignore[arg-type]


@needs_muon
def test_a_run_on_drawings_trains_measures_and_exports(tmp_path: Path) -> None:
    more = ("global_batch=8", "steps=2", "save_every=2", "validate_every=2", "validation.steps=1",
            "validation.pictures=1", "log_every=1", f"output={tmp_path}", "crops.places=grid",
            "crops.count=uniform", "crops.max_crops=9", "curriculum=[]", "data.flip=0.5")  # fmt: skip
    trainer = Trainer(load_config("comit-nano", (*MODEL, *DATA, *more)), device="cpu", progress=False)
    folder = trainer.fit()
    assert folder is not None and {"gather_random_9", "read_random_9"} <= trainer.metrics.keys()
    tokenizer: Any = load_tokenizer(str(folder), device="cpu")
    assert tokenizer.info.training_data == "drawings train (24 scenes)"
    spec = tokenizer.model.spec
    assert (spec.image_size, spec.in_channels, spec.geometry.crop, spec.geometry.half) == (64, 22, 24, 32)
    card = (folder / "README.md").read_text()
    assert "any number alike per step, at most 9, 24 px at different cells of the 3 x 3 grid" in card


@pytest.mark.parametrize("model", ["vq-grid-nano", "titok-nano"])
def test_autoencoders_see_the_images_of_a_comit_run(model: str) -> None:
    common = ("seed=3", "data.flip=0.5")
    comit = load_config("comit-nano", (*MODEL, *DATA, *common, "global_batch=16", "curriculum=[]"))
    run = load_config(model, ("seed=3", "flip=0.5", "data=drawings", "count=24", "val_count=12", "batch=16",
                              "image_size=64"))  # fmt: skip
    assert isinstance(run, AutoencoderRun)
    objective = AutoencoderObjective(run, Process(torch.device("cpu")))
    objective.build()
    steps = Steps(comit, open_images(comit)[0])  # type: ignore[arg-type]
    for step in (0, 3):
        batch = steps[step]
        assert isinstance(batch, TrainBatch)
        parts = [objective.inputs(objective.steps[step], rows)[0] for rows in (slice(0, 6), slice(6, 16))]
        assert torch.equal(torch.cat(parts), batch.images)
    spec = objective.network.spec
    assert (spec.image_size, spec.message_length) == (64, 16)
    assert torch.isfinite(objective.module(batch.images)).all()
    assert make_network(run.model_copy(update={"image_size": None})).spec.image_size == 32
    with pytest.raises(UsageError, match="50 px cannot be cut into as many patches as 32 px"):
        make_network(run.model_copy(update={"image_size": 50}))
