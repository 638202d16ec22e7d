"""What every family with a network promises: one suite, a case per family. The rest has its own files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alit_sizes import TINY, TINY_VAE
from safetensors.torch import load_file, save_file
from selftok_sizes import SMALL
from small_tokenizers import FLEXTOK, LEGACY
from torch import Tensor

import comit_bench
from comit_bench.errors import CorruptFileError, MissingError, UsageError
from comit_bench.seeding import generator_for
from comit_bench.tokenizers.alit import config as alit_config
from comit_bench.tokenizers.base import Tokenizer, Tokens
from comit_bench.tokenizers.comit import checkpoint as comit_files
from comit_bench.tokenizers.comit.model import PRESETS as COMIT
from comit_bench.tokenizers.family import Family, Hub, Preset
from comit_bench.tokenizers.flextok.config import config_from_spec as flextok_config
from comit_bench.tokenizers.flextok.model import PRESETS as FLEXTOKS
from comit_bench.tokenizers.load import entry_for, load_tokenizer
from comit_bench.tokenizers.registry import FAMILIES, builtin
from comit_bench.tokenizers.selftok.config import released_config as selftok_config
from comit_bench.tokenizers.selftok.model import PRESETS as SELFTOKS
from comit_bench.tokenizers.titok import adapter as titok
from comit_bench.tokenizers.titok.model import PRESETS as TITOKS
from comit_bench.tokenizers.vq_grid import adapter as vq_grid
from comit_bench.tokenizers.vq_grid.model import PRESETS as GRIDS

Change = Callable[[dict[str, Any]], object]
TITOK = replace(LEGACY, pixels=replace(LEGACY.pixels, codebook_size=1024))  # type: ignore[type-var]
TITOK_PIXEL = replace(LEGACY, pixels=None, l2_norm=False, encoder_patch=8, decoder_patch=8)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family, with a preset that stands for a network small enough for tests.

    Attributes:
        name: The preset.
        sizes: Side of the images, K, d and the vocabulary.
        variants: Options, ``policy`` among them; ids do not depend on the batch under any.
        noisy: Whether a decoded image depends on its seed.
        key: A tensor, and its shape as a text; extra tensors are put beside it.
        foreign: What is said of tensors of another network.
        configs: Changes of ``config.json`` -> what is said.
        options: Wrong options -> what is said.
    """

    name: str
    sizes: tuple[int, int, int, int]
    variants: tuple[dict[str, Any], ...] = ({},)
    noisy: bool = False
    key: tuple[str, str]
    foreign: str
    configs: tuple[tuple[Change, str], ...] = ()
    options: tuple[tuple[dict[str, Any], str], ...] = ()

    @property
    def family(self) -> Family:
        return builtin()[self.name].family


def put(key: str, value: object) -> Change:
    """Set a dotted key of a config; ``...`` takes it out."""

    def change(config: dict[str, Any]) -> None:
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node.pop(last, None) if value is ... else node.update({last: value})

    return change


E_, D_ = "encoder.module_dict", "decoder.module_dict"
VQ = "model.vq_model"
CASES = {
    "comit": Case(
        name="comit-nano",
        sizes=(32, 16, 4, 1000),
        variants=({}, {"policy": "global"}, {"policy": "random:3"}, {"policy": "global+adaptive:3"}),
        noisy=True,
        key=("predictor.blocks.0.attn.qkv.bias", "192"),
        foreign="encoder.weight",
        configs=((put("quantizer.levels", [8, 8]), "msg_tokens_dim"), (put("predictor", ...), "predictor")),
        options=(({"posterior": "median"}, "mode"), ({"postrior": "mode"}, "Did you mean 'posterior'")),
    ),
    "titok": Case(
        name="titok-s-128",
        sizes=(32, 6, 12, 50),
        key=("encoder.transformer.0.attn.in_proj_bias", "96"),
        foreign="missing",
        configs=(
            (put(f"{VQ}.num_latent_tokens", ...), "num_latent_tokens"),
            (put("dataset.preprocessing.crop_size", ...), "crop_size"),
            (put("dataset", ...), "dataset.preprocessing"),
            (put("reduced.encoder", ...), "'custom' is not one of small, base, large"),
            (put(f"{VQ}.quantize_mode", "vae"), "continuous"),
            (put(f"{VQ}.finetune_decoder", False), "finetune_decoder"),
            (put(f"{VQ}.use_l2_norm", "yes"), "true or false"),
            (put(f"{VQ}.codebook_size", 0), "codebook_size"),
            (put(f"{VQ}.vit_enc_patch_size", 5), "patch 5 does not tile"),
            (put(f"{VQ}.token_size", 9), "wrong shape"),
        ),
        options=(({"posterior": "mode"}, "no option 'posterior'"), ({"compile": "perhaps"}, "true or false")),
    ),
    "titok-pixel": Case(
        name="titok-b-64",
        sizes=(32, 6, 12, 50),
        key=("encoder.transformer.0.attn.in_proj_bias", "96"),
        foreign="missing",
    ),
    "vq-grid": Case(
        name="vq-grid-nano",
        sizes=(32, 16, 4, 1000),
        key=("encoder.blocks.0.attn.in_proj_bias", "192"),
        foreign="missing",
        configs=(
            (put("family", "titok"), "unknown|model.vq_model|family"),
            (put("model", None), "expected family"),
            (put("model.width", ...), "width is missing"),
            (put("model.widht", 3), "widht is unknown"),
            (put("model.width", True), "whole number"),
            (put("model.fsq_levels", "8,5"), "list whole numbers"),
            (put("model.patch", 3), "do not tile"),
            (put("model.width", 40), "multiple of head_dim"),
            (put("model.depth", 0), "1 or more"),
            (put("model.fsq_levels", [8, 1]), "2 or more"),
            (put("model.inner_width", 32), "wrong shape"),
        ),
        options=(({"dtpe": 1}, "no option 'dtpe'"),),
    ),
    "flextok": Case(
        name="flextok-d12-d12",
        sizes=(32, 8, 6, 64000),
        variants=({}, {"tokens": 3}, {"posterior": "sample"}),
        noisy=True,
        key=(f"{D_}.dec_latent_dropout.nullcond", "48"),
        foreign="Is this a FlexTok checkpoint",
        configs=(
            (put(f"{E_}.enc_transformer.depth", 3), r"missing .*blocks.2"),
            (put(f"{E_}.enc_seq_packer.mask_mode", "full"), "causal_last"),
            (put(f"{D_}.dec_seq_packer.mask_mode", "causal"), "mask_mode"),
            (put(f"{E_}.enc_to_latents.use_mup_readout", True), "use_mup_readout"),
            (put(f"{E_}.enc_transformer.gated_mlp", False), "gated_mlp"),
            (put(f"{D_}.dec_transformer.adaLN_expansion", 3), "adaLN_expansion 3"),
            (put(f"{D_}.dec_seq_packer.per_subseq_embs", False), "per_subseq_embs"),
            (put(f"{D_}.dec_to_patches.patch_sizes", [4, 4]), "patch sizes"),
            (put(f"{E_}.enc_posemb_module.posemb_scaling", "wrapped"), "posemb_scaling"),
            (put(f"{E_}.enc_transformer.head_dim", 5), "whole number of heads"),
            (put(f"{E_}.enc_register_module.n_max", 9), "9 registers"),
        ),
        options=(
            ({"tokens": 0}, "tokens"),
            ({"tokens": 9}, "from 1 to 8"),
            ({"tokens": 2.5}, "whole number"),
            ({"tokens": "many"}, "tokens"),
            ({"posterior": "median"}, "mode"),
            ({"steps": 0}, "steps"),
            ({"guidance": "strong"}, "guidance"),
            ({"guidance": float("nan")}, "guidance"),
            ({"guidance_mode": "auto"}, "apg"),
            ({"compile": "maybe"}, "auto, true or false"),
            ({"scaling_factor": 0}, "scaling_factor"),
            ({"latents": "codes"}, "no option 'latents'"),
            ({"tokns": 3}, "Did you mean 'tokens'"),
        ),
    ),
    "alit": Case(
        name="alit-small",
        sizes=(32, 12, 5, 64),
        variants=({}, {"halting": "on"}, {"base": "vae", "posterior": "sample"}),
        key=("encoder_ln_recursive.bias", "40"),
        foreign="missing",
        configs=(
            (put("adaptive_tokenizer.train_stage", "latent_distillation_pretrain"), "fully finetuned"),
            (put("adaptive_tokenizer.factorize_latent", False), "factorize_latent"),
            (put("base_tokenizer.id", "taming"), "'vqgan' or 'vae', got 'taming'"),
            (put("adaptive_tokenizer.decoder_width", ...), "decoder_width"),
            (put("base_tokenizer", ...), "base_tokenizer"),
        ),
        options=(
            ({"halting": "maybe"}, "must be on or off"),
            ({"posterior": "median"}, "one of mode, sample, got 'median'"),
            ({"latents": "logits"}, "codes, prequant, raw"),
            ({"iteration": 3}, "Did you mean 'iterations'"),
            ({"iterations": 0}, "1 to 3"),
            ({"iterations": 4}, "1 to 3"),
            ({"iterations": 1.5}, "1 to 3"),
            ({"base": "kl"}, "vqgan, vae"),
        ),
    ),
    "selftok": Case(
        name="selftok-512",
        sizes=(64, 12, 16, 64),
        variants=({}, {"decoder": "renderer"}),
        noisy=True,
        key=("encoder.blocks.1.attn.to_query_kv.weight", "64, 16"),
        foreign="no whole SelfTok checkpoint",
        configs=(
            (put("kind", "renderer"), "those of a diffusion decoder"),
            (put("k", 13), "k is 13, but the tensors have 12"),
            (put("encoder.depth", 4), "encoder.depth is 4"),
            (put("encoder.num_heads", 3), "make no transformer"),
            (put("encoder.qk_norm", True), "qk_norm"),
            (put("encoder.num_heads", "4"), "positive whole number"),
            (put("decoder.pos_embed_max_size", 9), "pos_embed_max_size is 9"),
            (put("quantizer.codebook_size", 65), "codebook_size is 65"),
            (put("quantizer", 3), "quantizer should be a mapping"),
            (put("k_per_stage", "1,2"), "rising ends"),
            (put("context_see_xt", "yes"), "context_see_xt"),
            (put("vae.scaling_factor", 0.18), "scaling_factor is 0.18"),
            (put("vae.use_quant_conv", True), "quant conv"),
            (put("vae.latent_channels", 4), "4 channels, the latents have 16"),
            (put("image_size", 40), "no whole patches"),
        ),
        options=(
            ({"decoder": "renderr"}, "Did you mean 'renderer'"),
            ({"latents": "queries"}, "codes, prequant, raw"),
            ({"steps": 0}, "at least 1"),
            ({"steps": 2.5}, "whole number"),
            ({"steps": 3, "decoder": "renderer"}, "one step"),
            ({"k_per_stage": "1,1,1,1,1"}, "add up to 12"),
            ({"k_per_stage": "12", "stages": "900"}, "end at 1000"),
            ({"k_per_stage": "4,3,x"}, "whole numbers"),
            ({"k_per_stage": "6,6"}, "rising ends"),
            ({"stages": "500,1000"}, "needs k_per_stage"),
            ({"k_per_stage": "12", "decoder": "renderer"}, "decoder=diffusion"),
            ({"vae_dtype": "float16"}, "float32, bfloat16"),
            ({"compile": "maybe"}, "auto, true or false"),
            ({"step": 3}, "Did you mean 'steps'"),
        ),
    ),
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
VARIANTS = [
    pytest.param(case, options, id="-".join([name, *map(str, options.values())]))
    for name, case in CASES.items()
    for options in case.variants
]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Presets stand for small networks, the caches are empty."""
    monkeypatch.setitem(TITOKS, "titok-s-128", TITOK)
    monkeypatch.setitem(TITOKS, "titok-b-64", TITOK_PIXEL)
    for name in FLEXTOKS:
        monkeypatch.setitem(FLEXTOKS, name, FLEXTOK)
    monkeypatch.setitem(SELFTOKS, "selftok-512", SMALL)
    monkeypatch.setattr(alit_config.Variant, "spec", property(small_alit))
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def small_alit(variant: alit_config.Variant) -> Any:
    """Halting drops many tokens, so that it shows."""
    spec = replace(TINY, threshold=0.02) if variant.base == "vqgan" else TINY_VAE
    return replace(spec, quantized=variant.quantized)


def load(case: Case, name: str | None = None, **options: Any) -> Any:
    options = {"device": "cpu", "offline": True, **options}
    options.pop("policy", None)
    tokenizer = load_tokenizer(name or case.name, **options)
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer


@pytest.fixture
def tokenizer(case: Case, checkpoint: Path) -> Any:
    return load(case, str(checkpoint))


@pytest.fixture
def checkpoint(case: Case, tmp_path: Path) -> Path:
    return written(case, tmp_path / "ck")


def written(case: Case, folder: Path, **options: Any) -> Path:
    """A checkpoint whose messages differ between images."""
    made = load(case, weights="random", **options)
    if case.family.name == "alit":
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in made.model.parameters():
                parameter.add_(
                    torch.randn(parameter.shape, generator=g) * (0.1 if options.get("base") else 0.2)
                )
    made.save(folder)
    return folder


def images(case: Case, count: int) -> Tensor:
    """Smooth where messages then differ more than those of noise do."""
    if case.family.name == "selftok":
        shape, g = (count, 3, case.sizes[0], case.sizes[0]), torch.Generator().manual_seed(5)
        return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    colours = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    smooth = torch.nn.functional.interpolate(colours, size=case.sizes[0], mode="bilinear")
    return smooth.mul(255).to(torch.uint8)


def streams(count: int, seed: int = 0) -> list[torch.Generator]:
    return [generator_for(seed, f"image-{i}") for i in range(count)]


def ids(tokens: Tokens) -> Tensor:
    assert tokens.ids is not None
    return tokens.ids


# ----------------------------------------------------------------------------- tokens


@pytest.mark.parametrize(("case", "options"), VARIANTS)
def test_tokens_do_not_depend_on_batch_or_order(case: Case, options: dict[str, Any], tmp_path: Path) -> None:
    chosen = {key: value for key, value in options.items() if key != "base"}
    folder = written(case, tmp_path / "ck", **{k: v for k, v in options.items() if k in ("base", "decoder")})
    tokenizer, count, x = load(case, str(folder), **chosen), 19, images(case, 19)
    asked = {"policy": options["policy"]} if "policy" in options else {}

    told = {key: str(value) for key, value in chosen.items() if key != "policy"}
    assert told.items() <= tokenizer.info.options.items()

    def encode(rows: list[int]) -> Tokens:
        found = tokenizer.encode(x[rows], generators=[streams(count)[i] for i in rows], **asked)
        assert isinstance(found, Tokens)
        return found

    whole = encode(list(range(count)))
    side, length, dim, _ = case.sizes
    length = options.get("tokens", length)
    assert ids(whole).shape == (count, length) and ids(whole).dtype == torch.int64
    assert whole.codes.shape == (count, length, dim) and whole.codes.dtype == torch.float32
    assert len(ids(whole).unique(dim=0)) > count / 4, "messages that are all alike prove nothing"
    drawn = tokenizer.decode(whole, seeds=range(count))
    assert drawn.dtype == torch.uint8 and drawn.shape == (count, 3, side, side)
    for size in (1, 7):
        parts = [encode(list(range(i, min(i + size, count)))) for i in range(0, count, size)]
        assert torch.equal(torch.cat([ids(part) for part in parts]), ids(whole))
        assert torch.equal(torch.cat([part.codes for part in parts]), whole.codes)
        if whole.offsets is not None:
            offsets = torch.cat([part.offsets for part in parts if part.offsets is not None])
            assert torch.equal(offsets, whole.offsets)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = encode(order)
    assert torch.equal(ids(shuffled), ids(whole)[order])
    assert torch.equal(tokenizer.decode(shuffled, seeds=order), drawn[order])
    drawing = "posterior" in options or "halting" in options
    if drawing or options.get("policy", "global") != "global":
        with pytest.raises(ValueError, match="generator"):
            tokenizer.encode(x, **asked)
        if drawing:
            other = tokenizer.encode(x, generators=streams(count, seed=1))
            assert not torch.equal(other.codes, whole.codes)
    else:
        assert torch.equal(ids(tokenizer.encode(x, **asked)), ids(whole))


@EVERY
def test_codes_are_those_of_the_ids(case: Case, tokenizer: Any) -> None:
    vocabulary, tokens = case.sizes[3], tokenizer.encode(images(case, 5))
    assert torch.equal(tokenizer.codes_from_ids(ids(tokens)), tokens.codes)
    every = tokenizer.codes_from_ids(torch.arange(min(vocabulary, 1000)))
    assert len(every.unique(dim=0)) == len(every)
    for wrong in (-1, vocabulary):
        with pytest.raises(ValueError, match=rf"0\.\.{vocabulary - 1}"):
            tokenizer.codes_from_ids(torch.tensor([wrong]))


@EVERY
def test_images_depend_on_message_and_seed_alone(case: Case, tokenizer: Any) -> None:
    tokens = tokenizer.encode(images(case, 9))
    drawn = tokenizer.decode(tokens, seeds=range(9))

    def one(seed: int) -> Tensor:
        offsets = None if tokens.offsets is None else tokens.offsets[4:5]
        picture: Tensor = tokenizer.decode(Tokens(None, tokens.codes[4:5], offsets), seeds=[seed])[0]
        return picture

    assert torch.equal(one(4), drawn[4]) and torch.equal(one(77), drawn[4]) is not case.noisy


@EVERY
def test_wrong_images_codes_and_policies_are_refused(case: Case, tokenizer: Any) -> None:
    x = images(case, 2)
    side, _, dim, _ = case.sizes
    for bad in (x.float(), x.to(torch.int64), x[..., :-1], x[:, :1], x[0], x.repeat(1, 1, 2, 2)):
        with pytest.raises(ValueError, match=rf"uint8 images of shape \[B, 3, {side}, {side}\]"):
            tokenizer.encode(bad)
    if case.family.crops:
        with pytest.raises(UsageError, match="unknown cropping policy"):
            tokenizer.encode(x, policy="spiral:3")
        with pytest.raises(ValueError, match="offsets"):
            tokenizer.decode(Tokens(None, tokenizer.encode(x).codes), seeds=[0, 1])
        return
    with pytest.warns(UserWarning, match="no effect"):
        tokenizer.encode(x, policy="raster:9")
    codes = tokenizer.encode(x).codes
    for wrong in (codes[0], codes[..., : dim - 1], *(torch.zeros(2, n, dim) for n in (0, 99, 100))):
        with pytest.raises(ValueError, match=r"codes of shape \[B, "):
            tokenizer.decode(Tokens(None, wrong), seeds=[0, 1])
    if case.noisy:
        with pytest.raises(ValueError, match="1 seeds for 2"):
            tokenizer.decode(Tokens(None, codes), seeds=[0])


@EVERY
def test_random_weights_come_from_the_seed_alone_and_are_marked(case: Case) -> None:
    first = load(case, weights="random")
    torch.manual_seed(77)
    again, other = (load(case, case.name.upper(), weights="random", seed=seed) for seed in (0, 1))
    pairs = list(zip(*(t.model.state_dict().values() for t in (first, again, other)), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs) and not all(torch.equal(a, c) for a, _, c in pairs)
    assert torch.equal(ids(first.encode(images(case, 3))), ids(again.encode(images(case, 3))))
    info = first.info
    assert info.name == case.name and info.family == case.family.name and not info.trained
    assert (info.weights, other.info.weights) == ("random:0", "random:1")
    assert (info.training_data, info.weights_licence) == ("none", "none")
    assert (info.resolution, info.message_length, info.code_dim, info.vocab_size) == case.sizes
    assert info.options["dtype"] == "float32" and info.version == "1"
    with pytest.raises(UsageError, match="needs a preset"):
        load(case, "nonesuch", weights="random", family=case.family.name)


@pytest.mark.parametrize(
    ("case", "options", "says"),
    [pytest.param(c, *wrong, id=f"{n}-{i}") for n, c in CASES.items() for i, wrong in enumerate(c.options)],
)
def test_wrong_options_are_refused(case: Case, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load(case, weights="random", **options)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name_or_path": "comit-m"}, "Did you mean"),
        ({"name_or_path": "titok-s-64"}, "Did you mean"),
        ({"name_or_path": "yucornetto/titok-x", "weights": "random"}, "needs a preset"),
        ({"name_or_path": "comit-nano", "device": "gpu"}, "auto, cpu, cuda"),
        ({"name_or_path": "comit-nano", "dtype": "bfloat16"}, "CUDA"),
        ({"name_or_path": "comit-nano", "dtype": "half"}, "float32"),
        ({"name_or_path": "kmeans-patch"}, "fitted"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_tokenizer(**{"device": "cpu", **arguments})


# ------------------------------------------------------------------------------ files


@EVERY
def test_checkpoints_round_trip(case: Case, checkpoint: Path, tokenizer: Any, tmp_path: Path) -> None:
    assert tokenizer.info.name == "ck" and tokenizer.info.weights.startswith("sha256:")
    told = (tokenizer.info.trained, tokenizer.info.training_data)
    assert told == ((False, "none") if case.family.name == "vq-grid" else (True, "unknown"))
    tokenizer.save(tmp_path / "again")
    files = [path.name for path in checkpoint.glob("*.safetensors")]
    for name in files:
        before, after = (load_file(folder / name) for folder in (checkpoint, tmp_path / "again"))
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    again = load(case, str(tmp_path / "again"))
    named = load(case, case.name.upper(), weights=str(checkpoint))
    assert again.info.name == "again" and named.info.name == case.name
    assert again.info.family == case.family.name
    assert again.info.weights == named.info.weights == tokenizer.info.weights
    x = images(case, 4)
    want = tokenizer.encode(x)
    for other in (again, named):
        assert torch.equal(ids(other.encode(x)), ids(want))
    pictures = [t.decode(want, seeds=range(4)).int() for t in (tokenizer, again)]
    assert (pictures[0] - pictures[1]).abs().max() <= 1  # another alignment of the same weights in memory


DAMAGES: dict[str, tuple[type[Exception], str]] = {
    "truncated": (CorruptFileError, "truncated"),
    "empty": (CorruptFileError, "model.safetensors"),
    "missing key": (UsageError, r"missing \(1\): {key}|{key} is missing"),
    "extra key": (UsageError, r"unexpected \(1\): .*lora"),
    "shape": (UsageError, r"{key} \[7\] instead of \[{shape}\]"),
    "foreign": (UsageError, "{foreign}"),
    "no weights": (MissingError, "model.safetensors"),
    "broken config": (CorruptFileError, "config.json"),
    "no config": (MissingError, "config"),
}


@pytest.mark.parametrize("kind", DAMAGES)
@EVERY
def test_damaged_checkpoints_are_refused_with_a_reason(case: Case, checkpoint: Path, kind: str) -> None:
    path, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    tensors, (key, shape) = load_file(path), case.key
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "missing key":
        save_file({k: v for k, v in tensors.items() if k != key}, path)
    elif kind == "extra key":
        save_file({**tensors, f"{key}.lora": torch.zeros(2)}, path)
    elif kind == "shape":
        save_file({**tensors, key: torch.zeros(7)}, path)
    elif kind == "foreign":
        save_file({"encoder.weight": torch.zeros(3)}, path)
    elif kind == "broken config":
        config.write_text("{not json")
    else:
        (path if kind == "no weights" else config).unlink()
    error, says = DAMAGES[kind]
    with pytest.raises(error, match=says.format(key=key, shape=shape, foreign=case.foreign)):
        load(case, str(checkpoint), family=case.family.name)


@pytest.mark.parametrize(
    ("name", "file", "without", "error", "says"),
    [
        ("flextok", "model", "vae.vae.decoder", UsageError, r"missing \(\d+\): vae.vae.decoder"),
        ("selftok", "model", "model.pos_embed", UsageError, "model.pos_embed is missing"),
        ("selftok", "vae_weights", "", CorruptFileError, "vae_weights.safetensors"),
    ],
)
def test_parts_that_are_missing_are_named(
    name: str, file: str, without: str, error: type[Exception], says: str, tmp_path: Path
) -> None:
    folder = written(CASES[name], tmp_path / "ck")
    path = folder / f"{file}.safetensors"
    if without:
        save_file({k: v for k, v in load_file(path).items() if not k.startswith(without)}, path)
    else:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(error, match=says):
        load(CASES[name], str(folder))


@pytest.mark.parametrize(
    ("case", "change", "says"),
    [pytest.param(c, *wrong, id=f"{n}-{i}") for n, c in CASES.items() for i, wrong in enumerate(c.configs)],
)
def test_configs_that_do_not_fit_are_refused(case: Case, change: Change, says: str, checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError, match=says):
        load(case, weights=str(checkpoint))


@EVERY
def test_pickles_only_when_allowed_and_only_plain_tensors(
    case: Case, checkpoint: Path, tokenizer: Any
) -> None:
    safe, pickled = checkpoint / "model.safetensors", checkpoint / "pytorch_model.bin"
    want = ids(tokenizer.encode(images(case, 2)))
    torch.save(load_file(safe), pickled)
    safe.unlink()
    with pytest.raises(UsageError, match="allow_pickle=true"):
        load(case, str(checkpoint))
    again = load(case, str(checkpoint), allow_pickle="true")
    assert torch.equal(ids(again.encode(images(case, 2))), want)
    with pytest.raises((UsageError, MissingError), match=r"single file|no released file|holds no config"):
        load(case, str(checkpoint), weights=str(pickled), allow_pickle="true")
    torch.save({"model": Path("x")}, pickled)
    with pytest.raises(CorruptFileError, match="plain tensors"):
        load(case, str(checkpoint), allow_pickle="true")
    torch.save({"model": {"a": torch.zeros(1)}}, pickled)
    with pytest.raises((CorruptFileError, UsageError), match="flat dictionary"):
        load(case, str(checkpoint), allow_pickle="true")
    pickled.write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(CorruptFileError, match="truncated"):
        load(case, str(checkpoint), allow_pickle="true")


@EVERY
def test_weights_that_are_not_here_are_named(case: Case, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no such file or directory"):
        load(case, weights=str(tmp_path / "gone"))
    with pytest.raises(MissingError, match="no such directory"):
        load(case, str(tmp_path / "gone"), family=case.family.name)


RELEASED = [preset for family in FAMILIES for preset in family.presets if isinstance(preset.source, Hub)]


@pytest.mark.parametrize("preset", RELEASED, ids=lambda preset: preset.name)
def test_offline_says_what_is_missing_and_how_to_give_it(preset: Preset) -> None:
    assert isinstance(preset.source, Hub)
    for name in (preset.name.upper(), preset.source.repository):
        with pytest.raises(MissingError) as caught:
            load_tokenizer(name, offline=True, device="cpu")
        for part in (
            "config.json, model.safetensors",
            preset.source.repository,
            "--weights DIR",
            "--offline",
        ):
            assert part in str(caught.value)
        assert caught.value.exit_code == 3
    with pytest.raises(MissingError, match=r"pytorch_model\.bin"):
        load_tokenizer(preset.name, offline=True, device="cpu", allow_pickle="true")


@pytest.mark.parametrize("name", ["comit-L", "titok-l-32", "flextok-d18-d18"])
def test_an_unreachable_hub_is_told_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comit_bench.tokenizers.hub.getproxies", dict)

    def nobody(*_: object) -> None:
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", nobody)
    with pytest.raises(MissingError, match=r"config.json, model.safetensors of .* cannot be reached"):
        load_tokenizer(name, device="cpu")


@pytest.mark.parametrize("name", ["comit", "titok", "flextok"])
def test_hub_files_that_are_there_are_used_and_described(name: str, tmp_path: Path) -> None:
    case = replace(CASES[name], name="comit-l") if name == "comit" else CASES[name]
    made = written(CASES[name], tmp_path / "ck")
    preset = builtin()[case.name].preset
    assert isinstance(preset.source, Hub)
    repository = tmp_path / "hub" / f"models--{preset.source.repository.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    made.rename(repository / "snapshots" / "abc")
    for given in (case.name, preset.source.repository):
        info = load(case, given).info
        assert info.name in (case.name, preset.source.repository) and info.revision == "abc"
        assert (info.training_data, info.weights_licence) == (preset.training_data, preset.weights_licence)
    beside = load(case, str(repository / "snapshots" / "abc")).info
    assert beside.name == preset.source.repository and beside.training_data == "unknown"


@pytest.mark.parametrize("name", ["flextok", "selftok"])
def test_the_whole_benchmark_runs_untrained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny import write_images, write_recipes

    write_images(tmp_path / "data")
    write_recipes(tmp_path / "recipes")
    monkeypatch.setattr("comit_bench.probing.pool.usable_cores", lambda: 1)
    options = {"flextok": {"tokens": 4}, "selftok": {"decoder": "renderer"}}[name]
    (record,) = comit_bench.evaluate(
        CASES[name].name,
        ["tiny-colours"],
        suite="scenes",
        references=False,
        weights="random",
        options=options,
        data_root=tmp_path / "data",
        include=(tmp_path / "recipes",),
        cache=tmp_path / "cache",
        output=tmp_path / "out",
    )
    assert record.tokenizer.name == CASES[name].name and not record.tokenizer.trained
    told = record.protocol["tokenizer"]["options"]
    assert {key: told[key] for key in options} == {key: str(value) for key, value in options.items()}


# ---------------------------------------------------------------------------- presets


def described(name: str) -> dict[str, Any]:
    """The ``config.json`` of a preset's network, as the family writes it."""
    if name in COMIT:
        config = comit_files.config_from_spec(COMIT[name])
    elif name in TITOKS:
        config = titok.config_from_spec(TITOKS[name])
    elif name in GRIDS:
        config = vq_grid.config_from_spec(GRIDS[name])
    elif name in FLEXTOKS:
        config = flextok_config(FLEXTOKS[name])
    else:
        config = (alit_config.released_config if name in alit_config.VARIANTS else selftok_config)(name)
    return json.loads(json.dumps(config))  # type: ignore[no-any-return]


WITH_NETWORKS = [
    entry.preset
    for entry in builtin().values()
    if entry.family.takes_weights and entry.preset.parameters is not None
]
TWINS = {  # presets of one network: a config describes the first
    "comit-nano-no-srepa": "comit-nano",
    "comit-nano-no-local-crops": "comit-nano",
    "comit-nano-untrained": "comit-nano",
    "flextok-d18-d28-dfn": "flextok-d18-d28",
    "alit-small-in100": "alit-small",
}


@pytest.mark.parametrize("preset", WITH_NETWORKS, ids=lambda preset: preset.name)
def test_a_preset_is_described_by_its_config_and_by_no_other(
    preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    first = TWINS.get(preset.name, preset.name)
    config = described(first)
    (tmp_path / "config.json").write_text(json.dumps(config))
    entry = entry_for(str(tmp_path))
    assert entry.name == first and preset in entry.family.presets
    assert [family.name for family in FAMILIES if family.recognises(config)] == [entry.family.name]
    for key in preset.sizes:  # another size is nobody's, unless it makes another preset
        other = json.loads(json.dumps(config))
        put(key, 3)(other)
        found = entry.family.recognises(other)
        assert found is not None and found.name == entry.family.name
    if entry.family.name == "flextok":
        (tmp_path / "config.json").write_text(json.dumps({"config": config}))
        assert entry_for(str(tmp_path)).name == first


@pytest.mark.parametrize("preset", WITH_NETWORKS, ids=lambda preset: preset.name)
def test_a_preset_has_its_published_size(preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    info = load_tokenizer(preset.name, weights="random", device="meta", offline=True).info
    assert (info.message_length, info.vocab_size) == (preset.message_length, preset.vocab_size)
    assert preset.parameters == pytest.approx(info.parameters / 1e6, rel=0.003, abs=0.006)
    assert info.name == preset.name and info.family == builtin()[preset.name].family.name


def test_directories_hub_ids_and_families_that_nobody_knows(tmp_path: Path) -> None:
    assert entry_for("cvg-unibe/COMiT-XL").name == "comit-xl"
    assert entry_for("somebody/my-titok").name == "titok"
    for config, says in (
        ({"family": "titik"}, "unknown tokenizer family 'titik'. Did you mean 'titok'"),
        ({"x": 1}, "cannot tell which tokenizer family this is .known: alit, comit, "),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UsageError, match=says):
            entry_for(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    assert entry_for(str(tmp_path)).name == "vqmodel"
    (tmp_path / "config.json").write_text(json.dumps({"family": "kmeans-patch"}))
    assert entry_for(str(tmp_path)).name == "kmeans-patch"


def test_everything_about_a_family_is_known_without_torch() -> None:
    code = "import sys; from comit_bench.tokenizers.registry import tokenizers; tokenizers()"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.stdout.split() == [b"False"], done.stderr.decode()
