"""Tokens of any folder: one documented file, back to images, and everything that may be wrong with either."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load, save
from typer.testing import CliRunner

from comit_bench.commands.app import app
from comit_bench.data.folders import list_images
from comit_bench.data.images import load_image
from comit_bench.data.tokens.token_file import (
    TokenFile,
    TokenOrigin,
    check_name,
    output_names,
    read_token_file,
    token_file_bytes,
)
from comit_bench.errors import CorruptFileError, MissingError, UnsupportedOperation, UsageError
from comit_bench.pipeline.folders import detokenize_file, tokenize_folder
from comit_bench.seeding import generator_for, seed_for
from comit_bench.tokenizers.base import Tokens
from comit_bench.tokenizers.load import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def png(number: int, side: int = 40) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + 4, 3), dtype=np.uint8)
    pixels[8:30, 8:30] = (number * 37 % 256, number * 11 % 256, 200)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


NAMES = ("a.jpg", "a.png", "b/Übung ☀.png", "b/c d/e.webp", "z.PNG")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images (their content is PNG, whatever they are called), and what is no image."""
    root = tmp_path / "photos"
    for number, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_bytes(png(9))
    (root / ".thumbs").mkdir()
    (root / ".thumbs" / "x.png").write_bytes(png(9))
    return root


@pytest.fixture(scope="module")
def nano() -> Any:
    return load_tokenizer("comit-nano", device="cpu")


@pytest.fixture(scope="module")
def pixels() -> Any:
    return load_tokenizer("pixel-oracle", device="cpu")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments])


# ------------------------------------------------------------------ folders


def test_images_are_found_sorted_and_hidden_ones_are_not(folder: Path) -> None:
    assert list_images(folder) == tuple(sorted(NAMES))


@pytest.mark.parametrize(("name", "error"), [("nowhere", MissingError), ("notes.txt", UsageError)])
def test_what_is_no_folder_is_refused(folder: Path, name: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        list_images(folder / name)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no image below it"):
        list_images(tmp_path)


# --------------------------------------------------------------- round trips


def test_tokens_are_those_of_the_tokenizer(folder: Path, tmp_path: Path, nano: Any) -> None:
    done = tokenize_folder(
        nano, folder, tmp_path / "t.safetensors", cache=tmp_path / "cache", policy="random:3"
    )
    found = read_token_file(done.output)
    assert found.names == tuple(sorted(NAMES))
    assert found.broken == {}
    assert found.ids is not None and found.ids.dtype == np.uint16  # 1,000 ids
    for row, name in enumerate(found.names):
        image = torch.from_numpy(load_image(folder / name, nano.info.preprocessing))[None]
        alone = nano.encode(image, policy="random:3", generators=[generator_for(0, name)])
        assert alone.ids.tolist()[0] == found.ids[row].tolist()
        assert found.offsets is not None
        np.testing.assert_array_equal(alone.offsets[0].numpy(), found.offsets[row])
    assert found.origin.policy == "random:3"
    assert found.origin.weights == nano.info.weights


def test_the_file_does_not_depend_on_batches_shards_or_workers(
    folder: Path, tmp_path: Path, nano: Any
) -> None:
    contents = []
    for number, settings in enumerate([{}, {"batch_size": 2, "shard_size": 3}, {"num_workers": 1}]):
        out = tmp_path / f"{number}.safetensors"
        tokenize_folder(
            nano, folder, out, cache=tmp_path / f"cache{number}", policy="global+adaptive:3", **settings
        )
        contents.append(out.read_bytes())
    assert contents[0] == contents[1] == contents[2]
    seeded = tmp_path / "seeded"
    tokenize_folder(nano, folder, seeded, cache=tmp_path / "cache0", policy="global+adaptive:3", seed=1)
    assert seeded.read_bytes() != contents[0]


def test_a_continuous_tokenizer_comes_back_exactly(folder: Path, tmp_path: Path, pixels: Any) -> None:
    out = tmp_path / "t.safetensors"
    tokenize_folder(pixels, folder, out, cache=tmp_path / "cache")
    found = read_token_file(out)
    assert found.ids is None and found.offsets is None
    assert found.codes is not None and found.codes.dtype == np.float32
    detokenize_file(pixels, out, tmp_path / "back", batch_size=2)
    for name, target in zip(found.names, output_names(found.names), strict=True):
        given = load_image(folder / name, pixels.info.preprocessing)
        with Image.open(tmp_path / "back" / target) as image:
            np.testing.assert_array_equal(np.asarray(image).transpose(2, 0, 1), given)


def test_images_do_not_depend_on_batches_and_have_noise_of_their_own(
    folder: Path, tmp_path: Path, nano: Any
) -> None:
    out = tmp_path / "t.safetensors"
    tokenize_folder(nano, folder, out, cache=tmp_path / "cache")
    detokenize_file(nano, out, tmp_path / "one", batch_size=1)
    detokenize_file(nano, out, tmp_path / "all", batch_size=64)
    found = read_token_file(out)
    names = output_names(found.names)
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
    assert found.ids is not None and found.offsets is not None
    ids = torch.from_numpy(found.ids[2:3].astype(np.int64))
    tokens = Tokens(ids, nano.codes_from_ids(ids), torch.from_numpy(found.offsets[2:3]))
    expected = nano.decode(tokens, seeds=[seed_for(0, found.names[2])])[0]
    with Image.open(tmp_path / "all" / names[2]) as image:
        np.testing.assert_array_equal(np.asarray(image).transpose(2, 0, 1), expected.numpy())


def test_the_command_line_goes_there_and_back(folder: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "t.safetensors", tmp_path / "back"
    (folder / "b" / "broken.png").write_bytes(b"\x89PNG nothing")
    there = run("tokenize", folder, "--out", out, "--quiet")
    assert (there.exit_code, there.stdout) == (0, f"{out}\n")
    assert "b/broken.png: not an image" in there.stderr
    assert "unreadable images: 1" in there.stderr
    assert set(read_token_file(out).broken) == {"b/broken.png"}
    again = run("detokenize", out, "--out", back, "--quiet")
    assert (again.exit_code, again.stdout) == (0, f"{back}\n")
    written = {path.relative_to(back).as_posix() for path in back.rglob("*") if path.is_file()}
    assert written == {"a.png", "a.jpg.png", "b/Übung ☀.png", "b/c d/e.png", "z.png"}


# ------------------------------------------------------------- after a break


class Counting:
    """A tokenizer that counts images and may be killed."""

    def __init__(self, inner: Any, *, dies_after: int | None = None) -> None:
        self.inner, self.info, self.policy = inner, inner.info, inner.policy
        self.encoded = self.decoded = 0
        self.dies_after = dies_after

    def _count(self, done: int) -> None:
        if self.dies_after is not None and done > self.dies_after:
            raise KeyboardInterrupt

    def encode(self, images: torch.Tensor, **settings: Any) -> Tokens:
        self._count(self.encoded + len(images))
        self.encoded += len(images)
        return self.inner.encode(images, **settings)

    def codes_from_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner.codes_from_ids(ids)

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> torch.Tensor:
        self._count(self.decoded + len(tokens))
        self.decoded += len(tokens)
        return self.inner.decode(tokens, seeds=seeds)


# Three of five images, then the process is gone, as if killed from outside.
KILLED = """
import os, signal, sys
from pathlib import Path
from comit_bench.pipeline.folders import tokenize_folder
from comit_bench.tokenizers.load import load_tokenizer

nano, left = load_tokenizer("comit-nano", device="cpu"), [3]
encode = nano.encode

def dying(images, **settings):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= len(images)
    return encode(images, **settings)

nano.encode = dying
folder, out, cache = map(Path, sys.argv[1:])
tokenize_folder(nano, folder, out, cache=cache, batch_size=1, shard_size=2)
"""


def test_both_ways_continue_after_a_kill(folder: Path, tmp_path: Path, nano: Any) -> None:
    out = tmp_path / "t.safetensors"
    settings: dict[str, Any] = {"cache": tmp_path / "cache", "batch_size": 1, "shard_size": 2}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(out), str(tmp_path / "cache")], cwd=ROOT, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    following = Counting(nano)
    done = tokenize_folder(following, folder, out, **settings)
    assert (following.encoded, done.computed) == (3, 3)  # the first shard of two was whole
    whole = tmp_path / "whole"
    tokenize_folder(nano, folder, whole, cache=tmp_path / "other")
    assert out.read_bytes() == whole.read_bytes()

    dying = Counting(nano, dies_after=2)
    with pytest.raises(KeyboardInterrupt):
        detokenize_file(dying, out, tmp_path / "back", batch_size=1)
    following = Counting(nano)
    back = detokenize_file(following, out, tmp_path / "back", batch_size=1)
    assert (back.written, back.kept, following.decoded) == (3, 2, 3)
    detokenize_file(nano, out, tmp_path / "straight")
    for path in (tmp_path / "straight").rglob("*.png"):
        same = tmp_path / "back" / path.relative_to(tmp_path / "straight")
        assert same.read_bytes() == path.read_bytes()


def test_a_changed_folder_is_tokenized_again(folder: Path, tmp_path: Path, nano: Any) -> None:
    out = tmp_path / "t.safetensors"
    tokenize_folder(nano, folder, out, cache=tmp_path / "cache")
    assert tokenize_folder(nano, folder, out, cache=tmp_path / "cache").computed == 0
    (folder / "a.png").write_bytes(png(77))
    with pytest.raises(UsageError, match="holds something else"):
        tokenize_folder(nano, folder, out, cache=tmp_path / "cache")
    before = out.read_bytes()
    done = tokenize_folder(nano, folder, out, cache=tmp_path / "cache", overwrite=True)
    assert done.computed == 0  # made by the refused call
    assert out.read_bytes() != before


def test_existing_images_are_kept_unless_told_otherwise(folder: Path, tmp_path: Path, nano: Any) -> None:
    out, back = tmp_path / "t.safetensors", tmp_path / "back"
    tokenize_folder(nano, folder, out, cache=tmp_path / "cache")
    back.mkdir()
    (back / "a.png").write_bytes(b"mine")
    assert detokenize_file(nano, out, back).kept == 1
    assert (back / "a.png").read_bytes() == b"mine"
    assert detokenize_file(nano, out, back, overwrite=True).kept == 0
    assert (back / "a.png").read_bytes() != b"mine"


# ----------------------------------------------------------- what may be wrong


def origin(**changes: Any) -> TokenOrigin:
    whole = TokenOrigin(
        tokenizer="x", family="y", weights="none", message_length=2, vocab_size=300, code_dim=1, resolution=8,
        preprocessing="resize(8,box)", policy=None, options={"a": "b"}, seed=0, comit_bench="0",
    )  # fmt: skip
    return replace(whole, **changes)


def content(**changes: Any) -> TokenFile:
    ids = np.array([[0, 299], [1, 2]])
    return replace(
        TokenFile(origin=origin(), names=("a.png", "b/ü.png"), ids=ids, broken={"c": "why"}), **changes
    )


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(token_file_bytes(content()))
    found = read_token_file(path)
    assert (found.names, found.origin, dict(found.broken)) == (content().names, origin(), {"c": "why"})
    assert found.ids is not None and found.ids.tolist() == [[0, 299], [1, 2]]


@pytest.mark.parametrize(
    ("vocab", "kind"), [(256, np.uint8), (257, np.uint16), (64000, np.uint16), (65537, np.uint32)]
)
def test_ids_take_the_smallest_type(tmp_path: Path, vocab: int, kind: type) -> None:
    raw = load(
        token_file_bytes(content(origin=origin(vocab_size=vocab), ids=np.array([[0, vocab - 1], [1, 2]])))
    )
    assert raw["ids"].dtype == kind
    assert raw["ids"][0, 1] == vocab - 1


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": np.array([[0, 300], [1, 2]])},
        {"ids": np.array([[0, -1], [1, 2]])},
        {"ids": np.array([[0, 1]])},
        {"ids": None},
        {"codes": np.zeros((2, 2, 1), np.float32)},
        {"names": ("a.png", "a.png")},
        {"names": ("a.png", "../b.png")},
        {"offsets": np.zeros((2, 3), np.float32)},
        {"offsets": np.full((2, 2), np.nan, np.float32)},
        {"ids": None, "codes": np.full((2, 2, 1), np.inf, np.float32), "origin": origin(vocab_size=None)},
    ],
)
def test_contradictions_are_not_written(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        token_file_bytes(content(**changes))


def test_every_changed_byte_and_every_cut_is_noticed(tmp_path: Path) -> None:
    whole = token_file_bytes(content())
    path = tmp_path / "t"
    for cut in (0, 4, 8, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CorruptFileError, match="truncated"):
            read_token_file(path)
    for place in range(len(whole) - 24, len(whole)):  # in the tensors
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CorruptFileError, match=r"intact|truncated"):
            read_token_file(path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"hello, I am a text file of some length", "not a safetensors file"),
        (save({"weight": np.zeros(3)}), "not one of tokens"),
        (save({"weight": np.zeros(3)}, {"format": "pt"}), "not one of tokens"),
        (save({"a": np.zeros(3)}, {"format": "comit-bench tokens", "format_version": "1"}), "missing"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "t"
    path.write_bytes(raw)
    with pytest.raises(CorruptFileError, match=message):
        read_token_file(path)
    done = run("detokenize", path, "--out", tmp_path / "back")
    assert isinstance(done.exception, CorruptFileError)
    assert not (tmp_path / "back").exists()


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(save({}, {"format": "comit-bench tokens", "format_version": "2", "comit_bench": "9.9"}))
    with pytest.raises(UsageError, match=r"token format 2.*9\.9"):
        read_token_file(path)
    with pytest.raises(MissingError, match="no such file"):
        read_token_file(tmp_path / "nothing")


def test_a_file_of_another_program_needs_no_checksum(tmp_path: Path, nano: Any) -> None:
    """A generative model over tokens writes ids as it has them."""
    info, path = nano.info, tmp_path / "t"
    made = origin(
        tokenizer="comit-nano", family=info.family, weights=info.weights, message_length=info.message_length,
        vocab_size=info.vocab_size, code_dim=info.code_dim, resolution=info.resolution,
    )  # fmt: skip
    metadata = {"format": "comit-bench tokens", "format_version": "1", **made.metadata()}
    tensors = {
        "ids": np.arange(32, dtype=np.int64).reshape(2, 16),
        "offsets": np.zeros((2, 2), np.float32),
        "names": np.frombuffer(b'["x.png","y.png"]', np.uint8),
    }
    path.write_bytes(save(tensors, metadata))
    assert detokenize_file(nano, path, tmp_path / "back").written == 2
    tensors["ids"][0, 0] = 1000
    path.write_bytes(save(tensors, metadata))
    with pytest.raises(CorruptFileError, match=r"outside 0\.\.999"):
        read_token_file(path)


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path, nano: Any) -> None:
    out = tmp_path / "t.safetensors"
    tokenize_folder(nano, folder, out, cache=tmp_path / "cache")
    other = load_tokenizer("comit-nano-no-srepa", device="cpu")
    with pytest.raises(UsageError, match=r"made by 'comit-nano'.*weights sha256"):
        detokenize_file(other, out, tmp_path / "back")
    done = run("detokenize", out, "--out", tmp_path / "back", "-t", "titok-nano")
    assert isinstance(done.exception, UsageError)
    assert "family comit, here titok" in str(done.exception)
    assert not (tmp_path / "back").exists()


def test_a_name_that_cannot_be_loaded_asks_for_the_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(token_file_bytes(content(origin=origin(tokenizer="my-own-run"))))
    done = run("detokenize", path, "--out", tmp_path / "back")
    assert isinstance(done.exception, UsageError)
    assert "made by 'my-own-run'" in str(done.exception)
    assert "--tokenizer" in str(done.exception)


def test_random_weights_are_loaded_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "t"
    assert run("tokenize", folder, "--out", out, "--weights", "random", "-q").exit_code == 0
    assert read_token_file(out).origin.weights == "random:0"
    assert run("detokenize", out, "--out", tmp_path / "back", "-q").exit_code == 0


def test_only_broken_images_make_no_file(tmp_path: Path, nano: Any) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.png").write_bytes(b"")
    with pytest.raises(
        CorruptFileError, match=r"none of its 1 images can be read, e\.g\. x\.png: the file is empty"
    ):
        tokenize_folder(nano, tmp_path / "in", tmp_path / "t", cache=tmp_path / "cache")
    assert not (tmp_path / "t").exists()


def test_policies_under_which_images_depend_on_each_other_are_refused(
    folder: Path, tmp_path: Path, nano: Any
) -> None:
    with pytest.raises(UsageError, match=r"Use global\+random:4"):
        tokenize_folder(
            nano, folder, tmp_path / "t", cache=tmp_path / "cache", policy="global+random-shared:4"
        )


def test_a_tokenizer_without_decoder_says_so(folder: Path, tmp_path: Path, nano: Any) -> None:
    class Blind(Counting):
        def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> torch.Tensor:
            raise NotImplementedError

    tokenize_folder(nano, folder, tmp_path / "t", cache=tmp_path / "cache")
    with pytest.raises(UnsupportedOperation, match="cannot decode"):
        detokenize_file(Blind(nano), tmp_path / "t", tmp_path / "back")


@pytest.mark.parametrize("name", ["", "/etc/x.png", "../x.png", "a/../../x.png", "a//b.png", "./a.png", 3])
def test_names_do_not_lead_out_of_the_folder(name: Any) -> None:
    with pytest.raises(ValueError, match="the name"):
        check_name(name)


@pytest.mark.parametrize("name", ["C:/x.png", "..\\x.png"])
def test_what_a_name_may_hold_depends_on_the_system(name: str) -> None:
    check_name(name, windows=False)
    with pytest.raises(ValueError, match="relative path"):
        check_name(name, windows=True)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.png", "b.jpg"], ["a.png", "b.png"]),
        (["a.jpg", "a.png"], ["a.jpg.png", "a.png"]),
        (["a.jpg", "a.webp"], ["a.jpg.png", "a.webp.png"]),
        (["a.jpg", "a.jpg.png", "a.png"], ["a.jpg.2.png", "a.jpg.png", "a.png"]),
        (["A.jpg", "a.png"], ["A.jpg.png", "a.png"]),
        (["v1.5", "sample"], ["v1.5.png", "sample.png"]),
        (["d.jpg", "d.png/x.png"], ["d.jpg.png", "d.png/x.png"]),
        (["\u00fc.jpg", "u\u0308.png"], ["\u00fc.jpg.png", "u\u0308.png"]),
    ],
)
def test_no_two_images_share_a_file(names: list[str], expected: list[str]) -> None:
    assert output_names(names) == expected


def test_the_documented_lines_read_a_file(folder: Path, tmp_path: Path, nano: Any, monkeypatch: Any) -> None:
    text = (ROOT / "docs" / "tokens.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    tokenize_folder(nano, folder, tmp_path / "tokens.safetensors", cache=tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(code, space)
    assert space["names"] == sorted(NAMES)
    assert space["ids"].shape == (5, 16)
    metadata = {"format", "format_version", "sha256", *origin().metadata()}
    rows = re.findall(r"^\| (`.*?) \|", text, re.M)
    documented = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    assert documented - {"ids", "codes", "offsets", "names", "broken"} == metadata
    assert json.loads(read_token_file(tmp_path / "tokens.safetensors").origin.metadata()["options"])
