"""The ALIT adapter: invariance, options, round trips, refusals."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alit_sizes import TINY, TINY_VAE
from attention_maps import gather_attention
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from comit_bench.errors import MissingError, UnsupportedOperation, UsageError
from comit_bench.nn.attention import AttentionRequest
from comit_bench.seeding import generator_for
from comit_bench.tokenizers.alit import config as alit_config
from comit_bench.tokenizers.alit.adapter import AlitTokenizer, save, to_uint8
from comit_bench.tokenizers.alit.config import VARIANTS
from comit_bench.tokenizers.alit.model import Alit, AlitSpec
from comit_bench.tokenizers.base import AttendingTokenizer, Tokenizer
from comit_bench.tokenizers.load import load_tokenizer

CASE = Path(__file__).parents[1] / "parity" / "cases" / "alit" / "vqgan_quantized_slim"
EAGER = replace(TINY, threshold=0.02)  # drops many tokens, so that halting shows


def write(folder: Path, spec: AlitSpec = TINY) -> Path:
    """A checkpoint whose every parameter matters."""
    model = Alit(spec).requires_grad_(False)
    model.init_weights(torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        scale = 0.2 if spec.base is TINY.base else 0.1  # messages then differ between images
        parameter.add_(torch.randn(parameter.shape, generator=g) * scale)
    save(model, folder)
    return folder


def images(count: int, side: int = 32) -> Tensor:
    """Patches of colour, which differ between images more than noise does."""
    g = torch.Generator().manual_seed(5)
    colours = torch.rand(count, 3, 2, 2, generator=g)
    return F.interpolate(colours, size=side, mode="bilinear").mul(255).to(torch.uint8)


def generators(count: int) -> list[torch.Generator]:
    return [generator_for(0, f"image-{i}") for i in range(count)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("alit") / "ck")


def load(folder: Path, **options: Any) -> AlitTokenizer:
    tokenizer = load_tokenizer(str(folder), device="cpu", **options)
    assert isinstance(tokenizer, AlitTokenizer) and isinstance(tokenizer, Tokenizer)
    return tokenizer


def test_iterations_choose_the_message(checkpoint: Path) -> None:
    whole = load(checkpoint)
    steps = whole.messages(images(8))
    for count in (1, 2, 3):
        tokenizer = load(checkpoint, iterations=count)
        assert tokenizer.info.message_length == 4 * count
        assert tokenizer.info.options["iterations"] == str(count)
        tokens = tokenizer.encode(images(8))
        assert torch.equal(tokens.ids, steps[count - 1].ids)  # type: ignore[arg-type]
        assert torch.equal(tokenizer.codes_from_ids(tokens.ids), tokens.codes)  # type: ignore[arg-type]
        out = tokenizer.decode(tokens, seeds=range(8))
        assert out.shape == (8, 3, 32, 32) and out.dtype == torch.uint8
        assert torch.equal(out, whole.decode(tokens, seeds=range(8)))  # the length says which iteration
    for wrong in (0, 4, 1.5):
        with pytest.raises(UsageError, match="1 to 3"):
            load(checkpoint, iterations=wrong)


def test_halted_messages_of_an_iteration_do_not_depend_on_later_ones(tmp_path: Path) -> None:
    folder = write(tmp_path / "ck", EAGER)
    steps = load(folder, halting="on").messages(images(2), generators=generators(2))
    short = load(folder, halting="on", iterations=2).messages(images(2), generators=generators(2))
    assert torch.equal(short[1].ids, steps[1].ids)  # type: ignore[arg-type]
    assert steps[0].dropped is not None and steps[0].dropped.any()


def test_latents_that_probes_read(checkpoint: Path) -> None:
    codes = load(checkpoint).encode(images(3))
    picture = load(checkpoint).decode(codes, seeds=range(3))
    for kind, dim in (("prequant", 5), ("raw", 40)):
        tokenizer = load(checkpoint, latents=kind)
        assert tokenizer.info.vocab_size is None and tokenizer.info.code_dim == dim
        tokens = tokenizer.encode(images(3))
        assert tokens.ids is None and tokens.codes.shape == (3, 12, dim)
        assert torch.equal(tokenizer.decode(tokens, seeds=range(3)), picture)
        with pytest.raises(UnsupportedOperation, match="continuous"):
            tokenizer.codes_from_ids(torch.zeros(1, 12, dtype=torch.int64))
    assert torch.allclose(codes.codes.norm(dim=-1), torch.ones(3, 12), atol=1e-6)


def test_a_checkpoint_has_its_own_base(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="choose among released names"):
        load(checkpoint, base="vae")


def test_options_that_mean_nothing_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vae = load(write(tmp_path / "vae", TINY_VAE), halting="on")
    assert "halting=on changes nothing" in caplog.text
    assert (vae.info.options["halting"], vae.info.options["posterior"]) == ("off", "mode")
    vqgan = load(write(tmp_path / "vqgan"), posterior="sample")
    assert "posterior=sample changes nothing" in caplog.text
    assert vqgan.info.options["posterior"] == "none"
    never = load(write(tmp_path / "never", replace(TINY, halting=False)), halting="on")
    assert never.info.options["halting"] == "off"


def test_attention_and_lengths(checkpoint: Path) -> None:
    tokenizer = load(checkpoint)
    tokens = tokenizer.encode(images(2))
    assert isinstance(tokenizer, AttendingTokenizer) and tokenizer.attention_layers == 3
    assert tokenizer.attention_times((0.5,)) == ()
    maps = gather_attention(tokenizer, tokens, AttentionRequest(layers=(1,), times=(0.1, 0.9)), seeds=[0, 1])
    assert maps.shape == (1, 1, 2, 2, 12, 16, 16)
    both = gather_attention(tokenizer, tokens, AttentionRequest(layers=(2, 1)), seeds=[0, 1])
    assert torch.equal(both[1, 0], maps[0, 0]) and not torch.equal(both[0], both[1])
    with pytest.raises(ValueError, match=r"0\.\.2"):
        gather_attention(tokenizer, tokens, AttentionRequest(layers=(7,)), seeds=[0, 1])
    assert tokenizer.lengths(images(3), threshold=1e9).tolist() == [1, 1, 1]
    errors = [
        (tokenizer.model.reconstruct(s.codes) - images(3) / 255).abs().mean(dim=(1, 2, 3))
        for s in tokenizer.messages(images(3))
    ]
    assert tokenizer.lengths(images(3), threshold=0).tolist() == (torch.stack(errors).argmin(0) + 1).tolist()


def test_pixels_are_clipped_and_truncated() -> None:
    assert to_uint8(torch.tensor([-0.1, 0.0, 0.999, 1.0, 1.2])).tolist() == [0, 0, 254, 255, 255]


# ---------------------------------------------------------------- files


def test_round_trip(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = load(checkpoint)
    tokenizer.save(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.info.weights == tokenizer.info.weights and again.info.weights.startswith("sha256:")
    assert torch.equal(again.encode(images(2)).codes, tokenizer.encode(images(2)).codes)
    assert again.info.name == "again" and again.info.family == "alit"


@pytest.mark.parametrize("spec", [TINY_VAE, replace(TINY, quantized=False)], ids=["vae", "continuous"])
def test_other_kinds_round_trip(tmp_path: Path, spec: AlitSpec) -> None:
    tokenizer = load(write(tmp_path / "ck", spec))
    tokens = tokenizer.encode(images(2))
    assert (tokens.ids is None) is (not spec.quantized)
    assert tokenizer.decode(tokens, seeds=[0, 1]).shape == (2, 3, 32, 32)


def test_a_recorded_case_keeps_its_config() -> None:
    config = json.loads((CASE / "config.json").read_text())
    mine = alit_config.config_from_spec(alit_config.spec_from_config(config, CASE))
    for node in ("base_tokenizer", "adaptive_tokenizer"):
        shared = mine[node].keys() & config[node].keys()
        for key in shared - {"ddconfig"}:
            assert mine[node][key] == config[node][key], key


def test_losses_in_the_file_are_ignored(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    counter = {"gan_losses.0.discriminator.main.3.num_batches_tracked": torch.tensor(7)}
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    save_file({**tensors, **counter}, tmp_path / "model.safetensors")
    model = load_tokenizer(str(tmp_path), device="cpu").model
    assert not any(key.startswith("gan_losses") for key in model.state_dict())


# ---------------------------------------------------------------- names


@pytest.fixture
def small_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names stand for tiny networks."""

    def spec(self: alit_config.Variant) -> AlitSpec:
        return replace(TINY if self.base == "vqgan" else TINY_VAE, quantized=self.quantized)

    monkeypatch.setattr(alit_config.Variant, "spec", property(spec))


@pytest.mark.usefixtures("small_names")
def test_random_weights_by_name() -> None:
    tokenizer = load_tokenizer("ALIT-Small", weights="random", device="cpu")
    assert tokenizer.info.name == "alit-small" and not tokenizer.info.trained
    assert tokenizer.info.weights == "random:0" and tokenizer.info.training_data == "none"
    ids = tokenizer.encode(images(8)).ids
    assert ids is not None and len(ids.unique(dim=0)) > 1
    vae = load_tokenizer("alit-base", weights="random", device="cpu", base="vae", latent="continuous")
    assert vae.info.name == "alit-base-vae-continuous" and vae.info.vocab_size is None


@pytest.mark.parametrize(
    ("name", "options", "becomes"),
    [
        ("alit-small", {}, "alit-small"),
        ("alit-small", {"base": "vae"}, "alit-small-vae"),
        ("alit-small", {"base": "vae", "latent": "continuous"}, "alit-small-vae-continuous"),
        ("alit-small-vae", {"base": "vqgan"}, "alit-small"),
        ("alit-small", {"latent": "continuous"}, "alit-small-continuous"),
        ("alit-semilarge", {"base": "vqgan"}, "alit-semilarge"),
    ],
)
def test_options_choose_a_released_variant(name: str, options: dict[str, str], becomes: str) -> None:
    got, variant = alit_config.choose_variant(name, options.get("base"), options.get("latent"))
    assert got == becomes and variant == VARIANTS[becomes]


def test_names_without_weights_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path))
    with pytest.raises(MissingError, match=r"comit-bench weights fetch alit-semilarge`"):
        load_tokenizer("alit-semilarge", device="cpu", offline=True)
    with pytest.raises(UsageError, match=r"no weights were released for alit-base with base=vae"):
        load_tokenizer("alit-base", device="cpu", base="vae")
    with pytest.raises(UsageError, match="vqgan, vae"):
        load_tokenizer("alit-base", device="cpu", base="kl")
    with pytest.raises(MissingError, match="no such file or directory"):
        load_tokenizer("alit-base", device="cpu", weights=str(tmp_path / "gone.pth"))


@pytest.mark.usefixtures("small_names")
def test_files_of_weights_by_name(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path / "cache"))
    tensors = load_file(checkpoint / "model.safetensors")
    want = load(checkpoint).encode(images(2)).ids
    released = tmp_path / "released.pth"
    extra = {"gan_losses.0.discriminator.main.3.num_batches_tracked": torch.tensor(7)}
    content = {"ema": {**tensors, **extra}, "args": Namespace(epochs=1), "epoch": 3}
    torch.save(content, released)
    for given in (checkpoint / "model.safetensors", released, released):
        tokenizer = load_tokenizer("alit-small", weights=str(given), device="cpu", allow_pickle="true")
        assert tokenizer.info.name == "alit-small"
        assert torch.equal(tokenizer.encode(images(2)).ids, want)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="allow_pickle=true"):
        load_tokenizer("alit-small", weights=str(released), device="cpu")
    folders = list((tmp_path / "cache" / "weights").glob("alit-small-*"))
    assert len(folders) == 1, "converted once"
    assert not any(key.startswith("gan_losses") for key in load_file(folders[0] / "model.safetensors"))
    with pytest.raises(UsageError, match="says nothing about sizes"):
        load_tokenizer(str(checkpoint), weights=str(checkpoint / "model.safetensors"), device="cpu")
    (tmp_path / "bare").mkdir()
    save_file(tensors, tmp_path / "bare" / "model.safetensors")
    bare = load_tokenizer("alit-small", weights=str(tmp_path / "bare"), device="cpu")
    assert torch.equal(bare.encode(images(2)).ids, want)  # type: ignore[arg-type]
