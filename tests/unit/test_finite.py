"""NaN and infinity never become an id, a byte or a score: seen on the way, told once per call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alit_sizes import TINY, TINY_VAE
from attention_maps import gather_attention
from selftok_sizes import RENDERER, SMALL
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from comit_bench.errors import BenchError
from comit_bench.nn.fsq import FSQ
from comit_bench.nn.vae import KLVaeSpec
from comit_bench.nn.vq import VectorQuantizer
from comit_bench.tokenizers.alit import adapter as alit
from comit_bench.tokenizers.alit.model import Alit
from comit_bench.tokenizers.base import Tokens, in_tiles, only_finite, tile_rows
from comit_bench.tokenizers.contract import check_decoded
from comit_bench.tokenizers.flextok import adapter as flextok
from comit_bench.tokenizers.flextok.blocks import TableSpec
from comit_bench.tokenizers.flextok.model import FlexTok, FlexTokSpec, TrunkSpec
from comit_bench.tokenizers.load import load_tokenizer
from comit_bench.tokenizers.origin import random_network, untrained
from comit_bench.tokenizers.selftok import adapter as selftok
from comit_bench.tokenizers.selftok.model import Selftok
from comit_bench.tokenizers.titok import adapter as titok
from comit_bench.tokenizers.titok.model import PRESETS as TITOK
from comit_bench.tokenizers.titok.model import Titok, VitSize

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    token = tile_rows.set(2)
    yield
    tile_rows.reset(token)


def comit_nano(**options: Any) -> Any:
    return load_tokenizer("comit-nano", weights="random", device="cpu", steps=2, **options)


def titok_nano() -> Any:
    return load_tokenizer("titok-nano", weights="random", device="cpu")


def titok_legacy() -> Any:
    from comit_bench.nn.vqgan import VqganSpec

    size = VitSize(width=32, layers=1, heads=2)
    pixels = VqganSpec(hidden=32, multipliers=(1, 1, 1), blocks=1, latent_channels=8, codebook_size=16)
    spec = replace(TITOK["titok-nano"], encoder=size, decoder=size, image_size=16, pixels=pixels)
    model = Titok(spec)
    model.init_weights(torch.Generator().manual_seed(0))
    info = titok._info(model, untrained("titok-small", 0))
    return titok.TitokTokenizer(model, info, device=CPU)


def grid_nano() -> Any:
    return load_tokenizer("vq-grid-nano", weights="random", device="cpu")


def alit_tiny(spec: Any = TINY, **options: Any) -> Any:
    model = Alit(spec)
    model.init_weights(torch.Generator().manual_seed(0))
    info = alit._info(model, untrained("alit-tiny", 0))
    return alit.AlitTokenizer(model, info, device=CPU, **options)


def flextok_tiny() -> Any:
    trunk = TrunkSpec(depth=1, width=32, head_dim=16, positions=TableSpec(kind="grid", size=(4, 4)))
    vae = KLVaeSpec(channels=4, widths=(8, 8), layers=1, groups=4)
    spec = FlexTokSpec(encoder=trunk, decoder=trunk, registers=8, register_positions=8, vae=vae)
    model = random_network(FlexTok, spec, CPU, 0, zero_gates=False)
    info = flextok._info(model, untrained("flextok-tiny", 0))
    return flextok.FlexTokTokenizer(model, info, device=CPU, steps=2)


def selftok_tiny(spec: Any = SMALL, **options: Any) -> Any:
    model = random_network(Selftok, spec, CPU, 0, zero_gates=False)
    return selftok.SelftokTokenizer(
        model, selftok._info(model, untrained("selftok-tiny", 0)), device=CPU, **options
    )


def vqmodel_tiny() -> Any:
    from diffusers import VQModel

    from comit_bench.tokenizers.base import TokenizerInfo
    from comit_bench.tokenizers.vqmodel import VqModelTokenizer

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    model: Any = VQModel(
        **blocks, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, num_vq_embeddings=16
    )
    info = TokenizerInfo(
        name="vqmodel-tiny",
        family="vqmodel",
        kind="learned",
        weights="random:0",
        parameters=1,
        message_length=64,
        vocab_size=16,
        code_dim=3,
        resolution=16,
        preprocessing="none",
    )
    return VqModelTokenizer(model, info, grid=8, device=CPU)


FAMILIES: dict[str, Callable[[], Any]] = {
    "comit": comit_nano,
    "titok": titok_nano,
    "titok-legacy": titok_legacy,
    "vq-grid": grid_nano,
    "alit": alit_tiny,
    "alit-vae": lambda: alit_tiny(TINY_VAE),
    "alit-raw": lambda: alit_tiny(latents="raw"),
    "flextok": flextok_tiny,
    "selftok": selftok_tiny,
    "selftok-renderer": lambda: selftok_tiny(RENDERER),
    "selftok-prequant": lambda: selftok_tiny(latents="prequant"),
    "vqmodel": vqmodel_tiny,
}


def images(tokenizer: Any, count: int = 3) -> Tensor:
    side = tokenizer.info.resolution
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def spoil(module: nn.Module, value: float) -> None:
    """One weight of every convolution and linear map."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.view(-1)[0] = value


NAN, HUGE = float("nan"), 3e38  # finite, but what is multiplied with it is not


@pytest.mark.parametrize(
    ("family", "value"),
    [*((name, NAN) for name in FAMILIES), ("comit", HUGE), ("titok", HUGE), ("vq-grid", HUGE)],
)
def test_no_ids_and_no_pixels_from_what_is_not_finite(family: str, value: float) -> None:
    tokenizer = FAMILIES[family]()
    pixels = images(tokenizer)
    good = tokenizer.encode(pixels)
    assert tokenizer.decode(good, seeds=range(3)).dtype == torch.uint8
    spoil(tokenizer.model, value)
    with pytest.raises(BenchError, match=rf"{tokenizer.info.name}.*(latents|codes).* not finite"):
        tokenizer.encode(pixels)
    with pytest.raises(BenchError, match=rf"{tokenizer.info.name}.*pixels.* not finite"):
        tokenizer.decode(good, seeds=range(3))


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name not in ("alit-raw", "selftok-prequant")]
)
def test_a_single_bad_code_is_seen(family: str) -> None:
    tokenizer = FAMILIES[family]()
    tokens = tokenizer.encode(images(tokenizer))
    codes = tokens.codes.clone()
    codes[-1, -1, 0] = float("nan")
    with pytest.raises(BenchError, match="pixels"):
        tokenizer.decode(replace(tokens, codes=codes), seeds=range(3))


class Waits(TorchDispatchMode):
    """Counts how often a number is fetched from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["titok", "vq-grid", "vqmodel"])
def test_the_device_is_asked_once_per_call_and_not_per_tile(family: str) -> None:
    tokenizer = FAMILIES[family]()
    counts = []
    for size in (2, 6):
        tokens = tokenizer.encode(images(tokenizer, size))
        with Waits() as encoding:
            tokenizer.encode(images(tokenizer, size))
        with Waits() as decoding:
            tokenizer.decode(tokens, seeds=range(size))
        counts.append((encoding.count, decoding.count))
    assert counts[0] == counts[1]


def test_the_flags_of_many_tiles_are_fetched_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = torch.stack

    def stack(tensors: Any, *rest: Any, **more: Any) -> Tensor:
        asked.append(len(tensors))
        return real(tensors, *rest, **more)

    monkeypatch.setattr(torch, "stack", stack)
    in_tiles(lambda x: Tokens(None, x), torch.zeros(20, 4, 2))
    assert asked == [10]


@pytest.mark.parametrize(
    "quantizer", [FSQ((4, 4)), VectorQuantizer(5, 2, l2_norm=True), VectorQuantizer(5, 2, l2_norm=False)]
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_quantizers_observe_what_they_are_given(quantizer: Any, value: float) -> None:
    z = torch.zeros(3, 4, 2)
    with only_finite("fine"):
        quantizer(z)
    z[2, 1, 0] = value
    quantizer(z)  # nobody watches: training decides for itself
    with pytest.raises(BenchError, match="toy: its latents"), only_finite("toy"):
        quantizer(z)


def test_latents_too_large_to_compare_are_refused() -> None:
    """The squared length of 1e25 is infinite in float32: every distance is the same, any id would do."""
    for l2_norm in (True, False):
        with pytest.raises(BenchError, match="latents"), only_finite("toy"):
            VectorQuantizer(5, 2, l2_norm=l2_norm).ids(torch.full((1, 2), 1e25))


def test_plugins_that_use_the_shared_tiles_are_watched() -> None:
    with pytest.raises(BenchError, match="toy: its codes are not finite"):
        in_tiles(lambda x: Tokens(None, x.float() / 0), torch.zeros(3, 4, 2), name="toy")
    with pytest.raises(RuntimeError, match="own error"), only_finite("toy"):
        raise RuntimeError("own error")


def test_maps_and_inspection_are_watched() -> None:
    from comit_bench.nn.attention import AttentionRequest

    for make in (comit_nano, titok_nano, alit_tiny):
        tokenizer = make()
        tokens = tokenizer.encode(images(tokenizer, 2))
        request = AttentionRequest(layers=(0,))
        gather_attention(tokenizer, tokens, request, seeds=range(2))
        spoil(tokenizer.model, float("nan"))
        with pytest.raises(BenchError, match="attention maps"):
            gather_attention(tokenizer, tokens, request, seeds=range(2))
    nano, small = comit_nano(), alit_tiny()
    codes, offsets, noise = torch.zeros(1, 16, 4), torch.zeros(1, 2), torch.zeros(1, 12, 8, 8)
    for tokenizer in (nano, small):
        spoil(tokenizer.model, float("nan"))
    with pytest.raises(BenchError, match="pixels"):
        nano.one_step(codes, offsets, noise)
    with pytest.raises(BenchError, match="latents"):
        nano.messages(images(nano, 1), nano.policy("global"), None)
    with pytest.raises(BenchError, match="latents"):
        small.messages(images(small, 1))
    with pytest.raises(BenchError, match="latents and pixels"):
        small.lengths(images(small, 1))


def test_nothing_is_stored_of_codes_that_are_not_finite(tmp_path: Path) -> None:
    from PIL import Image

    from comit_bench.data.split import Split
    from comit_bench.pipeline.tokenize import open_store, store_key, tokenize_split

    class Plugin:
        info = replace(load_tokenizer("pixel-oracle", device="cpu").info, name="plugin")

        def encode(self, images_u8: Tensor, **_: object) -> Tokens:
            return Tokens(None, torch.full((len(images_u8), 16, 192), float("nan")))

    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.new("RGB", (32, 32)).save(path)
    tokenizer: Any = Plugin()
    split = Split("val", ("a", "b", "c"), paths, None)
    key = store_key(tokenizer, policy=None, fingerprint="x", seed=0, selection="all")
    store = open_store(tokenizer, tmp_path, key, count=3)
    with pytest.raises(BenchError, match="plugin: its codes are not finite"):
        tokenize_split(tokenizer, split, store, key=key, rows=range(3), shards=[0])
    assert not list(store.directory.glob("*.safetensors"))


def test_judges_that_compute_nan_do_not_judge(tmp_path: Path) -> None:
    from comit_bench.metrics.perceptual import ScenesTeacherFeatures

    judge = ScenesTeacherFeatures(CPU)
    pictures = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    judge(pictures)
    spoil(judge._teacher.network, float("nan"))
    with pytest.raises(BenchError, match=r"scenes-teacher.*cannot judge"):
        judge(pictures)


def test_raw_pixels_that_are_not_finite_are_refused() -> None:
    oracle = load_tokenizer("pixel-oracle", device="cpu")
    with pytest.raises(BenchError, match="pixel-oracle: its pixels are not finite"):
        oracle.decode(Tokens(None, torch.full((1, 16, 192), NAN)), seeds=[0])


def test_floats_are_no_images() -> None:
    info = load_tokenizer("pixel-oracle", device="cpu").info
    with pytest.raises(BenchError, match=r"must return uint8 images \[2, 3, 32, 32\], got float32"):
        check_decoded(torch.zeros(2, 3, 32, 32), info, 2)
    with pytest.raises(BenchError, match=r"got uint8 \[1, 3, 32, 32\]"):
        check_decoded(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), info, 2)
