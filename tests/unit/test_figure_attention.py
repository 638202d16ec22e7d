"""Figure ``attention``: its numbers by another way, its masks, its files and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_maps import gather_attention
from PIL import Image
from typer.testing import CliRunner

from comit_bench.commands.app import app
from comit_bench.errors import MissingError, UnsupportedOperation, UsageError
from comit_bench.figures import attention, style
from comit_bench.figures.inputs import Images, encode, load_inputs, noise_seeds
from comit_bench.metrics.overlap import binary, overlaps
from comit_bench.nn.attention import AttentionRequest
from comit_bench.tokenizers.load import load_tokenizer


@pytest.fixture(scope="module")
def nano() -> Any:
    return load_tokenizer("comit-nano", device="cpu")


@pytest.fixture(scope="module")
def scenes(nano: Any) -> Images:
    return load_inputs("scenes", nano.info, 3, 0)


@pytest.fixture(scope="module")
def data(nano: Any, scenes: Images) -> attention.Attention:
    return attention.compute(nano, scenes, layer=-1, time=0.2, shares=(10, 20, 30, 40))


def test_the_pixels_shown_are_those_that_are_counted() -> None:
    maps = torch.randint(0, 4, (6, 5, 5), generator=torch.Generator().manual_seed(0)).float()
    mask = torch.zeros(10, 10, dtype=torch.bool)
    mask[3:7, 2:8] = True
    for resize in ("nearest", "bilinear"):
        kept = binary(maps, 10, 30, resize=resize)
        assert kept.flatten(1).sum(dim=1).tolist() == [30] * 6
        both, either = (kept & mask).flatten(1).sum(1), (kept | mask).flatten(1).sum(1)
        assert torch.equal(overlaps(maps, mask, (30,), resize=resize)[0], both.double() / either)


def test_numbers_of_the_gallery(nano: Any, scenes: Images, data: attention.Attention) -> None:
    assert (data.layer, data.shares) == (3, (10, 20, 30, 40)) and data.time == pytest.approx(0.2)
    assert scenes.masks is not None
    with Image.open(scenes.masks[0]) as mask:
        assert np.array_equal(data.masks[0], np.asarray(mask) > 127)
    both = (data.binary & data.masks[:, None]).sum((2, 3))
    either = (data.binary | data.masks[:, None]).sum((2, 3))
    np.testing.assert_allclose(data.iou, both / either)
    maps = gather_attention(
        nano,
        encode(nano, scenes),
        AttentionRequest(layers=(3,), times=(0.2,)),
        seeds=noise_seeds(scenes.names, 0),
    )[0, 0].mean(dim=1)
    for n in range(3):
        scores = overlaps(maps[n], torch.from_numpy(data.masks[n]), data.shares, resize="bilinear").numpy()
        assert np.array_equal(scores.max(axis=1), data.iou[n])
        assert np.array_equal(maps[n][data.tokens[n]].numpy(), data.maps[n])


def test_numbers_of_the_sweep(nano: Any, scenes: Images, data: attention.Attention) -> None:
    sweep = attention.compute_sweep(nano, scenes, share=20, times=(0.2, 0.15, 0.5, 0.99))
    assert sweep.layers == (0, 1, 2, 3) and sweep.times == pytest.approx((0.2, 0.5))
    assert sweep.miou.shape == (4, 2) and sweep.images == 3
    assert sweep.miou[3, 0] == pytest.approx(data.iou[:, 1].mean())


def test_a_decoder_of_one_pass(scenes: Images) -> None:
    titok = load_tokenizer("titok-nano", device="cpu")
    inputs = load_inputs("scenes", titok.info, 2, 0)
    found = attention.compute(titok, inputs)
    assert found.time is None and found.layer == 2
    sweep = attention.compute_sweep(titok, inputs)
    assert sweep.times == () and sweep.miou.shape == (3, 1)
    assert attention.draw_sweep(sweep) is not None


def test_files_are_equal_for_equal_figures(tmp_path: Path, nano: Any, data: attention.Attention) -> None:
    figure = attention.draw(data)
    written = style.save(figure, tmp_path / "a")
    again = style.save(attention.draw(data), tmp_path / "b")
    assert [p.read_bytes() for p in written] == [p.read_bytes() for p in again]
    with Image.open(written[1]) as image:
        assert image.width == int(figure.get_size_inches()[0] * style.DPI)
        assert np.asarray(image.convert("L")).std() > 20


def test_masks_beside_a_folder(tmp_path: Path, nano: Any) -> None:
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "0001.jpg")
    inputs = load_inputs(str(tmp_path / "images"), nano.info, 1, 0)
    with pytest.raises(MissingError, match=r"0001\.jpg: has no mask"):
        attention.compute(nano, inputs)
    mask = np.zeros((40, 60), dtype=np.uint8)
    (tmp_path / "ground_truth_mask").mkdir()
    target = tmp_path / "ground_truth_mask" / "0001.png"
    Image.fromarray(mask).save(target)
    with pytest.raises(UsageError, match="no object is left"):
        attention.compute(nano, inputs)
    mask[10:30, 20:40] = 255
    Image.fromarray(mask).save(target)
    found = attention.compute(nano, inputs)
    assert found.masks.shape == (1, 32, 32) and found.masks.mean() == pytest.approx(0.25, abs=0.03)


def test_what_cannot_be_shown_is_refused(nano: Any, scenes: Images) -> None:
    pixels = load_tokenizer("pixel-oracle", device="cpu")
    for compute in (attention.compute, attention.compute_sweep):
        with pytest.raises(UnsupportedOperation, match="pixel-oracle cannot be shown"):
            compute(pixels, load_inputs("scenes", pixels.info, 1, 0))
    with pytest.raises(UnsupportedOperation, match="no layer 9"):
        attention.compute(nano, scenes, layer=9)
    with pytest.raises(UsageError, match="times"):
        attention.compute(nano, scenes, time=1.5)


def test_the_command(tmp_path: Path) -> None:
    arguments = ["figure", "attention", "--count", "2", "--sweep-count", "2", "--layer", "-1"]
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    names = ["attention-comit-nano", "attention-sweep-comit-nano"]
    assert {p.name for p in tmp_path.iterdir()} == {f"{n}.{kind}" for n in names for kind in ("pdf", "png")}
