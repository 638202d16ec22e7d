"""Every form of mask is read as the same object; what is no mask is named before anything is computed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from comit_bench.data.images import load_image, mask_of, read_mask
from comit_bench.data.masks import read_levels
from comit_bench.data.split import PathList, Split
from comit_bench.errors import BenchError, CorruptFileError
from comit_bench.tasks.base import Role
from comit_bench.tasks.objectness import examine_masks, read_masks

Bools = np.ndarray[Any, np.dtype[np.bool_]]
RECIPE = "center_crop|resize(16,bilinear)"


def blob(seed: int = 0, size: tuple[int, int] = (40, 52)) -> Bools:
    """A rectangle somewhere, never the whole of the image."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(size, dtype=bool)
    y, x = rng.integers(2, size[0] // 2), rng.integers(2, size[1] // 2)
    mask[y : y + size[0] // 3, x : x + size[1] // 3] = True
    return mask


def grey(mask: Bools, high: int = 255, kind: Any = np.uint8) -> Image.Image:
    return Image.fromarray(mask.astype(kind) * kind(high))


def palette(colours: list[int]) -> Callable[[Bools], Image.Image]:
    def make(mask: Bools) -> Image.Image:
        image = Image.fromarray(mask.astype(np.uint8), "L")
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette(colours)
        return image

    return make


def with_alpha(colour: tuple[int, int, int]) -> Callable[[Bools], Image.Image]:
    def make(mask: Bools) -> Image.Image:
        image = Image.new("RGB", mask.shape[::-1], colour)
        image.putalpha(grey(mask))
        return image

    return make


def cut_out(mask: Bools) -> Image.Image:
    noise = np.random.default_rng(1).integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image.putalpha(grey(mask))
    return image


def transparent_index(mask: Bools) -> Image.Image:
    image = palette([7, 7, 7, 9, 9, 9])(mask)
    image.info["transparency"] = 0
    return image


def coloured(mask: Bools) -> Image.Image:
    pixels = np.zeros((*mask.shape, 3), dtype=np.uint8)
    pixels[mask] = (255, 0, 0)
    return Image.fromarray(pixels)


FORMS: dict[str, tuple[Callable[[Bools], Image.Image], str]] = {
    "0/255": (grey, "png"),
    "0/1": (lambda m: grey(m, 1), "png"),
    "0/38": (lambda m: grey(m, 38), "png"),
    "1 bit": (lambda m: Image.fromarray(m), "png"),
    "1 bit tif": (lambda m: Image.fromarray(m), "tif"),
    "16 bit": (lambda m: grey(m, 65535, np.uint16), "png"),
    "16 bit 0/1": (lambda m: grey(m, 1, np.uint16), "png"),
    "16 bit 0/255": (lambda m: grey(m, 255, np.uint16), "png"),
    "16 bit tif": (lambda m: grey(m, 65535, np.uint16), "tif"),
    "float 0/1": (lambda m: grey(m, 1, np.float32), "tif"),
    "three channels": (lambda m: Image.merge("RGB", [grey(m)] * 3), "png"),
    "three channels 0/1": (lambda m: Image.merge("RGB", [grey(m, 1)] * 3), "png"),
    "bmp": (grey, "bmp"),
    "webp": (lambda m: Image.merge("RGB", [grey(m)] * 3), "webp"),
    "palette black white": (palette([0, 0, 0, 255, 255, 255]), "png"),
    "palette red": (palette([0, 0, 0, 128, 0, 0]), "png"),
    "palette of grey numbers": (palette([0, 0, 0, 1, 1, 1]), "png"),
    "palette without colours": (palette([0, 0, 0, 0, 0, 0]), "png"),
    "palette turned round": (lambda m: palette([255, 255, 255, 0, 0, 0])(~m), "png"),
    "palette with a transparent entry": (transparent_index, "png"),
    "alpha white": (with_alpha((255, 255, 255)), "png"),
    "alpha black": (with_alpha((0, 0, 0)), "png"),
    "alpha of a photograph": (cut_out, "png"),
    "alpha says nothing": (lambda m: Image.merge("RGBA", [*[grey(m)] * 3, grey(m | True)]), "png"),
    "alpha agrees": (lambda m: Image.merge("RGBA", [grey(m)] * 4), "png"),
    "LA": (lambda m: Image.merge("LA", [grey(m & False), grey(m)]), "png"),
    "LA says nothing": (lambda m: Image.merge("LA", [grey(m), grey(m | True)]), "png"),
    "red on black": (coloured, "png"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_object(form: str, tmp_path: Path) -> None:
    make, suffix = FORMS[form]
    mask = blob()
    path = tmp_path / f"m.{suffix}"
    make(mask).save(path, **({"lossless": True} if suffix == "webp" else {}))
    found = read_mask(path)
    assert np.array_equal(found.pixels, mask)
    assert found.problem is None


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_noise_makes_no_object(mode: str, tmp_path: Path) -> None:
    mask = blob(3, (120, 160))
    grey(mask).convert(mode).save(tmp_path / "m.jpg", quality=40)
    found = read_mask(tmp_path / "m.jpg").pixels
    assert (found != mask).mean() < 0.01
    noise = np.random.default_rng(0).integers(0, 2, mask.shape, dtype=np.uint8)  # 0 and 1, as around edges
    Image.fromarray(noise).convert(mode).save(tmp_path / "empty.jpg", quality=95)
    assert read_mask(tmp_path / "empty.jpg").share == 0


def test_soft_edges_are_cut_in_the_middle(tmp_path: Path) -> None:
    mask = blob(5, (120, 160))
    soft = grey(mask).filter(ImageFilter.GaussianBlur(2))
    soft.save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png").pixels, np.asarray(soft) >= 128)
    deep = np.asarray(soft).astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(read_mask(tmp_path / "deep.png").pixels, deep >= 32768)


def two_masks(mask: Bools) -> Image.Image:
    other = np.roll(mask, 12, axis=1)
    return Image.merge("RGBA", [*[grey(mask)] * 3, grey(other)])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: Image.fromarray(np.random.default_rng(0).integers(0, 256, m.shape, dtype=np.uint8)),
         "photograph"),
        (lambda m: cut_out(m).convert("RGB").filter(ImageFilter.GaussianBlur(1)), "photograph"),
        (two_masks, "two different masks"),
        (lambda m: Image.fromarray(np.where(m, np.nan, 0).astype(np.float32)), "not finite"),
    ],
)  # fmt: skip
def test_what_is_no_mask_is_refused(make: Callable[[Bools], Image.Image], says: str, tmp_path: Path) -> None:
    image = make(blob())
    path = tmp_path / ("m.tif" if image.mode == "F" else "m.png")
    image.save(path)
    with pytest.raises(CorruptFileError, match=says) as caught:
        read_mask(path)
    assert str(path) in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([1, 2, 127, 128, 255, 256, 4095, 65535]),
    st.sampled_from(["L", "I;16", "RGB"]),
)
def test_two_values_are_one_mask(seed: int, high: int, mode: str) -> None:
    mask = blob(seed)
    deep = mode == "I;16"
    image = grey(mask, high, np.uint16) if deep else grey(mask, min(high, 255)).convert(mode)
    assert np.array_equal(read_levels(image, lossy=False, name="m").pixels, mask)


# ----------------------------------------------------------------------------------- turned photographs


BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned(path: Path, image: Image.Image, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, **({"quality": 95} if path.suffix == ".jpg" else {}))


# An upright mask is told by its size; where that says nothing, a mask turns with its photograph.
WAYS = [
    (way, orientation)
    for way in ("stored like its photograph", "turned by its own EXIF", "upright")
    for orientation in range(1 if way != "upright" else 5, 9)
]


@pytest.mark.parametrize(("mask_turns", "orientation"), WAYS)
def test_photograph_and_mask_turn_together(mask_turns: str, orientation: int, tmp_path: Path) -> None:
    """Upright, the object is the bright square of the photograph, however the files are stored."""
    upright = np.zeros((32, 48), dtype=bool)
    upright[2:14, 10:22] = True
    stored = grey(upright)
    if orientation > 1:  # what undoes the turning
        stored = stored.transpose(BACK[orientation])
    turned(tmp_path / "p.jpg", stored.convert("RGB"), orientation)
    if mask_turns == "upright":
        grey(upright).save(tmp_path / "m.png")
    elif mask_turns == "stored like its photograph":
        stored.save(tmp_path / "m.png")
    else:
        turned(tmp_path / "m.png", stored, orientation)
    for recipe in ("exif|resize(24,nearest)", "exif|center_crop|resize(16,nearest)"):
        seen = load_image(tmp_path / "p.jpg", recipe).mean(axis=0) >= 128
        found, _ = mask_of(tmp_path / "p.jpg", tmp_path / "m.png", recipe)
        assert (found != seen).mean() < 0.02
        assert found.any()
    plain = load_image(tmp_path / "p.jpg", RECIPE).mean(axis=0) >= 128
    if mask_turns != "upright":  # without the step both stay as they are stored
        assert (mask_of(tmp_path / "p.jpg", tmp_path / "m.png", RECIPE)[0] != plain).mean() < 0.06


def test_shapes_must_fit(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "p.png")
    grey(blob(0, (40, 30))).save(tmp_path / "m.png")
    with pytest.raises(CorruptFileError, match="30 x 40 pixels does not fit its image of 40 x 30"):
        mask_of(tmp_path / "p.png", tmp_path / "m.png", RECIPE)
    grey(blob(0, (60, 80))).save(tmp_path / "m.png")
    assert mask_of(tmp_path / "p.png", tmp_path / "m.png", RECIPE)[0].any()
    grey(blob(0, (30, 40))).save(tmp_path / "m.png")
    whole = (tmp_path / "m.png").read_bytes()
    (tmp_path / "m.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFileError, match=r"m\.png: damaged"):
        mask_of(tmp_path / "p.png", tmp_path / "m.png", RECIPE)


# ----------------------------------------------------------------------------------- before anything else


def role_of(folder: Path, masks: list[Image.Image | bytes]) -> Role:
    names = [f"{i:04d}.png" for i in range(len(masks))]
    for place in ("images", "masks"):
        (folder / place).mkdir(parents=True)
    for name, mask in zip(names, masks, strict=True):
        if isinstance(mask, bytes):
            (folder / "masks" / name).write_bytes(mask)
        else:
            mask.save(folder / "masks" / name)
        Image.new("RGB", (52, 40)).save(folder / "images" / name)
    paths = [PathList(folder / place, tuple(names)) for place in ("images", "masks")]
    rows = np.arange(len(names))
    return Role(Split("val", tuple(names), *paths), rows, rows)


def test_useless_masks_are_counted_warned_about_and_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full, empty = Image.new("L", (52, 40), 255), Image.new("L", (52, 40), 0)
    role = role_of(tmp_path, [*(grey(blob(i)) for i in range(5)), full, empty, b"nothing"])
    found = read_masks(role, RECIPE, np.arange(8))
    assert sorted(found.problems) == [5, 6, 7]
    assert not found.pixels[5:].any() and found.pixels[:5].any(axis=(1, 2)).all()
    assert found.forms[-1] == "cannot be read" and np.isnan(found.whole[-1])
    with caplog.at_level(logging.WARNING):
        examine_masks(role, RECIPE, 0.5, "photos")
    assert "photos: 3 of 8 masks are of no use" in caplog.text
    for words in (
        "0005.png: the whole image is object",
        "0006.png: there is no object",
        "0007.png: not an image",
    ):
        assert words in caplog.text
    with pytest.raises(BenchError, match=r"more than the 25.0% the dataset recipe allows"):
        examine_masks(role, RECIPE, 0.25, "photos")


def test_good_masks_are_not_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        examine_masks(role_of(tmp_path, [grey(blob(i), 1) for i in range(3)]), RECIPE, 0.0, "photos")
    assert not caplog.records
