"""Any diffusers VQModel as a tokenizer: equal to diffusers itself, and refused with a reason."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from comit_bench.errors import CorruptFileError, MissingError, UsageError
from comit_bench.tokenizers.base import Tokenizer
from comit_bench.tokenizers.load import load_tokenizer
from comit_bench.tokenizers.vqmodel import VqModelTokenizer

SIZES: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
    "latent_channels": 6,
    "vq_embed_dim": 5,
    "num_vq_embeddings": 37,
    "sample_size": 24,
}
SPATIAL = {
    **SIZES,
    "block_out_channels": (32, 32, 32),
    "norm_type": "spatial",
    "vq_embed_dim": 6,
    "lookup_from_codebook": True,
}


def images(count: int, side: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


@pytest.fixture(params=[SIZES, SPATIAL], ids=["group", "spatial"])
def original(request: pytest.FixtureRequest, tmp_path: Path) -> VQModel:
    model = VQModel(**request.param).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    model.save_pretrained(tmp_path / "vq")
    return model


@pytest.fixture
def folder(original: VQModel, tmp_path: Path) -> Path:
    return tmp_path / "vq"


@pytest.fixture
def tokenizer(folder: Path) -> VqModelTokenizer:
    loaded = load_tokenizer(str(folder), device="cpu")
    assert isinstance(loaded, VqModelTokenizer) and isinstance(loaded, Tokenizer)
    return loaded


def test_equal_to_diffusers(original: VQModel, tokenizer: VqModelTokenizer) -> None:
    x = images(8)
    pixels = x.float() / 127.5 - 1
    with torch.no_grad():
        latents = original.encode(pixels).latents
        quantized, _, (_, _, ids) = original.quantize(latents)
        want = original.decode(latents).sample
    tokens = tokenizer.encode(x)
    assert tokens.ids is not None and torch.equal(tokens.ids, ids.view(8, 36))
    assert len(tokens.ids.unique()) > 3
    torch.testing.assert_close(tokens.codes, quantized.flatten(2).transpose(1, 2), atol=1e-5, rtol=0)
    out = tokenizer.decode(tokens, seeds=range(8))
    assert out.dtype == torch.uint8
    assert ((want.clamp(-1, 1) + 1) * 127.5 - out).abs().max() <= 0.51
    info = tokenizer.info
    assert (info.message_length, info.vocab_size, info.code_dim, info.resolution) == (
        36,
        37,
        tokens.codes.shape[-1],
        24,
    )
    assert info.parameters == sum(p.numel() for p in original.parameters())
    assert info.weights.startswith("sha256:")


def test_batch_size_order_and_round_trip(tokenizer: VqModelTokenizer) -> None:
    x = images(11)
    whole = tokenizer.encode(x).ids
    assert whole is not None
    parts = [tokenizer.encode(x[i : i + 3]).ids for i in range(0, 11, 3)]
    assert torch.equal(torch.cat([p for p in parts if p is not None]), whole)
    assert torch.equal(tokenizer.encode(x.flip(0)).ids, whole.flip(0))  # type: ignore[arg-type]
    assert torch.equal(tokenizer.codes_from_ids(whole), tokenizer.encode(x).codes)
    with pytest.raises(ValueError, match=r"0\.\.36"):
        tokenizer.codes_from_ids(torch.tensor([37]))
    with pytest.raises(ValueError, match=r"\[B, 3, 24, 24\]"):
        tokenizer.encode(images(1, 32))


def test_resolution_is_an_option(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_tokenizer("vqmodel", weights=str(folder), device="cpu", resolution=32)
    assert loaded.info.message_length == 64 and loaded.info.options["resolution"] == "32"
    ids = loaded.encode(images(2, 32)).ids
    assert ids is not None and ids.shape == (2, 64)
    with pytest.raises(UsageError, match="multiple of 4"):
        load_tokenizer(str(folder), device="cpu", resolution=30)
    assert not caplog.records
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sample_size": 32}))
    with caplog.at_level(logging.WARNING):
        load_tokenizer(str(folder), device="cpu")
    assert "resolution=N" in caplog.text


def test_old_attention_names(folder: Path, tokenizer: VqModelTokenizer) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    old = {}
    for key, value in load_file(path).items():
        for new, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f".{new}.", f".{name}.")
        old[key] = value
    assert any(".query." in key for key in old)
    save_file(old, path)
    again = load_tokenizer(str(folder), device="cpu")
    assert torch.equal(again.encode(images(2)).ids, tokenizer.encode(images(2)).ids)  # type: ignore[arg-type]


def test_refusals(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}  # the file itself is overwritten below
    content = path.read_bytes()
    with pytest.raises(UsageError, match="--weights DIR"):
        load_tokenizer("vqmodel", device="cpu")
    with pytest.raises(UsageError, match="no option 'guidance'"):
        load_tokenizer(str(folder), device="cpu", guidance=1)
    with pytest.raises(MissingError, match="no such directory"):
        load_tokenizer("vqmodel", weights=str(tmp_path / "gone"), device="cpu")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(MissingError, match=r"diffusion_pytorch_model\.safetensors of some/vqmodel"):
        load_tokenizer("some/vqmodel", device="cpu", offline=True)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptFileError, match="truncated"):
        load_tokenizer(str(folder), device="cpu")
    save_file({k: v for k, v in tensors.items() if k != "quantize.embedding.weight"}, path)
    with pytest.raises(UsageError, match=r"missing \(1\): quantize.embedding.weight"):
        load_tokenizer(str(folder), device="cpu")
    path.unlink()
    with pytest.raises(MissingError, match=r"diffusion_pytorch_model\.safetensors"):
        load_tokenizer(str(folder), device="cpu")
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(UsageError, match="cannot tell"):
        load_tokenizer(str(folder), device="cpu")
    with pytest.raises(UsageError, match="expected 'VQModel'"):
        load_tokenizer("vqmodel", weights=str(folder), device="cpu")
