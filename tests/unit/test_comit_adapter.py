"""The COMiT adapter: released files, round trips, refusals, batch invariance."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import comit_bench.nn.vae as vae_module
from comit_bench.errors import MissingError
from comit_bench.seeding import generator_for
from comit_bench.tokenizers.base import Tokenizer, Tokens, in_tiles
from comit_bench.tokenizers.checkpoints import on_meta
from comit_bench.tokenizers.comit.adapter import ComitTokenizer
from comit_bench.tokenizers.comit.checkpoint import (
    build,
    config_from_spec,
    save,
    spec_from_config,
)
from comit_bench.tokenizers.comit.model import PRESETS
from comit_bench.tokenizers.load import load_tokenizer

CASE = Path(__file__).parents[1] / "parity" / "cases" / "comit" / "small_d3_b2"
SMALL_VAE = replace(vae_module.SD_VAE, widths=(8, 8, 16, 16), groups=4)


@pytest.fixture
def nano() -> ComitTokenizer:
    tokenizer = load_tokenizer("comit-nano", weights="random", device="cpu")
    assert isinstance(tokenizer, ComitTokenizer) and isinstance(tokenizer, Tokenizer)
    return tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path, nano: ComitTokenizer) -> Path:
    nano.save(tmp_path / "ck")
    return tmp_path / "ck"


def images(count: int, side: int = 32) -> Tensor:
    g = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, side, side), generator=g, dtype=torch.uint8)


def generators(count: int) -> list[torch.Generator]:
    return [generator_for(0, f"image-{i}") for i in range(count)]


def test_round_trip_through_the_released_layout(checkpoint: Path, nano: ComitTokenizer) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert {"predictor", "quantizer", "vae"} <= set(config) and config["vae"] == {
        "_target_": "dct_vae",
        "factor": 4,
    }
    assert all(key.startswith("predictor.") for key in load_file(checkpoint / "model.safetensors"))
    again = load_tokenizer(str(checkpoint), device="cpu")
    assert again.info.weights.startswith("sha256:")
    assert torch.equal(again.encode(images(4)).ids, nano.encode(images(4)).ids)  # type: ignore[arg-type]
    other = load_tokenizer("comit-nano", weights=str(checkpoint), device="cpu")
    assert other.info.name == "comit-nano" and other.info.weights == again.info.weights


@pytest.mark.parametrize("name", list(PRESETS))
def test_config_round_trip(name: str) -> None:
    spec = PRESETS[name]
    assert replace(spec_from_config(config_from_spec(spec), Path("x")), vae_factor=spec.vae_factor) == spec


def test_parity_case_saves_what_it_loaded(tmp_path: Path) -> None:
    model = load_tokenizer(str(CASE), device="cpu", offline=True).model
    save(model, tmp_path, config=json.loads((CASE / "config.json").read_text()))
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (CASE / "config.json").read_text()
    )
    before, after = load_file(CASE / "weights.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k].float(), after[k]) for k in before)


def test_unused_tensors_may_be_absent(checkpoint: Path, nano: ComitTokenizer) -> None:
    path = checkpoint / "model.safetensors"
    kept = {k: v for k, v in load_file(path).items() if "y_pos_offset" not in k and "c_final_layer" not in k}
    save_file(kept, path)
    again = load_tokenizer(str(checkpoint), device="cpu")
    assert torch.equal(again.encode(images(2)).ids, nano.encode(images(2)).ids)  # type: ignore[arg-type]


def _with_small_vae(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    monkeypatch.setattr(vae_module, "SD_VAE", SMALL_VAE)
    spec = replace(PRESETS["comit-b"], depth=1, width=32, heads=2, message_length=4, max_input_size=32)
    torch.manual_seed(0)
    model = build(spec).eval()
    model.predictor.init_weights(torch.Generator().manual_seed(0), zero_gates=False)
    save(model, tmp_path / "full")
    return tmp_path / "full", load_file(tmp_path / "full" / "model.safetensors")


def test_sd_vae_inside_the_checkpoint_or_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full, tensors = _with_small_vae(monkeypatch, tmp_path)
    inside = load_tokenizer(str(full), device="cpu")
    x = images(2, 256)
    ids = inside.encode(x).ids
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((full / "config.json").read_text())
    save_file({k: v for k, v in tensors.items() if k.startswith("predictor.")}, bare / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(MissingError, match="sd-vae-ft-mse"):
        load_tokenizer(str(bare), device="cpu", offline=True)
    (bare / "vae").mkdir()
    own = {k.removeprefix("vae.vae."): v for k, v in tensors.items() if k.startswith("vae.vae.")}
    legacy = {  # the attention names and shapes that the hub's own file still has
        k.replace("to_q", "query")
        .replace("to_k", "key")
        .replace("to_v", "value")
        .replace("to_out.0", "proj_attn"): v
        for k, v in own.items()
    }
    save_file(legacy, bare / "vae" / "diffusion_pytorch_model.safetensors")
    beside = load_tokenizer(str(bare), device="cpu", offline=True)
    assert torch.equal(beside.encode(x).ids, ids)  # type: ignore[arg-type]
    assert inside.decode(inside.encode(x), seeds=[0, 1]).shape == (2, 3, 256, 256)


def test_posterior_sampling_is_seeded_per_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full, _ = _with_small_vae(monkeypatch, tmp_path)
    sampled = load_tokenizer(str(full), device="cpu", posterior="sample")
    x = images(2, 256)
    once = sampled.encode(x, policy="global+raster:3", generators=generators(2)).ids
    alone = sampled.encode(x[1:], policy="global+raster:3", generators=generators(2)[1:]).ids
    assert once is not None and alone is not None and torch.equal(once[1], alone[0])
    with pytest.raises(ValueError, match="generators"):
        sampled.encode(x)
    assert sampled.info.options["posterior"] == "sample"


def test_released_vae_has_the_keys_of_the_spec() -> None:
    keys = [k for k in on_meta(build, PRESETS["comit-b"]).state_dict() if k.startswith("vae.vae.")]
    assert len(keys) == 248 and any("to_out.0" in k for k in keys)


def test_in_tiles_pads_and_cuts() -> None:
    sizes: list[int] = []

    def double(x: Tensor) -> Tokens:
        sizes.append(len(x))
        return Tokens(None, x * 2)

    x = torch.arange(19.0)
    assert torch.equal(in_tiles(double, x).codes, x * 2) and sizes == [8, 8, 8]
