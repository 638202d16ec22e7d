"""vq-grid: the network's contract, its files, its adapter, and the weights that ship."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from comit_bench.errors import UsageError
from comit_bench.files import shipped_weights
from comit_bench.results.schema import TokenizerRow
from comit_bench.tokenizers.checkpoints import on_meta
from comit_bench.tokenizers.load import load_tokenizer
from comit_bench.tokenizers.vq_grid.adapter import config_from_spec, save, spec_from_config
from comit_bench.tokenizers.vq_grid.model import PRESETS, VqGrid, VqGridSpec
from comit_bench.train.data import PROBE_VAL_SCENES, paint_scenes

SMALL = VqGridSpec(
    image_size=16, patch=2, width=16, depth=1, inner_width=32, head_dim=16, fsq_levels=(4, 3, 2)
)


def images(count: int, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def network(spec: VqGridSpec, seed: int = 0) -> VqGrid:
    model = VqGrid(spec)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def test_the_preset_has_the_promised_size() -> None:
    model = on_meta(VqGrid, PRESETS["vq-grid-nano"])
    assert sum(p.numel() for p in model.parameters()) == 491720
    spec = model.spec
    assert (spec.grid, spec.message_length, model.quantizer.vocab_size) == (4, 16, 1000)
    assert VqGrid(spec).quantizer.codes(torch.arange(1000)).abs().max() == 1.0


def test_keys_are_a_contract() -> None:
    block = {"attn.in_proj_bias", "attn.in_proj_weight"} | {
        f"{layer}.{part}"
        for layer in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
        for part in ("weight", "bias")
    }
    want = {f"{side}.{name}" for side in ("encoder", "decoder") for name in ("positions", "inner_positions")}
    layers = {
        "encoder": ("patch_embed", "merge", "norm", "head"),
        "decoder": ("embed", "split", "norm", "pixels", "smooth"),
    }
    for side, names in layers.items():
        want |= {f"{side}.{name}.{part}" for name in names for part in ("weight", "bias")}
        want |= {f"{side}.blocks.{i}.{key}" for i in range(2) for key in block}
        want |= {f"{side}.inner_blocks.0.{key}" for key in block}
    assert on_meta(VqGrid, PRESETS["vq-grid-nano"]).state_dict().keys() == want


@pytest.mark.parametrize("spec", [*PRESETS.values(), SMALL])
def test_config_and_weights_round_trip(spec: VqGridSpec, tmp_path: Path) -> None:
    config = json.loads(json.dumps(config_from_spec(spec)))
    assert spec_from_config(config, Path("x")) == spec
    model = network(spec)
    save(model, tmp_path / "saved", extra={"training_data": "noise", "weights_licence": "MIT", "group": "g"})
    loaded = load_tokenizer(str(tmp_path / "saved"), device="cpu")
    assert (loaded.info.family, loaded.info.name) == ("vq-grid", "saved")
    assert (loaded.info.training_data, loaded.info.weights_licence) == ("noise", "MIT")
    assert loaded.info.group == TokenizerRow.from_info(loaded.info).group == "g"
    save(model, tmp_path / "again")
    alone = load_tokenizer(str(tmp_path / "again"), device="cpu")
    assert (alone.info.group, TokenizerRow.from_info(alone.info).group) == ("", None)
    assert (alone.info.weights, alone.info.configuration) == (loaded.info.weights, loaded.info.configuration)
    pixels = images(3, spec.image_size)
    with torch.no_grad():
        ids, codes = model.encode(pixels.float() / 255)
    tokens = loaded.encode(pixels)
    assert tokens.ids is not None and torch.equal(tokens.ids, ids) and torch.equal(tokens.codes, codes)
    loaded.save(tmp_path / "again")  # type: ignore[attr-defined]
    again = load_tokenizer(str(tmp_path / "again"), device="cpu")
    assert again.info.weights == loaded.info.weights
    assert again.info.training_data == "noise"


def test_the_message_says_where_things_are() -> None:
    """Even with random weights most cells of the picture follow their own token more than any other of the
    16 (chance is one cell): tokens enter the decoder at their place."""
    model = network(SMALL)
    codes = torch.zeros(1, SMALL.message_length, 3, requires_grad=True)
    drawn = model.decode(codes)
    side, cell = SMALL.grid, 2 * SMALL.patch
    own = []
    for number in range(SMALL.message_length):
        row, column = (cell * part for part in divmod(number, side))
        (grad,) = torch.autograd.grad(
            drawn[0, :, row + 1 : row + cell - 1, column + 1 : column + cell - 1].square().sum(),
            codes,
            retain_graph=True,
        )
        own.append(int(grad[0].norm(dim=1).argmax()) == number)
    assert sum(own) >= SMALL.message_length // 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 3}, "do not tile"),
        ({"width": 40}, "multiple of head_dim"),
        ({"depth": 0}, "1 or more"),
        ({"fsq_levels": (8, 1)}, "2 or more"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)
    node = config_from_spec(SMALL)
    node["model"] |= {k: list(v) if isinstance(v, tuple) else v for k, v in change.items()}
    with pytest.raises(UsageError, match=message):
        spec_from_config(node, Path("config.json"))


@pytest.mark.parametrize(("name", "vocabulary"), [("vq-grid-nano", 1000), ("titok-nano", 1024)])
def test_shipped_weights_tokenize_and_reconstruct(name: str, vocabulary: int) -> None:
    folder = shipped_weights(name)
    assert (folder / "model.safetensors").stat().st_size < 5e6
    assert f"# {name}" in (folder / "README.md").read_text()
    shipped = load_tokenizer(name, device="cpu")
    info = shipped.info
    assert info.trained and info.name == name and info.weights.startswith("sha256:")
    assert (info.message_length, info.vocab_size, info.resolution) == (16, vocabulary, 32)
    assert info.training_data == "scenes-recognition train (50000 scenes)"
    assert info.weights_licence == "Apache-2.0"
    pixels = paint_scenes("val", PROBE_VAL_SCENES, 64, 32).images
    tokens = shipped.encode(pixels)
    assert tokens.ids is not None and len(torch.unique(tokens.ids)) > 200
    drawn = shipped.decode(tokens, seeds=range(64))
    assert torch.equal(shipped.decode(tokens, seeds=range(64, 128)), drawn)

    def psnr(others: Tensor) -> float:
        error = (pixels.float() - others.float()).square().flatten(1).mean(1)
        return float((10 * torch.log10(255**2 / error)).mean())

    flat = pixels.float().mean((2, 3), keepdim=True).expand(-1, -1, 32, 32)
    assert psnr(drawn) > psnr(flat) + 6
    assert psnr(drawn) > psnr(drawn.roll(1, 0)) + 5
