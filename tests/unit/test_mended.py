"""What could not be read is looked at again: a mended image is measured, and only its part is made anew."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import write_images, write_recipes

import comit_bench
from comit_bench.data import images
from comit_bench.data.tokens.token_file import read_token_file
from comit_bench.errors import CorruptFileError
from comit_bench.pipeline import folders
from comit_bench.pipeline import tokenize as tokenizing
from comit_bench.results.schema import Record
from comit_bench.tokenizers.load import load_tokenizer

TASK = {
    "name": "copy",
    "version": 1,
    "title": "Copies",
    "kind": "reconstruction",
    "suite": "extra",
    "dataset": "tiny",
    "split": {"report": "val"},
    "seeds": 1,
    "reconstruction": {"features": None, "kid": False},
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_images(tmp_path, train=2, val=5)  # 20 images in val, in 5 shards
    write_recipes(tmp_path)
    (tmp_path / "probes" / "copy").mkdir()
    (tmp_path / "probes" / "copy" / "task.yaml").write_text(yaml.safe_dump(TASK))
    monkeypatch.setattr(tokenizing, "SHARD_SIZE", 4)
    return tmp_path


def measure(root: Path) -> Record:
    (record,) = comit_bench.evaluate(
        ["pixel-oracle"], ["copy"], suite="scenes", references=False, data_root=root, include=(root,),
        cache=root / "cache", output=root / "out", progress=False,
    )  # fmt: skip
    return record


def shards(root: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (root / "cache" / "tokens").rglob("shard-*")}


def broken(record: Record) -> int:
    assert record.counts is not None
    return record.counts.broken


def test_an_image_repaired_at_equal_size_is_measured(root: Path) -> None:
    path = root / "tiny" / "val" / "red_b" / "0001.png"
    whole, before = path.read_bytes(), path.stat()
    path.write_bytes(b"\0" * len(whole))
    first = measure(root)
    assert broken(first) == 1 and first.metrics["psnr"].n == 19
    made = shards(root)
    assert len(made) == 5
    path.write_bytes(whole)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = measure(root)
    assert broken(second) == 0 and second.metrics["psnr"].n == 20
    assert second.protocol_digest != first.protocol_digest
    now = shards(root)
    assert {p: now[p] for p in made} == made and len(now) == 6, "one shard is made anew, the others are kept"


def test_an_image_that_another_decoder_can_read_is_measured(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same files, another program: the record is made again and replaced."""
    path = root / "tiny" / "val" / "red_b" / "0001.png"
    real = images.decode_image

    def old_decoder(content: bytes, recipe: str, *, name: str) -> Any:
        if name == str(path):
            raise CorruptFileError(f"{name}: this version cannot read it")
        return real(content, recipe, name=name)

    monkeypatch.setattr(images, "decode_image", old_decoder)
    first = measure(root)
    assert broken(first) == 1
    made = shards(root)
    again = measure(root)
    assert again.created == first.created and shards(root) == made, "still broken: the record is kept"
    monkeypatch.setattr(images, "decode_image", real)
    second = measure(root)
    assert broken(second) == 0 and second.metrics["psnr"].n == 20
    assert second.protocol_digest == first.protocol_digest
    assert sum(made[p] != state for p, state in shards(root).items()) == 1
    assert len(list((root / "out" / "records").rglob("*.json"))) == 1
    assert measure(root) == second


def test_without_its_messages_a_record_is_kept(root: Path) -> None:
    path = root / "tiny" / "val" / "red_b" / "0001.png"
    path.write_bytes(b"no image")
    first = measure(root)
    for shard in shards(root):
        shard.unlink()
    assert measure(root) == first and not shards(root)


def test_a_folder_is_tokenized_where_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        (tmp_path / "p").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "p" / f"{i}.bmp")
    tokenizer = load_tokenizer("pixel-oracle", device="cpu")

    def run(name: str, folder: str = "p") -> folders.Tokenized:
        return folders.tokenize_folder(
            tokenizer, tmp_path / folder, tmp_path / name, cache=tmp_path / "cache", shard_size=2
        )

    whole = (tmp_path / "p" / "3.bmp").read_bytes()
    (tmp_path / "p" / "3.bmp").write_bytes(b"\0" * len(whole))
    first = run("a.safetensors")
    assert first.computed == 6 and list(first.broken) == ["3.bmp"]
    (tmp_path / "p" / "3.bmp").write_bytes(whole)
    second = run("b.safetensors")
    assert second.computed == 2 and not second.broken and second.messages == 6
    (tmp_path / "p").rename(tmp_path / "q")
    assert run("c.safetensors", "q").computed == 0
    assert read_token_file(tmp_path / "c.safetensors").names == tuple(f"{i}.bmp" for i in range(6))
