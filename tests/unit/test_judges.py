"""Networks that judge or teach: damaged or mistyped weights are refused where they are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from judges import write_random_inception, write_random_squeezenet
from safetensors.torch import load_file, save_file
from torch import Tensor

from comit_bench.errors import BenchError, CorruptFileError, UsageError
from comit_bench.metrics import perceptual
from comit_bench.nn.teachers import ScenesTeacherNet, ScenesTeacherSpec, load_teacher
from comit_bench.nn.text import random_t5
from comit_bench.recipes.kinds import TextSpec
from comit_bench.tasks.text import find_text_encoder

CPU = torch.device("cpu")
DAMAGE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nan": (lambda t: t * float("nan"), "NaN or infinite"),
    "infinity": (lambda t: t + float("inf"), "NaN or infinite"),
    "whole numbers": (lambda t: t.long(), "is int64, expected floating-point"),
    "bits": (lambda t: t.bool(), "is bool, expected floating-point"),
}
every_damage = pytest.mark.parametrize("kind", DAMAGE)


def damaged(tensors: dict[str, Tensor], key: str, kind: str) -> dict[str, Tensor]:
    return {k: DAMAGE[kind][0](v) if k == key else v.clone() for k, v in tensors.items()}


@every_damage
def test_scenes_teacher(tmp_path: Path, kind: str) -> None:
    network = ScenesTeacherNet(ScenesTeacherSpec(width=16, depth=1, dim=8))
    (tmp_path / "config.json").write_text(json.dumps(asdict(network.spec)))
    save_file(damaged(network.state_dict(), "stem.weight", kind), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"stem\.weight .*{DAMAGE[kind][1]}"):
        load_teacher("scenes-teacher", path=tmp_path, grid=8)


@pytest.mark.parametrize("value", [10**9, 0, True, "64", 1.5, None, []])
@pytest.mark.parametrize("key", ["width", "depth", "image_size"])
def test_scenes_teacher_sizes(tmp_path: Path, key: str, value: object) -> None:
    if key == "depth" and value == 0 and value is not False:
        return  # a teacher without residual blocks is one
    (tmp_path / "config.json").write_text(json.dumps({key: value}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"no scenes-teacher \({key} must be"):
        load_teacher("scenes-teacher", path=tmp_path, grid=8)


@every_damage
@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_dino(tmp_path: Path, kind: str, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **options, **sizes))
    network = timm.create_model("vit_base_patch14_dinov2.lvd142m", dynamic_img_size=True, num_classes=0)
    good = {prefix + k: v for k, v in network.state_dict().items()}
    torch.save({"teacher": good, "epoch": 3}, tmp_path / "x.pth")
    assert load_teacher("dinov2-b", path=tmp_path / "x.pth", grid=8) is not None
    torch.save({"teacher": damaged(good, f"{prefix}blocks.0.mlp.fc1.weight", kind)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=rf"blocks\.0\.mlp\.fc1\.weight .*{DAMAGE[kind][1]}"):
        load_teacher("dinov2-b", path=tmp_path / "x.pth", grid=8)


@pytest.mark.parametrize("kind", ["nan", "whole numbers"])
def test_inception(tmp_path: Path, kind: str) -> None:
    path = write_random_inception(tmp_path / "inception.pth")
    tensors = torch.load(path, weights_only=True)
    torch.save({"state_dict": damaged(tensors, "Conv2d_1a_3x3.conv.weight", kind)}, path)
    with pytest.raises(CorruptFileError, match=rf"Conv2d_1a_3x3\.conv\.weight .*{DAMAGE[kind][1]}"):
        perceptual.InceptionFeatures(path, CPU)


@pytest.mark.parametrize("kind", ["infinity", "bits"])
def test_lpips(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    write_random_squeezenet(tmp_path)
    (path,) = tmp_path.rglob("squeezenet*.pth")
    tensors = torch.load(path, weights_only=True)
    torch.save(damaged(tensors, "features.0.weight", kind), path)
    with pytest.raises(CorruptFileError, match=rf"features\.0\.weight .*{DAMAGE[kind][1]}"):
        perceptual.load_lpips("squeeze", CPU)
    torch.save({"features.0.weight": torch.zeros(3)}, path)
    with pytest.raises(CorruptFileError, match="not the weights that LPIPS"):
        perceptual.load_lpips("squeeze", CPU)


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    random_t5(["above", "red"], seed=0).save_pretrained(tmp_path)
    pieces = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "above": 2, "red": 3}, unk_token="</s>"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>").save_pretrained(tmp_path)
    return tmp_path


def features(folder: Path) -> Tensor:
    return find_text_encoder(TextSpec(encoder=str(folder)), offline=True).features(["red"], None)


@every_damage
def test_text_encoder(t5: Path, kind: str) -> None:
    assert features(t5).isfinite().all()
    path, key = t5 / "model.safetensors", "encoder.block.0.layer.0.SelfAttention.q.weight"
    tensors = load_file(path)
    save_file(damaged(tensors, key, kind), path, metadata={"format": "pt"})
    says = DAMAGE[kind][1].replace("int64", "I64").replace("bool", "BOOL").partition(",")[0]
    with pytest.raises(CorruptFileError, match=rf"q\.weight .*{says}"):
        features(t5)


def test_text_encoder_without_some_weights(t5: Path) -> None:
    """transformers only warns, and draws what is missing at random."""
    path, key = t5 / "model.safetensors", "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    save_file({k: v.clone() for k, v in load_file(path).items() if k != key}, path, metadata={"format": "pt"})
    with pytest.raises(
        CorruptFileError, match=r"lacks weights of the T5 encoder: .*DenseReluDense\.wo\.weight"
    ):
        features(t5)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"num_layers": 10**9}, "num_layers"), ({"num_heads": 0}, "num_heads"), ({"d_model": "64"}, "d_model")],
)
def test_text_encoder_sizes(t5: Path, change: dict[str, Any], says: str) -> None:
    config = json.loads((t5 / "config.json").read_text())
    (t5 / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UsageError, match=rf"config\.json: {says} must be"):
        features(t5)
    (t5 / "config.json").write_text("[]")
    with pytest.raises(BenchError, match=r"config\.json"):
        features(t5)
