"""Pipes, sockets, devices, loops and folders that are called like images are named and never opened."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from comit_bench.data.folders import list_folder, list_images
from comit_bench.data.images import load_image
from comit_bench.data.tokens.token_file import read_token_file
from comit_bench.errors import MissingError
from comit_bench.figures.inputs import load_inputs
from comit_bench.pipeline.folders import tokenize_folder
from comit_bench.tokenizers.load import load_tokenizer
from comit_bench.train import data as train_data

ODD = {
    "pipe.jpg": "a named pipe",
    "socket.png": "a socket",
    "device.bmp": "a device",
    "folder.webp": "a folder",
    "loop.JPG": "a link that leads to itself",
    "gone.png": "a link that leads nowhere",
}


def photo(path: Path, seed: int = 0, *, orientation: int = 1) -> None:
    values = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).resize((96, 64)).save(path, exif=exif, quality=95)


def add_odd(folder: Path) -> socket.socket:
    """Everything that is no file; the socket must stay open."""
    os.mkfifo(folder / "pipe.jpg")
    held = socket.socket(socket.AF_UNIX)
    with contextlib.chdir(folder):  # the path of a socket may have 107 bytes
        held.bind("socket.png")
    (folder / "device.bmp").symlink_to("/dev/zero")
    (folder / "folder.webp").mkdir()
    (folder / "loop.JPG").symlink_to("loop.JPG")
    (folder / "gone.png").symlink_to("nowhere.png")
    return held


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "p"
    for i in range(3):
        photo(folder / f"{i}.jpg", i)
    held = add_odd(folder)
    yield folder
    held.close()


def test_a_folder_names_what_is_no_file(odd: Path, caplog: pytest.LogCaptureFixture) -> None:
    names, found = list_folder(odd)
    assert names == ("0.jpg", "1.jpg", "2.jpg")
    assert found == ODD
    with caplog.at_level(logging.WARNING):
        assert list_images(odd) == names
    assert "6 entries are called like images but are no files" in caplog.text
    for i in range(3):
        (odd / f"{i}.jpg").unlink()
    with pytest.raises(MissingError, match=r"device\.bmp is a device"):
        list_images(odd)


def test_images_below_a_folder_called_like_an_image_are_found(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg" / "b.jpg")
    assert list_folder(tmp_path) == (("a.jpg/b.jpg",), {"a.jpg": "a folder"})


def test_tokenize_lists_them_as_broken(odd: Path, tmp_path: Path) -> None:
    done = tokenize_folder(
        load_tokenizer("pixel-oracle", device="cpu"), odd, tmp_path / "t.safetensors", cache=tmp_path / "c"
    )
    assert done.messages == 3
    found = read_token_file(done.output)
    assert found.broken == {name: f"this is {what}, not a file" for name, what in ODD.items()}


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_photographs_of_phones_come_out_upright(orientation: int, tmp_path: Path) -> None:
    photo(tmp_path / "p" / "a.jpg", orientation=orientation)
    pixels = load_tokenizer("pixel-oracle", device="cpu")
    done = tokenize_folder(pixels, tmp_path / "p", tmp_path / "t.safetensors", cache=tmp_path / "c")
    found = read_token_file(done.output)
    assert found.origin.preprocessing == f"exif|{pixels.info.preprocessing}"
    inputs = load_inputs(str(tmp_path / "p"), pixels.info, 1, 0)
    want = load_image(tmp_path / "p" / "a.jpg", f"exif|{pixels.info.preprocessing}")
    assert np.array_equal(inputs.images[0].numpy(), want)
    assert found.codes is not None
    assert np.array_equal(found.codes, pixels.encode(inputs.images).codes.numpy())
    sideways = load_image(tmp_path / "p" / "a.jpg", pixels.info.preprocessing)
    assert np.array_equal(want, sideways) == (orientation == 1)


def test_images_of_a_data_set_are_read_as_its_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ImageNet stays as it is stored, whoever shows it."""
    path = tmp_path / "imagenet" / "val" / "ILSVRC2012_val_00000001.JPEG"
    photo(path, orientation=6)
    monkeypatch.setenv("COMIT_BENCH_DATA", str(tmp_path))
    info = load_tokenizer("pixel-oracle", device="cpu").info
    shown = load_inputs("imagenet1k-val", info, 1, 0, cache=tmp_path / "cache")
    assert not shown.exif
    assert np.array_equal(shown.images[0].numpy(), load_image(path, info.preprocessing))
    own = load_inputs(str(path.parent), info, 1, 0)
    assert own.exif and not np.array_equal(own.images, shown.images)


def test_training_images_are_listed_without_them(odd: Path, caplog: pytest.LogCaptureFixture) -> None:
    (odd / "below").mkdir()
    (odd / "below" / "up").symlink_to(odd)  # a circle
    (odd / "below" / "beside").symlink_to(odd / "folder.webp")
    photo(odd / "folder.webp" / "4.jpg", 4)
    with caplog.at_level(logging.WARNING):
        found = train_data.list_images(odd)
    assert found == ("0.jpg", "1.jpg", "2.jpg", "below/beside/4.jpg", "folder.webp/4.jpg")
    for name, what in ODD.items():
        assert f"{odd / name}: this is {what}" in caplog.text
