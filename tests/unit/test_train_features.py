"""The teacher's features on disk: the same bits as computed ones, whole or absent, refused without room."""

from __future__ import annotations

import pickle
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from versions import needs_muon

from comit_bench.errors import BenchError, CorruptFileError, MissingError
from comit_bench.nn.teachers import (
    ScenesTeacher,
    ScenesTeacherNet,
    ScenesTeacherSpec,
    TeacherFeatures,
    weights_digest,
)
from comit_bench.train import features as module
from comit_bench.train.config import TeacherConfig, load_config
from comit_bench.train.data import FolderImages, MemoryImages
from comit_bench.train.features import (
    FeatureStore,
    compute_features,
    images_digest,
    layout_for,
    open_features,
)
from comit_bench.train.loop import Trainer

COUNT, TOKENS, DIM = 11, 4, 8
CPU = torch.device("cpu")


def images(count: int = COUNT) -> MemoryImages:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return MemoryImages(tuple(f"i/{n:03d}" for n in range(count)), pixels)


def network(seed: int = 0) -> ScenesTeacherNet:
    net = ScenesTeacherNet(ScenesTeacherSpec(width=8, depth=1, dim=DIM))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return net


class Counting:
    """A teacher that knows how many images it saw, and may be killed."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.teacher = ScenesTeacher(network(), grid=2)
        self.dims, self.seen, self.fail_at = self.teacher.dims, 0, fail_at

    def features(self, pixels: torch.Tensor) -> TeacherFeatures:
        if self.seen == self.fail_at:
            raise KeyboardInterrupt
        self.seen += pixels.shape[0]
        return self.teacher.features(pixels)

    def identity(self) -> dict[str, object]:
        return self.teacher.identity()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SHARD_BYTES", 4 * (4 * DIM * (1 + TOKENS) + 1))  # four images each


def store(source: Any, teacher: Any, dtype: str = "float32") -> FeatureStore:
    return open_features(
        TeacherConfig(name="scenes-teacher", cache="disk", cache_dtype=dtype), teacher, source,
        tokens=TOKENS, data=images_digest(source), device=CPU, precision="float32",
    )  # fmt: skip


def direct(source: MemoryImages, rows: list[int]) -> TeacherFeatures:
    pixels = source.images[rows].float().div(255).sub(0.5).div(0.5)
    return compute_features(ScenesTeacher(network(), grid=2), pixels)


def test_stored_features_have_the_same_bits_in_any_order() -> None:
    source, teacher = images(), Counting()
    filled = store(source, teacher)
    assert (filled.num_shards, filled.missing()) == (3, [0, 1, 2])
    assert filled.fill(source, teacher, device=CPU) == teacher.seen == COUNT
    rows = [10, 0, 4, 3, 0]
    for reader in (filled, pickle.loads(pickle.dumps(filled))):
        found, expected = reader.take(rows), direct(source, rows)
        assert torch.equal(found.cls, expected.cls)
        assert torch.equal(found.patches, expected.patches)
        assert found.patches.shape == (5, TOKENS, DIM)
    again = store(source, teacher)
    assert again.fill(source, teacher, device=CPU) == 0
    assert teacher.seen == COUNT
    assert b"_shards" in pickle.dumps(filled)
    assert len(pickle.dumps(filled)) < 2000


def test_an_image_does_not_notice_its_company() -> None:
    source = images()
    one, all_ = direct(source, [7]), direct(source, list(range(COUNT)))
    assert torch.equal(one.patches[0], all_.patches[7])


def test_half_precision_rounds_and_halves() -> None:
    source, teacher = images(), Counting()
    whole, half = store(source, teacher), store(source, teacher, "float16")
    assert whole.digest != half.digest
    for place in (whole, half):
        place.fill(source, teacher, device=CPU)
    found, exact = half.take(range(COUNT)), whole.take(range(COUNT))
    assert found.cls.dtype == torch.float32
    assert torch.equal(found.cls, exact.cls.half().float())
    assert not torch.equal(found.cls, exact.cls)
    assert half.layout.nbytes(1000) - 1000 == (whole.layout.nbytes(1000) - 1000) // 2


def test_the_key_names_what_can_change_a_feature(tmp_path: Path) -> None:
    source, teacher = images(), Counting()
    first = store(source, teacher)
    other = MemoryImages(source.ids, source.images.flip(0))
    assert store(other, teacher).digest != first.digest
    assert store(MemoryImages(source.ids[::-1], source.images), teacher).digest != first.digest
    assert store(source, teacher).digest == first.digest
    teacher.teacher.grid = 1
    assert store(source, teacher).digest != first.digest
    assert weights_digest(network(1)) != weights_digest(network(0)) == weights_digest(network(0))
    for size in (20, 30):
        Image.new("RGB", (size, size), (size, 1, 2)).save(tmp_path / "a.png")
        folder = FolderImages(tmp_path, ("a.png",), "resize(32,bilinear)")
        digests = {images_digest(folder), images_digest(FolderImages(tmp_path, ("a.png",), "resize(8,box)"))}
        assert len(digests) == 2
    with pytest.raises(MissingError, match=r"b\.png"):
        images_digest(FolderImages(tmp_path, ("b.png",), "resize(32,bilinear)"))


class Elsewhere:
    """A source of another kind."""

    def __init__(self, held: MemoryImages) -> None:
        self.held, self.ids = held, held.ids

    def read(self, index: int) -> torch.Tensor:
        return self.held.read(index)


def test_other_sources_are_sampled() -> None:
    held = images()
    assert images_digest(Elsewhere(held)) == images_digest(Elsewhere(held))
    changed = MemoryImages(held.ids, 255 - held.images)
    assert images_digest(Elsewhere(changed)) != images_digest(Elsewhere(held))
    renamed = MemoryImages(tuple(name + "x" for name in held.ids), held.images)
    assert images_digest(Elsewhere(renamed)) != images_digest(Elsewhere(held))


def test_two_processes_write_disjoint_shards_and_a_kill_costs_one() -> None:
    source = images()
    killed = Counting(fail_at=5)
    with pytest.raises(KeyboardInterrupt):
        store(source, killed).fill(source, killed, device=CPU)
    assert store(source, killed).missing() == [1, 2]
    first, second = Counting(), Counting()
    assert store(source, first).fill(source, first, device=CPU, rank=0, ranks=2) == 3  # shard 2
    assert store(source, second).fill(source, second, device=CPU, rank=1, ranks=2) == 4  # shard 1
    assert torch.equal(
        store(source, first).take(range(COUNT)).patches, direct(source, list(range(COUNT))).patches
    )
    with pytest.raises(KeyboardInterrupt):
        asked = open_features(
            TeacherConfig(), first, source, tokens=TOKENS, data="x", device=CPU, precision="float32"
        )
        asked.fill(source, first, device=CPU, stopped=lambda: True)


def test_damaged_parts_are_found_and_made_again() -> None:
    source, teacher = images(), Counting()
    filled = store(source, teacher)
    filled.fill(source, teacher, device=CPU)
    path = filled.shard_path(1)
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    (filled.shard_path(0)).write_bytes(b"short")
    with pytest.raises(CorruptFileError, match="shard-000000"):
        store(source, teacher).take([0])
    assert store(source, teacher).fill(source, teacher, device=CPU) == 8
    shutil.rmtree(filled.directory)
    with pytest.raises(MissingError, match="same cache directory"):
        store(source, teacher).take([5])


def test_broken_images_are_kept_as_broken(tmp_path: Path) -> None:
    for n in range(6):
        Image.new("RGB", (32, 32), (n * 40, 9, 9)).save(tmp_path / f"{n}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    source = FolderImages(tmp_path, tuple(f"{n}.png" for n in range(6)), "center_crop|resize(32,bilinear)")
    teacher = Counting()
    filled = store(source, teacher)
    filled.fill(source, teacher, device=CPU, workers=2)
    assert teacher.seen == 5
    assert np.isfinite(filled.take([0, 1, 3, 5]).cls.numpy()).all()
    with pytest.raises(BenchError, match=r"image 2 was broken .*2\.png"):
        filled.take([1, 2])


def test_no_room_is_said_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    with pytest.raises(BenchError, match=r"11 images need 0\.0 GB, but 0\.0 GB .*cache_dtype=float16"):
        store(images(), Counting())
    huge = layout_for(1_281_167, (768, 768), 256, "float32")
    assert round(huge.nbytes(huge.count) / 1e9) == 1011


def test_numbers_too_large_for_half_precision_are_refused() -> None:
    source, teacher = images(), Counting()
    with torch.no_grad():
        teacher.teacher.network.to_cls.weight.mul_(1e6)
    with pytest.raises(BenchError, match="not finite as float16"):
        store(source, teacher, "float16").fill(source, teacher, device=CPU)


@needs_muon
@pytest.mark.parametrize("repa", ["0.5", "0"])
def test_training_with_and_without_the_cache_is_bit_equal(tmp_path: Path, repa: str) -> None:
    """Three epochs, a broken image that the next one replaces, pieces of four images. Without REPA no
    patches are kept."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    net = network()
    (folder / "config.json").write_text('{"width": 8, "depth": 1, "dim": 8}')
    save_file(net.state_dict(), folder / "model.safetensors")
    (tmp_path / "data").mkdir()
    for n in range(12):
        picture = Image.new("RGB", (32, 32), (n * 20, 200 - n * 9, 40))
        picture.paste((250, 250, 250), (0, 0, 9, 32))
        picture.save(tmp_path / "data" / f"{n:02d}.png")
    (tmp_path / "data" / "04.png").write_bytes(b"no image")
    common = (
        "model.depth=1", "model.width=16", "model.heads=2", "model.message_length=4", "data.max_broken=0.5",
        "model.representation_layer=0", "global_batch=8", "device_batch=4", "steps=4", "data.val_count=2",
        "optim.warmup_steps=1", "curriculum=[]", f"objective.repa_weight={repa}", "save_every=2",
        "objective.srepa_weight=0.5", "objective.projector_width=8", "teacher.name=scenes-teacher",
        f"teacher.path={folder}", "data.kind=class-folders", f"data.source={tmp_path / 'data'}",
    )  # fmt: skip

    def run(name: str, *more: str) -> dict[str, torch.Tensor]:
        config = load_config("comit-nano", (*common, f"output={tmp_path / name}", *more))
        trainer = Trainer(config, device="cpu", progress=False)
        assert trainer.fit() is not None
        used = [trainer.steps[n] for n in range(4)]
        assert all((b.features is not None) == ("teacher.cache=disk" in more) for b in used)  # type: ignore[union-attr]
        if used[0].features is not None:  # type: ignore[union-attr]
            assert used[0].features.patches.shape[1] == (64 if repa == "0.5" else 0)  # type: ignore[union-attr]
        return load_file(trainer.checkpoints / "step-00000004" / "model.safetensors")

    plain, cached = run("plain", "teacher.cache=none"), run("cached", "teacher.cache=disk")
    assert plain.keys() == cached.keys()
    assert all(torch.equal(plain[key], cached[key]) for key in plain)
    if repa == "0":
        turned = [
            run(f"turned-{cache}", "data.flip=0.5", f"teacher.cache={cache}") for cache in ("none", "disk")
        ]
        assert all(torch.equal(turned[0][key], turned[1][key]) for key in plain)
        assert not all(torch.equal(turned[0][key], plain[key]) for key in plain)
    shutil.copytree(tmp_path / "plain", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "comit-nano" / "checkpoints" / "step-00000004")
    resumed = run("moved", "teacher.cache=disk")  # switching the cache on changes nothing
    assert all(torch.equal(plain[key], resumed[key]) for key in plain)
    half = run("half", "teacher.cache=disk", "teacher.cache_dtype=float16")
    assert not all(torch.equal(plain[key], half[key]) for key in plain)
