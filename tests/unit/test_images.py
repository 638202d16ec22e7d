"""Preprocessing equals torchvision's, odd images are read as documented, broken ones are named."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps, JpegImagePlugin
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from comit_bench.data.images import (
    FILTERS,
    header_size,
    image_size,
    iterate_images,
    load_image,
    output_side,
    parse_preprocessing,
    preprocess,
    read_mask,
    upright,
)
from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError

RECIPE = "center_crop|resize(16,bilinear)"


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def chw(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


sides = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(
    sides, sides, st.integers(1, 24), st.sampled_from(["bilinear", "bicubic", "lanczos", "nearest", "box"])
)
def test_equals_torchvision(width: int, height: int, side: int, name: str) -> None:
    image = noise(width, height, seed=width * 41 + height)
    mode = InterpolationMode(name)
    short = F.center_crop(F.resize(image, [side], mode), [side, side])
    assert np.array_equal(preprocess(image, f"resize_short({side},{name})|center_crop({side})"), chw(short))
    square = F.resize(F.center_crop(image, [min(width, height)] * 2), [side, side], mode)
    assert np.array_equal(preprocess(image, f"center_crop|resize({side},{name})"), chw(square))
    cropped = F.center_crop(image, [side, side])
    assert np.array_equal(preprocess(image, f"center_crop({side})"), chw(cropped))


def test_result_is_contiguous_uint8_of_the_declared_side() -> None:
    for recipe in (RECIPE, "resize_short(16,lanczos)|center_crop", " resize( 16 , box ) "):
        out = preprocess(noise(50, 31), recipe)
        assert out.dtype == np.uint8
        assert out.shape == (3, 16, 16)
        assert out.flags.c_contiguous
        assert output_side(recipe) == 16


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("centre_crop|resize(8,box)", "'center_crop'"),
        ("resize(8,bilinaer)", "'bilinear'"),
        ("resize(8)", "resize(N,FILTER)"),
        ("resize(8,box,1)", "resize(N,FILTER)"),
        ("resize", "resize(N,FILTER)"),
        ("center_crop(0)", "from 1 to"),
        ("center_crop()", "from 1 to"),
        ("center_crop(-3)", "from 1 to"),
        ("resize(99999,box)", "from 1 to"),
        ("resize(8.5,box)", "from 1 to"),
        ("center_crop", "no fixed square"),
        ("resize_short(8,box)", "no fixed square"),
        ("", "is not known"),
        ("resize(8,box)|", "is not known"),
        ("resize(8,box))", "is not known"),
    ],
)
def test_bad_recipes_are_explained(recipe: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_preprocessing(recipe)
    assert words in str(caught.value)
    assert repr(recipe) in str(caught.value)


def test_a_square_stays_square_when_its_short_side_is_resized() -> None:
    assert output_side("center_crop(8)|resize_short(9,box)") == 9


def test_every_filter_of_the_list_is_known_to_pillow() -> None:
    results = {name: preprocess(noise(37, 37), f"resize(9,{name})").tobytes() for name in FILTERS}
    assert len(set(results.values())) == len(FILTERS)


def test_transparency_is_composited_on_white() -> None:
    rgba = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    rgba.putpixel((0, 0), (10, 20, 30, 255))
    out = preprocess(rgba, "center_crop(4)")
    assert out[:, 0, 0].tolist() == [10, 20, 30]
    assert out[:, 3, 3].tolist() == [255, 255, 255]
    grey = Image.new("LA", (4, 4), (0, 128))
    assert preprocess(grey, "center_crop(4)")[:, 0, 0].tolist() == [127, 127, 127]


def test_palette_with_transparent_entry(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 50, 60, 70])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "p.png", transparency=0)
    out = load_image(tmp_path / "p.png", "center_crop(4)")
    assert out[:, 0, 0].tolist() == [255, 255, 255]
    assert out[:, 1, 1].tolist() == [50, 60, 70]


def test_sixteen_bit_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]] * 4, dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    out = load_image(tmp_path / "deep.png", "center_crop(4)")
    assert out[:, 0].tolist() == [[0, 1, 128, 255]] * 3
    wide = Image.fromarray(values.astype(np.int32))
    assert wide.mode == "I"
    assert np.array_equal(preprocess(wide, "center_crop(4)"), out)


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "P", "YCbCr"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = noise(20, 20, mode)
    assert np.array_equal(preprocess(image, "center_crop(20)"), chw(image.convert("RGB")))


def test_float_image_is_refused() -> None:
    with pytest.raises(UsageError, match="floating-point"):
        preprocess(Image.new("F", (8, 8)), RECIPE)


def test_cmyk_and_grey_jpeg_files(tmp_path: Path) -> None:
    for mode in ("CMYK", "L"):
        path = tmp_path / f"{mode}.JPEG"
        Image.new(mode, (30, 20), (0, 255, 255, 0) if mode == "CMYK" else 77).save(path)
        out = load_image(path, RECIPE).astype(int)
        expected = (255, 0, 0) if mode == "CMYK" else (77, 77, 77)
        assert np.abs(out - np.reshape(expected, (3, 1, 1))).max() <= 4


def test_png_called_jpeg_and_single_pixel(tmp_path: Path) -> None:
    path = tmp_path / "n02105855_2933.JPEG"
    noise(33, 20).save(path, format="PNG")
    assert np.array_equal(load_image(path, RECIPE), preprocess(noise(33, 20), RECIPE))
    Image.new("RGB", (1, 1), (3, 4, 5)).save(tmp_path / "dot.png")
    for recipe in (RECIPE, "resize_short(16,bicubic)|center_crop(16)", "resize(16,lanczos)"):
        out = load_image(tmp_path / "dot.png", recipe)
        assert out.shape == (3, 16, 16)
        assert np.array_equal(np.unique(out.reshape(3, -1), axis=1), [[3], [4], [5]])


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    image = noise(24, 24)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "turned.png", "center_crop(24)"), chw(image))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_step_exif_turns_upright(orientation: int, kind: str, tmp_path: Path) -> None:
    image = noise(24, 16).resize((96, 64), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "photo", kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(tmp_path / "photo") as stored:
        upright_image = ImageOps.exif_transpose(stored).convert("RGB")
    found = load_image(tmp_path / "photo", "exif|resize_short(16,bilinear)|center_crop(16)")
    assert np.array_equal(found, preprocess(upright_image, "resize_short(16,bilinear)|center_crop(16)"))


@pytest.mark.parametrize(
    "raw", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_a_damaged_exif_block_turns_nothing(raw: bytes, tmp_path: Path) -> None:
    noise(24, 24).save(tmp_path / "a.jpg", exif=raw)
    assert np.array_equal(
        load_image(tmp_path / "a.jpg", f"exif|{RECIPE}"), load_image(tmp_path / "a.jpg", RECIPE)
    )


def test_exif_is_declared_first_and_once() -> None:
    assert upright(RECIPE) == upright(upright(RECIPE)) == f"exif|{RECIPE}"
    assert output_side(f"exif|{RECIPE}") == 16
    for recipe, words in (
        (f"{RECIPE}|exif", "only be the first"),
        (f"exif|exif|{RECIPE}", "only be the first"),
        (f"exif(1)|{RECIPE}", "without arguments"),
        ("exif", "no fixed square"),
    ):
        with pytest.raises(UsageError, match=words):
            parse_preprocessing(recipe)


class Unheard(Exception):
    """What a plugin might raise."""


@pytest.mark.parametrize(
    "error",
    [
        SyntaxError("not a PNG"), struct.error("unpack"), OverflowError("too large"), RecursionError("deep"),
        MemoryError(), Image.DecompressionBombError("bomb"), KeyError(7), IndexError(), TypeError("None"),
        ZeroDivisionError(), AttributeError("x"), NotImplementedError(), EOFError(), AssertionError(),
        UnicodeDecodeError("utf8", b"x", 0, 1, "bad"), OSError("broken data stream"), OSError(22, "seek"),
        RuntimeError("plugin"), zlib.error("invalid"), Image.DecompressionBombWarning("bomb"), Unheard("?"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
@pytest.mark.parametrize("where", ["open", "load", "convert"])
def test_whatever_a_decoder_raises_is_about_the_file(
    error: Exception, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path in paths:
        noise(20, 20, "CMYK" if where == "convert" else "RGB").save(path, "JPEG")

    def fail(*arguments: object, **options: object) -> None:
        raise error

    target = {"open": JpegImagePlugin.JpegImageFile, "load": ImageFile.ImageFile, "convert": Image.Image}[
        where
    ]
    monkeypatch.setattr(target, {"open": "_open"}.get(where, where), fail)
    with pytest.raises(CorruptFileError) as caught:
        load_image(paths[0], RECIPE)
    text = str(caught.value)
    assert text.startswith(f"{paths[0]}: ") and "()" not in text
    assert where == "open" or str(error) in text  # Pillow itself sums up what happens while it opens
    (batch,) = iterate_images(paths, RECIPE, batch_size=2, num_workers=0)
    assert batch.broken.keys() == {0, 1}


def test_a_disk_that_fails_is_not_blamed_on_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(20, 20).save(tmp_path / "a.png")

    def fail(self: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", lambda *a, **k: fail(None))
    with pytest.raises(BenchError, match="Input/output error") as caught:
        load_image(tmp_path / "a.png", RECIPE)
    assert not isinstance(caught.value, CorruptFileError)


def test_decompression_bombs_are_broken_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(40, 40).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(CorruptFileError, match="refused"):
        load_image(tmp_path / "a.png", RECIPE)
    assert image_size([tmp_path / "a.png"], 0) is None


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "loop"])
def test_what_is_no_file_is_never_opened(kind: str, tmp_path: Path) -> None:
    path, held = tmp_path / "x.jpg", None
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        held = socket.socket(socket.AF_UNIX)
        held.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    for read in (lambda: load_image(path, RECIPE), lambda: header_size(path), lambda: read_mask(path)):
        with pytest.raises(BenchError, match="cannot read") as caught:
            read()
        assert str(path) in str(caught.value) and not isinstance(caught.value, CorruptFileError)
    if held is not None:
        held.close()


def broken_files(folder: Path) -> list[Path]:
    stream = io.BytesIO()
    noise(64, 64).save(stream, format="JPEG")
    png = io.BytesIO()
    noise(64, 64).save(png, format="PNG")
    contents = {
        "truncated.jpg": stream.getvalue()[: len(stream.getvalue()) // 2],
        "truncated.png": png.getvalue()[: len(png.getvalue()) // 2],
        "empty.jpg": b"",
        "text.jpg": b"this is no image\n" * 20,
        "header.png": png.getvalue()[:20],
        "flipped.png": png.getvalue()[:60] + b"\xff\x00\xff" + png.getvalue()[63:],
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def test_broken_files_are_named(tmp_path: Path) -> None:
    for path in broken_files(tmp_path):
        with pytest.raises(CorruptFileError) as caught:
            load_image(path, RECIPE)
        assert str(path) in str(caught.value)
    with pytest.raises(CorruptFileError, match="empty"):
        load_image(tmp_path / "empty.jpg", RECIPE)


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"GIF89a"])
)
def test_arbitrary_bytes_never_crash(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes, head: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jpg"
    path.write_bytes(head + tail)
    try:
        assert load_image(path, RECIPE).shape == (3, 16, 16)
    except CorruptFileError as error:
        assert str(path) in str(error)


def test_elongated_image_is_refused_instead_of_filling_memory(tmp_path: Path) -> None:
    Image.new("RGB", (1, 60000)).save(tmp_path / "strip.png")
    with pytest.raises(CorruptFileError, match="too elongated"):
        load_image(tmp_path / "strip.png", "resize_short(256,bilinear)|center_crop(256)")


def test_missing_file_and_folder_are_not_called_corrupt(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"gone\.png"):
        load_image(tmp_path / "gone.png", RECIPE)
    with pytest.raises(BenchError) as caught:
        load_image(tmp_path, RECIPE)
    assert not isinstance(caught.value, CorruptFileError)


def test_a_bad_recipe_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "a.png")
    with pytest.raises(UsageError):
        load_image(tmp_path / "a.png", "resize(8)")


@pytest.fixture
def folder(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i:02d}.png" for i in range(11)]
    for i, path in enumerate(paths):
        noise(20 + i, 25, seed=i).save(path)
    (tmp_path / "04.png").write_bytes(b"")
    return paths


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 4), (0, 64), (0, 1), (2, 3)])
def test_iteration_keeps_order_and_marks_broken(folder: list[Path], workers: int, batch_size: int) -> None:
    batches = list(iterate_images(folder, RECIPE, batch_size=batch_size, num_workers=workers))
    assert [i for batch in batches for i in batch.indices] == list(range(11))
    assert {len(batch.indices) for batch in batches[:-1]} <= {batch_size}
    broken = {index: text for batch in batches for index, text in batch.broken.items()}
    assert list(broken) == [4]
    assert str(folder[4]) in broken[4]
    for batch in batches:
        assert batch.images.shape == (len(batch.indices), 3, 16, 16)
        for index, image in zip(batch.indices, batch.images.numpy(), strict=True):
            expected = np.zeros_like(image) if index == 4 else load_image(folder[index], RECIPE)
            assert np.array_equal(image, expected)


def test_iteration_over_chosen_indices(folder: list[Path]) -> None:
    chosen = [7, 4, 0]
    (batch,) = iterate_images(folder, RECIPE, batch_size=8, num_workers=0, indices=np.array(chosen))
    assert batch.indices == chosen
    assert list(batch.broken) == [4]
    assert not list(iterate_images(folder, RECIPE, batch_size=8, num_workers=2, indices=[]))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_vanished_file_ends_the_iteration(folder: list[Path], workers: int) -> None:
    folder[5].unlink()
    with pytest.raises(MissingError) as caught:
        list(iterate_images(folder, RECIPE, batch_size=4, num_workers=workers))
    assert str(caught.value).startswith(str(folder[5]))


def test_bad_arguments_fail_at_the_call(folder: list[Path]) -> None:
    for changes in ({"batch_size": 0}, {"num_workers": -1}, {"indices": [11]}, {"indices": [-1]}):
        arguments = {"batch_size": 1, "num_workers": 0} | changes
        with pytest.raises(UsageError):
            iterate_images(folder, RECIPE, **arguments)
    with pytest.raises(UsageError):
        iterate_images(folder, "resize(8)", batch_size=1, num_workers=0)
