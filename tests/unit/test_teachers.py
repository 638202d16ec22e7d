"""Teachers: grids, normalisation, freezing, files. DINOv2 is a tiny random stand-in with its geometry."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from comit_bench.nn import teachers
from comit_bench.nn.teachers import (
    DinoTeacher,
    ScenesTeacher,
    ScenesTeacherNet,
    ScenesTeacherSpec,
    fit_grid,
    load_teacher,
    resize_pixels,
)

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
create_model = timm.create_model


def tiny_dino() -> nn.Module:
    network = create_model(
        "vit_small_patch14_dinov2.lvd142m", pretrained=False, dynamic_img_size=True, num_classes=0, **TINY
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return network


@pytest.fixture
def tiny_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What load_teacher makes is small: the real sizes would cost seconds."""

    def make(name: str, **options: object) -> nn.Module:
        assert options == {"pretrained": False, "dynamic_img_size": True, "num_classes": 0}
        return create_model(name, **options, **TINY)

    monkeypatch.setattr(timm, "create_model", make)


def images(side: int = 64, count: int = 2) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("grid", "run"), [(16, 16), (8, 8), (10, 10), (4, 8), (40, 37)])
def test_patches_lie_on_the_token_grid(grid: int, run: int) -> None:
    teacher = DinoTeacher(tiny_dino(), grid=grid)
    assert teacher.run_grid == run
    out = teacher.features(images(32, 1))
    assert out.cls.shape == (1, 32)
    assert out.patches.shape == (1, grid * grid, 32)
    assert teacher.dims == (32, 32)


def test_features_are_timms_of_the_normalised_image() -> None:
    network = tiny_dino()
    x = images(112)
    got = DinoTeacher(network, grid=8).features(x)
    mean, std = (torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        want = network.forward_features(((x + 1) / 2 - mean) / std)
    assert torch.allclose(got.cls, want[:, 0], atol=1e-6)
    assert torch.allclose(got.patches, want[:, 1:], atol=1e-6)


@pytest.mark.parametrize("grid", [4, 8, 12, 16])
def test_patch_features_stay_in_their_place(grid: int) -> None:
    """Row-major, also after resizing: what lies at the top right stays there."""
    patches = torch.zeros(1, 1, 8, 8)
    patches[..., :2, 6:] = 1.0
    row, column = divmod(int(fit_grid(patches, grid)[0, :, 0].argmax()), grid)
    assert row < grid / 4
    assert column >= grid * 3 / 4
    numbered = torch.arange(16.0).view(1, 1, 4, 4)
    assert fit_grid(numbered, 4).flatten().tolist() == list(range(16))


def scenes_network(**changes: int) -> ScenesTeacherNet:
    network = ScenesTeacherNet(ScenesTeacherSpec(**{"width": 16, "depth": 1, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return network


@pytest.mark.parametrize("kind", ["dino", "scenes"])
def test_teachers_are_frozen_and_their_features_fit_into_autograd(kind: str) -> None:
    network = tiny_dino() if kind == "dino" else scenes_network(dim=32)
    teacher = DinoTeacher(network, grid=8) if kind == "dino" else ScenesTeacher(network, grid=8)  # type: ignore[arg-type]
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    x = images(32).requires_grad_()
    out = teacher.features(x)
    assert not out.cls.requires_grad and not out.patches.requires_grad
    head = torch.ones(2, 64, 32, requires_grad=True)
    (head * out.patches).sum().backward()  # refused if they were made in inference mode
    part = out.select(slice(1, 2))
    assert torch.equal(part.patches, out.patches[1:])
    alone = teacher.features(images(32)[1:])
    assert torch.allclose(alone.cls, part.cls, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert teacher.features(images(32)).patches.dtype == torch.float32
    assert torch.equal(out.to("cpu").cls, out.cls)


def test_resizing_leaves_a_fitting_image_alone_and_keeps_colours() -> None:
    x = images(32)
    assert resize_pixels(x, 32) is x
    flat = torch.full((1, 3, 32, 32), 0.25)
    assert torch.allclose(resize_pixels(flat, 112), torch.full((1, 3, 112, 112), 0.25), atol=1e-6)


def test_none_is_no_teacher_and_unknown_names_are_refused() -> None:
    assert load_teacher("none", path=None, grid=8) is None
    with pytest.raises(ValueError, match=r"expected none, .*efficientnet-lite0, scenes-teacher"):
        load_teacher("dino", path=None, grid=8)
    with pytest.raises(ValueError, match="at least one row"):
        DinoTeacher(tiny_dino(), grid=0)


@pytest.mark.usefixtures("tiny_timm")
@pytest.mark.parametrize("file", ["model.safetensors", "dinov2_vitb14_pretrain.pth"])
@pytest.mark.parametrize("as_directory", [True, False])
def test_dino_weights_from_a_file_or_directory(tmp_path: Path, file: str, as_directory: bool) -> None:
    network = tiny_dino()
    tensors = {k: v.detach().clone() for k, v in network.state_dict().items()}
    if file.endswith("pth"):  # the original release has one key more
        torch.save({**tensors, "mask_token": torch.zeros(1, 32)}, tmp_path / file)
    else:
        save_file(tensors, tmp_path / file)
    teacher = load_teacher("dinov2-b", path=tmp_path if as_directory else tmp_path / file, grid=8)
    assert teacher is not None
    want = DinoTeacher(network, grid=8).features(images())
    assert torch.equal(teacher.features(images()).patches, want.patches)


@pytest.mark.usefixtures("tiny_timm")
def test_bad_dino_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file and no directory"):
        load_teacher("dinov2-l", path=tmp_path, grid=8)
    (tmp_path / "a.pth").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a readable weight file"):
        load_teacher("dinov2-l", path=tmp_path, grid=8)
    (tmp_path / "b.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="several weight files"):
        load_teacher("dinov2-l", path=tmp_path, grid=8)
    with pytest.raises(ValueError, match="not a readable safetensors"):
        load_teacher("dinov2-l", path=tmp_path / "b.safetensors", grid=8)
    save_file({"other": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        load_teacher("dinov2-l", path=tmp_path / "b.safetensors", grid=8)


@pytest.mark.usefixtures("tiny_timm")
def test_no_network_is_said_clearly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"teacher\.path") as caught:
        load_teacher("dinov2-b", path=None, grid=8)
    assert "timm/vit_base_patch14_dinov2.lvd142m" in str(caught.value)


def test_scenes_teacher_round_trip_and_its_errors(tmp_path: Path) -> None:
    network = scenes_network(dim=24)
    with pytest.raises(FileNotFoundError, match="directory of its weights"):
        load_teacher("scenes-teacher", path=None, grid=8)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_teacher("scenes-teacher", path=tmp_path, grid=8)
    (tmp_path / "config.json").write_text(json.dumps(asdict(network.spec)))
    save_file(network.state_dict(), tmp_path / teachers.WEIGHTS)
    teacher = load_teacher("scenes-teacher", path=tmp_path, grid=8)
    assert teacher is not None
    assert teacher.dims == (24, 24)
    got = teacher.features(images(32))
    assert got.cls.shape == (2, 24)
    assert got.patches.shape == (2, 64, 24)
    assert torch.equal(got.cls, ScenesTeacher(network, grid=8).features(images(32)).cls)
    (tmp_path / "config.json").write_text('{"width": 12}')
    with pytest.raises(ValueError, match="multiple of 8"):
        load_teacher("scenes-teacher", path=tmp_path, grid=8)
    (tmp_path / "config.json").write_text('{"wdth": 12}')
    with pytest.raises(ValueError, match="its keys are image_size"):
        load_teacher("scenes-teacher", path=tmp_path, grid=8)
    (tmp_path / "config.json").write_text('{"width": 32}')
    with pytest.raises(ValueError, match="does not fit"):
        load_teacher("scenes-teacher", path=tmp_path, grid=8)
