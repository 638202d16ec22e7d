"""The SelfTok adapter: released files, round trips, refusals, batch invariance."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from selftok_sizes import SMALL
from torch import Tensor

from comit_bench.errors import CorruptFileError, MissingError, UsageError
from comit_bench.tokenizers import weights as store
from comit_bench.tokenizers.base import Tokenizer, Tokens
from comit_bench.tokenizers.checkpoints import on_meta
from comit_bench.tokenizers.load import load_tokenizer
from comit_bench.tokenizers.registry import downloads
from comit_bench.tokenizers.selftok.adapter import SelftokTokenizer, choose_schedule
from comit_bench.tokenizers.selftok.checkpoint import find_vae
from comit_bench.tokenizers.selftok.config import (
    config_from_spec,
    released_config,
    spec_from_config,
    unpack,
    used,
    vae_spec,
)
from comit_bench.tokenizers.selftok.model import PRESETS, SD3_VAE, Schedule, Selftok, variant

SIDE, K = 64, 12
JUNK = {
    "diffusion.timestep_map": torch.zeros(100),
    "encoder.final_layer_norm.weight": torch.zeros(32),
    "encoder.final_layer_norm2.bias": torch.zeros(16),
    "encoder.quantizer.count": torch.zeros(1, 64),
    "encoder.quantizer._codebook.embed_avg": torch.zeros(1, 64, 16),
    "encoder.quantizer._codebook.timestep_p_over_c": torch.zeros(1, K, 64),
    "model.y_embedder.mlp.0.weight": torch.zeros(48, 16),
    "model.joint_blocks.2.context_block.t_embedder.mlp.0.weight": torch.zeros(48, 256),
}


@pytest.fixture(autouse=True)
def small_presets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(PRESETS, "selftok-512", SMALL)
    monkeypatch.setitem(PRESETS, "selftok-1024", replace(SMALL, tokens=1024, schedule=None))
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def load(name: str = "selftok-512", **options: Any) -> SelftokTokenizer:
    options.setdefault("device", "cpu")
    options.setdefault("offline", True)
    tokenizer = load_tokenizer(name, **options)
    assert isinstance(tokenizer, SelftokTokenizer) and isinstance(tokenizer, Tokenizer)
    return tokenizer


@pytest.fixture
def selftok(small_presets: None) -> SelftokTokenizer:
    return load(weights="random")


@pytest.fixture
def checkpoint(tmp_path: Path, selftok: SelftokTokenizer) -> Path:
    selftok.save(tmp_path / "ck")
    return tmp_path / "ck"


def images(count: int, side: int = SIDE) -> Tensor:
    g = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, side, side), generator=g, dtype=torch.uint8)


def ids(tokens: Tokens) -> Tensor:
    assert tokens.ids is not None
    return tokens.ids


def diffusers_vae(checkpoint: Path, folder: Path) -> Path:
    """The VAE as the hub stores it."""
    folder.mkdir(parents=True)
    config = json.loads((checkpoint / "config.json").read_text())["vae"]
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **config}))
    (checkpoint / "vae_weights.safetensors").rename(folder / "diffusion_pytorch_model.safetensors")
    return folder


# ----------------------------------------------------------------------------- tokens


def test_codes_are_what_enters_the_decoder(selftok: SelftokTokenizer) -> None:
    tokens = selftok.encode(images(3))
    assert tokens.codes.shape == (3, K, 16) and tokens.codes.dtype == torch.float32
    assert torch.equal(selftok.codes_from_ids(ids(tokens)), tokens.codes)
    rows = selftok.model.encoder.quantizer.table[ids(tokens)]
    assert not torch.allclose(rows, tokens.codes)
    for wrong in (64, -1):
        with pytest.raises(ValueError, match=r"0\.\.63"):
            selftok.codes_from_ids(torch.tensor([wrong]))


@pytest.mark.parametrize(("latents", "width"), [("prequant", 16), ("raw", 32)])
def test_other_latents_decode_to_the_same_pictures(
    selftok: SelftokTokenizer, latents: str, width: int
) -> None:
    other, x = load(weights="random", latents=latents), images(2)
    tokens = other.encode(x)
    assert tokens.ids is None and tokens.codes.shape == (2, K, width)
    assert (other.info.vocab_size, other.info.code_dim, other.info.options["latents"]) == (
        None,
        width,
        latents,
    )
    want = selftok.decode(selftok.encode(x), seeds=[0, 1])
    assert torch.equal(other.decode(tokens, seeds=[0, 1]), want)


def test_defaults_are_deterministic_and_in_the_protocol(selftok: SelftokTokenizer) -> None:
    assert selftok.info.options == {
        "decoder": "diffusion",
        "latents": "codes",
        "vae_dtype": "float32",
        "dtype": "float32",
        "steps": "4",
        "stages": "200,400,600,800,1000",
        "k_per_stage": "4,3,2,2,1",
    }
    info = load(weights="random", decoder="renderer").info
    assert info.options.keys() == {"decoder", "latents", "vae_dtype", "dtype"}
    assert (info.message_length, info.vocab_size, info.code_dim, info.resolution) == (K, 64, 16, SIDE)
    assert info.preprocessing == "resize_short(64,bilinear)|center_crop(64)"
    assert not info.trained and info.weights == "random:0" and info.name == "selftok-512"


def test_settings_of_the_sampler_change_pictures(selftok: SelftokTokenizer) -> None:
    tokens = selftok.encode(images(2))
    outs = [
        load(weights="random", **options).decode(tokens, seeds=[0, 1])
        for options in ({}, {"steps": 2}, {"k_per_stage": "12", "stages": 1000}, {"vae_dtype": "bfloat16"})
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(outs) for b in outs[:i])


def test_an_unpublished_schedule_is_assumed_and_said(tmp_path: Path) -> None:
    long = load("selftok-1024", weights="random")
    assert long.schedule == Schedule(counts=(384, 368, 144, 96, 32))
    assert long.info.options["assumed"] == "k_per_stage=384,368,144,96,32"
    long.save(tmp_path / "long")
    assert "k_per_stage" not in json.loads((tmp_path / "long" / "config.json").read_text())
    assert "assumed" in load(str(tmp_path / "long")).info.options
    own = load("selftok-1024", weights="random", k_per_stage="500,300,200,16,8")
    assert "assumed" not in own.info.options and own.info.options["k_per_stage"] == "500,300,200,16,8"
    own.save(tmp_path / "own")
    assert load(str(tmp_path / "own")).schedule == own.schedule
    assert "assumed" not in load("selftok-1024", weights="random", decoder="renderer").info.options
    with pytest.raises(UsageError, match=r"with 12 tokens is not known.*k_per_stage"):
        choose_schedule(replace(SMALL, schedule=None))


# ------------------------------------------------------------------------------ files


@pytest.mark.parametrize("decoder", ["diffusion", "renderer"])
def test_round_trip(tmp_path: Path, decoder: str) -> None:
    first = load(weights="random", decoder=decoder, **({"steps": 3} if decoder == "diffusion" else {}))
    first.save(tmp_path / "ck")
    path = tmp_path / "ck" / "model.safetensors"
    tensors = load_file(path)
    assert {key.split(".")[0] for key in tensors} == {"encoder", "model"}
    extra = JUNK | ({"model.pos_embed": torch.zeros(1, 121, 48)} if decoder == "renderer" else {})
    save_file({**tensors, **extra}, path)  # as released: 998 entries, some of them never read
    x = images(2)
    want = first.encode(x)
    again = load(str(tmp_path / "ck"))
    assert again.info.name == "ck" and again.info.weights.startswith("sha256:")
    assert again.info.options["vae"].startswith("sha256:")
    assert torch.equal(ids(again.encode(x)), ids(want))
    pictures = [tokenizer.decode(want, seeds=[0, 1]).int() for tokenizer in (first, again)]
    assert (pictures[0] - pictures[1]).abs().max() <= 1  # another alignment of the same weights in memory
    named = load("SelfTok-512", weights=str(tmp_path / "ck"), decoder=decoder)
    assert named.info.name == "selftok-512" and named.info.weights == again.info.weights
    other = "renderer" if decoder == "diffusion" else "diffusion"
    with pytest.raises(UsageError, match=f"decoder=?{' '}?{decoder}|decoder {decoder}"):
        load(weights=str(tmp_path / "ck"), decoder=other)


@pytest.mark.parametrize("name", ["diffusion", "renderer", "other"])
def test_config_round_trip(name: str) -> None:
    spec = {
        "diffusion": SMALL,
        "renderer": variant("selftok-512", "renderer"),
        "other": replace(
            SMALL, sees_image=False, output_dim=20, schedule=Schedule(ends=(9, 1000), counts=(5, 7))
        ),
    }[name]
    shapes = {key: tuple(value.shape) for key, value in on_meta(Selftok, spec).own_state().items()}
    config = json.loads(json.dumps(config_from_spec(spec)))
    found = spec_from_config(config, shapes, Path("x"), vae_spec(config["vae"], Path("x")))
    want = spec if spec.kind == "diffusion" else replace(spec, steps=found.steps)
    assert found == want


@pytest.mark.parametrize("nested", [False, True])
def test_released_pickles_are_converted_by_name(
    tmp_path: Path, checkpoint: Path, selftok: SelftokTokenizer, nested: bool
) -> None:
    tensors = load_file(checkpoint / "model.safetensors") | JUNK
    file = tmp_path / "tokenizer_512_ckpt.pth"
    content = (
        {"state_dict": tensors, "ema_state_dict": {"x": torch.zeros(1)}, "step": 3} if nested else tensors
    )
    torch.save(content, file)
    vae = diffusers_vae(checkpoint, tmp_path / "sd3")
    folder = store.convert("selftok-512", file)  # the command names the file: no further question
    assert folder == tmp_path / "cache" / "weights" / "selftok-512"
    assert load_file(folder / "model.safetensors").keys() == used(tensors).keys()
    assert json.loads((folder / "config.json").read_text()) == released_config("selftok-512")
    x = images(2)
    want = ids(selftok.encode(x))
    got = load(vae=str(vae))
    assert torch.equal(ids(got.encode(x)), want) and "presumably ImageNet" in got.info.training_data
    with pytest.raises(UsageError, match="allow_pickle=true"):
        load(weights=str(file), vae=str(vae))
    for _ in range(2):
        direct = load(weights=str(file), vae=str(vae), allow_pickle="true")
        assert torch.equal(ids(direct.encode(x)), want)
    assert len(list(folder.parent.glob("selftok-512-*"))) == 1, "converted once"
    plain = load(weights=str(folder / "model.safetensors"), vae=str(vae))
    assert torch.equal(ids(plain.encode(x)), want)
    with pytest.raises(UsageError, match="says nothing about sizes"):
        load("selftok", weights=str(folder / "model.safetensors"), family="selftok")
    with pytest.raises(UsageError, match="does not fit the released selftok-512-renderer"):
        store.convert("selftok-512-renderer", file)


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("evil-was-here",)


def test_bad_pickles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "x.pth"
    torch.save({"state_dict": Evil()}, file)
    with pytest.raises(CorruptFileError, match="mkdir"):
        store.convert("selftok-512", file)
    assert not (tmp_path / "evil-was-here").exists()
    torch.save({"state_dict": {"encoder.query_tokens": torch.zeros(1)}}, file)
    with pytest.raises(UsageError, match="missing"):
        store.convert("selftok-512", file)
    for content in ([1], {}, {"state_dict": {"a": 3}}):
        with pytest.raises(CorruptFileError, match="state dict"):
            unpack(content, file)


def test_releases_are_the_hubs_files() -> None:
    found = {r.name: (r.source.hub, r.source.file) for r in downloads() if r.name.startswith("selftok")}
    hub = "selftok-team/SelftokTokenizer"
    assert found == {
        "selftok-512": (hub, "tokenizer_512_ckpt.pth"),
        "selftok-512-renderer": (hub, "renderer_512_ckpt.pth"),
        "selftok-1024": (hub, "tokenizer_1024_ckpt.pth"),
        "selftok-1024-renderer": (hub, "renderer_1024_ckpt.pth"),
    }


def test_missing_weights_say_how_to_get_them(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(MissingError, match=r"comit-bench weights fetch selftok-512`"):
        load()
    with pytest.raises(MissingError, match=r"comit-bench weights fetch selftok-1024-renderer`"):
        load("selftok-1024", decoder="renderer")
    with pytest.raises(MissingError, match="weights fetch"):
        load("selftok-team/SelftokTokenizer")
    with pytest.raises(MissingError, match="no such file or directory"):
        load(weights=str(tmp_path / "gone.pth"))
    vae = diffusers_vae(checkpoint, tmp_path / "sd3")
    with pytest.raises(MissingError, match=r"stable-diffusion-3-medium-diffusers.*--option vae=DIR"):
        load(str(checkpoint))
    with pytest.raises(MissingError, match=r"does not hold config\.json"):
        load(str(checkpoint), vae=str(tmp_path))
    assert load(str(checkpoint), vae=str(vae)).info.options["vae"].startswith("sha256:")
    vae.rename(checkpoint / "vae")
    assert find_vae({}, checkpoint, None, offline=True)[1].parent == checkpoint / "vae"


def test_a_checkpoint_of_another_length_is_not_the_preset(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="12 tokens is not selftok-1024"):
        load("selftok-1024", weights=str(checkpoint))


def test_released_vae() -> None:
    """The constructor arguments of the hub's SD3 VAE."""
    config = {
        "block_out_channels": [128, 256, 512, 512],
        "latent_channels": 16,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }
    assert vae_spec(config, Path("x")) == SD3_VAE


@pytest.mark.parametrize("name", ["selftok-512", "selftok-512-renderer"])
def test_released_config_leaves_the_vae_and_unknown_schedules_out(name: str) -> None:
    config = released_config(name)
    assert config["system"] == "selftok" and "vae" not in config
    assert ("k_per_stage" in config) == (name == "selftok-512")
    assert "k_per_stage" not in released_config(name.replace("512", "1024"))
