"""The FlexTok adapter: released files, round trips, prefixes, refusals, batch invariance."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import comit_bench.tokenizers.flextok.adapter as adapter
from comit_bench.errors import CorruptFileError, MissingError, UsageError
from comit_bench.nn.vae import KLVaeSpec
from comit_bench.seeding import generator_for
from comit_bench.tokenizers.base import Tokenizer, Tokens
from comit_bench.tokenizers.flextok.adapter import FlexTokTokenizer
from comit_bench.tokenizers.flextok.blocks import TableSpec
from comit_bench.tokenizers.flextok.checkpoint import load_directory, read_checkpoint
from comit_bench.tokenizers.flextok.config import ConfigReader, config_from_spec, spec_from_reader
from comit_bench.tokenizers.flextok.model import PRESETS, FlexTokSpec, TrunkSpec
from comit_bench.tokenizers.load import load_tokenizer

CASE = Path(__file__).parents[1] / "parity" / "cases" / "flextok" / "truncated_cfg_latents"
GRID = TableSpec(kind="grid", size=(2, 2))
SMALL = FlexTokSpec(
    encoder=TrunkSpec(depth=2, width=32, head_dim=16, positions=GRID),
    decoder=TrunkSpec(depth=2, width=48, head_dim=16, positions=GRID),
    registers=8,
    register_positions=8,
    vae=KLVaeSpec(channels=4, widths=(8, 8, 8, 8), layers=1, groups=4),
)
E, D = "encoder.module_dict.", "decoder.module_dict."


@pytest.fixture(autouse=True)
def small_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PRESETS:
        monkeypatch.setitem(adapter.PRESETS, name, SMALL)


def load(name: str = "flextok-d12-d12", **options: Any) -> FlexTokTokenizer:
    options.setdefault("device", "cpu")
    options.setdefault("offline", True)
    tokenizer = load_tokenizer(name, **options)
    assert isinstance(tokenizer, FlexTokTokenizer) and isinstance(tokenizer, Tokenizer)
    return tokenizer


@pytest.fixture
def flextok(small_presets: None) -> FlexTokTokenizer:
    return load(weights="random")


@pytest.fixture
def checkpoint(tmp_path: Path, flextok: FlexTokTokenizer) -> Path:
    flextok.save(tmp_path / "ck")
    return tmp_path / "ck"


def images(count: int, side: int = 32) -> Tensor:
    g = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, side, side), generator=g, dtype=torch.uint8)


def generators(count: int) -> list[torch.Generator]:
    return [generator_for(0, f"image-{i}") for i in range(count)]


def ids(tokens: Tokens) -> Tensor:
    assert tokens.ids is not None
    return tokens.ids


# ----------------------------------------------------------------------------- tokens


def test_a_prefix_is_a_prefix(flextok: FlexTokTokenizer) -> None:
    whole = flextok.encode(images(9))
    for count in (1, 5, 8):
        short = load(weights="random", tokens=count)
        tokens = short.encode(images(9))
        assert short.info.message_length == count and short.info.options["tokens"] == str(count)
        assert torch.equal(ids(tokens), ids(whole)[:, :count])
        cut = Tokens(None, whole.codes[:, :count])
        assert torch.equal(short.decode(tokens, seeds=range(9)), flextok.decode(cut, seeds=range(9)))


def test_default_is_deterministic_and_says_so(flextok: FlexTokTokenizer) -> None:
    x = images(3)
    assert torch.equal(ids(flextok.encode(x)), ids(flextok.encode(x, generators=generators(3))))
    assert flextok.info.options == {
        "tokens": "8",
        "posterior": "mode",
        "scaling_factor": "1",
        "dtype": "float32",
    }
    assert not flextok.info.trained and flextok.info.weights == "random:0"
    assert flextok.info.preprocessing == "resize_short(32,bilinear)|center_crop(32)"


def test_decode_options_matter(flextok: FlexTokTokenizer) -> None:
    tokens = flextok.encode(images(2))
    outs = [
        load(weights="random", **options).decode(tokens, seeds=[0, 1])
        for options in (
            {},
            {"steps": 3},
            {"guidance": 1},
            {"guidance_mode": "cfg"},
        )
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(outs) for b in outs[:i])


def test_recommended_sampling() -> None:
    small, large = load(weights="random").sampling, load("flextok-d18-d28", weights="random").sampling
    assert (small.steps, small.guidance, small.projected) == (25, 15.0, True)
    assert (large.steps, large.guidance, large.projected) == (25, 7.5, True)
    assert load(weights="random", guidance=2.0).sampling.guidance == 2.0


def test_decoder_settings_are_told_for_protocols(flextok: FlexTokTokenizer) -> None:
    usual = {"steps": 25, "guidance": 15.0, "guidance_mode": "apg", "default": True}
    assert flextok.decode_options == usual
    assert load("flextok-d18-d28", weights="random").decode_options == {**usual, "guidance": 7.5}
    other = load(weights="random", steps=3, guidance_mode="cfg").decode_options
    assert other == {"steps": 3, "guidance": 15.0, "guidance_mode": "cfg", "default": False}


# ------------------------------------------------------------------------------ files


def test_round_trip_through_the_released_layout(checkpoint: Path, flextok: FlexTokTokenizer) -> None:
    prefixes = {key.split(".")[0] for key in load_file(checkpoint / "model.safetensors")}
    assert prefixes == {"encoder", "decoder", "vae"}
    again = load(str(checkpoint))
    assert again.info.weights.startswith("sha256:") and again.info.name == "ck"
    assert torch.equal(ids(again.encode(images(4))), ids(flextok.encode(images(4))))
    tokens = flextok.encode(images(2))
    assert torch.equal(
        again.decode(tokens, seeds=[0, 1]), load(weights="random", guidance=7.5).decode(tokens, seeds=[0, 1])
    )
    other = load("FlexTok-d12-d12", weights=str(checkpoint))
    assert other.info.name == "flextok-d12-d12" and other.info.weights == again.info.weights
    assert "assumed" not in again.info.options


SPECS = {
    **{name: spec for name, spec in PRESETS.items()},
    "other": replace(
        SMALL,
        encoder=replace(SMALL.encoder, patch=(2, 1), mlp_ratio=3.0),
        decoder=replace(SMALL.decoder, positions=TableSpec(kind="prod", size=(7,), interpolate=True)),
        streams=1,
        registers=5,
        fsq_levels=(5, 4),
        time_features=64,
        max_timestep=1.0,
        vae=replace(SMALL.vae, scale=0.88),
    ),
}


@pytest.mark.parametrize("name", list(SPECS))
def test_config_round_trip(name: str) -> None:
    from comit_bench.tokenizers.flextok.model import FlexTok

    spec = SPECS[name]
    with torch.device("meta"):
        state = FlexTok(spec).state_dict()
    shapes: dict[str, Any] = {E: {}, D: {}}
    for prefix, modules in shapes.items():
        for key, value in state.items():
            if key.startswith(prefix):
                module, _, suffix = key.removeprefix(prefix).partition(".")
                modules.setdefault(module, {})[suffix] = tuple(value.shape)
    config = json.loads(json.dumps(config_from_spec(spec)))
    reader = ConfigReader(config, Path("x"), shapes, {})
    found = spec_from_reader(reader)
    assert replace(found, vae=replace(found.vae, scale=spec.vae.scale)) == spec
    assert reader.assumed == {}
    bare = ConfigReader({}, Path("x"), shapes, {})  # sizes come from the shapes, the rest is assumed
    if name in PRESETS:
        released = spec_from_reader(bare)
        assert released == spec
        assert {"dec_time_embedder.max_timestep", "regularizer.levels"} <= set(bare.assumed)


def test_parity_case_saves_what_it_loaded(tmp_path: Path) -> None:
    found = read_checkpoint(CASE)
    with safe_open(CASE / "weights.safetensors", framework="pt") as file:
        assert set(found.tensors) == set(file.keys())
    assert found.assumed == {} and found.spec.max_timestep == 1.0 and found.spec.registers == 16
    with pytest.raises(MissingError, match="flextok_vae_c4"):
        load_directory(CASE, offline=True)


def rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(change(config) or config))


def rename(checkpoint: Path, change: Callable[[str], str], **extra: Tensor) -> None:
    path = checkpoint / "model.safetensors"
    save_file({**{change(k): v for k, v in load_file(path).items()}, **extra}, path)


def same(checkpoint: Path, flextok: FlexTokTokenizer, **options: Any) -> FlexTokTokenizer:
    again = load("flextok-d12-d12", weights=str(checkpoint), **options)
    tokens = flextok.encode(images(4))
    assert torch.equal(ids(again.encode(images(4))), ids(tokens))
    assert torch.equal(again.decode(tokens, seeds=range(4)), flextok.decode(tokens, seeds=range(4)))
    return again


def test_config_may_be_wrapped(checkpoint: Path, flextok: FlexTokTokenizer) -> None:
    rewrite(checkpoint, lambda config: {"config": config})
    same(checkpoint, flextok)
    assert load(str(checkpoint)).info.family == "flextok"


def test_config_may_stand_in_the_header(checkpoint: Path, flextok: FlexTokTokenizer) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    arch = config.pop("comit_bench")
    (checkpoint / "config.json").write_text(json.dumps({"comit_bench": arch}))
    path = checkpoint / "model.safetensors"
    literals = {key: repr(value) for key, value in config.items()}
    assert "True" in literals["vae"] and "'" in literals["vae"]
    save_file(load_file(path), path, metadata={**literals, "_target_": "'a.b'", "format": "pt"})
    assert "assumed" not in same(checkpoint, flextok).info.options
    assert load(str(checkpoint), family="flextok").info.options["scaling_factor"] == "1"
    (
        checkpoint / "config.json"
    ).unlink()  # now the size of the VAE is that of the release, which does not fit
    with pytest.raises(UsageError, match=r"vae\.vae\."):
        load(weights=str(checkpoint))
    save_file(load_file(path), path, metadata={"vae": "__import__('os').getcwd()"})
    with pytest.raises(CorruptFileError, match="literal"):
        load(weights=str(checkpoint))
    save_file(load_file(path), path)
    with pytest.raises(MissingError, match="header"):
        load(weights=str(checkpoint))


def test_modules_may_have_other_names(
    checkpoint: Path, flextok: FlexTokTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    names = [
        "enc_patch_emb", "enc_posemb_module", "enc_transformer", "enc_to_latents", "dec_from_latents",
        "dec_registers_posemb_module", "dec_latent_dropout", "dec_noise_patch_emb",
        "dec_patches_posemb_module", "dec_time_embedder", "dec_transformer", "dec_to_patches",
    ]  # fmt: skip

    def change(key: str) -> str:
        for name in names:
            key = key.replace(f".{name}.", f".other_{name[::-1]}.")
        return key

    rename(checkpoint, change)
    text = (checkpoint / "config.json").read_text()
    for name in names:
        text = text.replace(f'"{name}"', f'"other_{name[::-1]}"')
    (checkpoint / "config.json").write_text(text)
    with caplog.at_level(logging.INFO):
        assert "assumed" not in same(checkpoint, flextok).info.options
    assert caplog.text.count("is taken for") == len(names) and "ignored" not in caplog.text


def test_foreign_parts_are_ignored_with_a_warning(
    checkpoint: Path, flextok: FlexTokTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {
        f"{D}dec_repa_head.mlp.1.weight": torch.zeros(2, 2),
        f"{D}dec_probe.proj.weight": torch.zeros(3, 48),
        f"{D}dec_probe.proj.bias": torch.zeros(3),
        "vae.logvar": torch.zeros(1),
        "vae.vae.encoder.mid_block.attentions.0.to_qkv.weight": torch.zeros(24, 8),
    }
    rename(checkpoint, lambda key: key, **extra)
    same(checkpoint, flextok)
    for part in ("dec_repa_head", "dec_probe", "vae.logvar", "to_qkv"):
        assert part in caplog.text


def test_wrappers_of_keys_are_stripped(checkpoint: Path, flextok: FlexTokTokenizer) -> None:
    rename(
        checkpoint,
        lambda key: "_orig_mod." + key.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
    )
    same(checkpoint, flextok)


def test_values_that_nothing_states_are_in_the_record(checkpoint: Path, flextok: FlexTokTokenizer) -> None:
    def change(config: dict[str, Any]) -> None:
        del config["decoder"]["module_dict"]["dec_time_embedder"]
        del config["decoder"]["module_dict"]["dec_transformer"]["depth"]
        del config["encoder"]["module_dict"]["enc_register_module"]
        del config["vae"]["latent_channels"]

    rewrite(checkpoint, change)
    assert same(checkpoint, flextok).info.options["assumed"] == "dec_time_embedder.max_timestep=1000.0"


# ----------------------------------------------------------------- the VAE and the hub


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_vae_beside_the_checkpoint(checkpoint: Path, flextok: FlexTokTokenizer, no_hub: None) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    own = {k.removeprefix("vae.vae."): v for k, v in tensors.items() if k.startswith("vae.vae.")}
    save_file({k: v for k, v in tensors.items() if not k.startswith("vae.")}, path)
    with pytest.raises(MissingError, match=r"EPFL-VILAB/flextok_vae_c4.*put them into"):
        load(weights=str(checkpoint))
    rewrite(checkpoint, lambda config: config["vae"].update(hf_hub_path="some/vae"))
    with pytest.raises(MissingError, match="some/vae"):
        load(weights=str(checkpoint))
    rewrite(checkpoint, lambda config: config.pop("comit_bench") and None)
    (checkpoint / "vae").mkdir()
    arch = {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    (checkpoint / "vae" / "config.json").write_text(json.dumps({**arch, "scaling_factor": 0.5}))
    save_file(own, checkpoint / "vae" / "diffusion_pytorch_model.safetensors")
    beside = same(checkpoint, flextok)  # the scale of the tokenizer's own config stands
    assert beside.info.options["vae"].startswith("sha256:")


def test_scale_of_the_latents_is_never_guessed(
    checkpoint: Path, flextok: FlexTokTokenizer, no_hub: None
) -> None:
    rewrite(checkpoint, lambda config: config["vae"].update(scaling_factor=None))
    with pytest.raises(MissingError, match=r"flextok_vae_c4.*scaling_factor=VALUE"):
        load(weights=str(checkpoint))
    given = load(weights=str(checkpoint), scaling_factor=0.88)
    assert given.info.options["scaling_factor"] == "0.88"
    assert given.info.options["assumed"] == "vae.scaling_factor=0.88"
    (checkpoint / "vae").mkdir()
    (checkpoint / "vae" / "config.json").write_text(json.dumps({"scaling_factor": 0.5}))
    found = load(weights=str(checkpoint))
    assert found.model.vae.scale == 0.5 and "assumed" not in found.info.options
    (checkpoint / "vae" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="scaling_factor"):
        load(weights=str(checkpoint))
    rewrite(checkpoint, lambda config: config["vae"].update(scaling_factor=0.88))
    with pytest.raises(UsageError, match=r"0\.88, but the option says 0\.5"):
        load(weights=str(checkpoint), scaling_factor=0.5)


def test_released_weights_carry_their_licence(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(repository: str, *_: object, **__: object) -> Path:
        assert repository == "EPFL-VILAB/flextok_d18_d28_dfn"
        return checkpoint

    monkeypatch.setattr("comit_bench.tokenizers.hub.fetch", fetch)
    for name in ("flextok-d18-d28-dfn", "EPFL-VILAB/flextok_d18_d28_dfn"):
        info = load(name).info
        assert info.name == "flextok-d18-d28-dfn" and info.training_data == "DFN (web images)"
        assert "research only" in info.weights_licence
    assert load(str(checkpoint)).info.training_data == "unknown"
