"""Killed at any rename, everything that is replaced or moved is whole, and the next start goes on."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import CHANGES, RENAMES, die_everywhere

from comit_bench.data.download import download
from comit_bench.data.scenes.generate import generate, verify
from comit_bench.recipes.specs import DatasetSpec, DownloadSpec, GeneratorSpec
from comit_bench.tokenizers import weights
from comit_bench.tokenizers.checkpoints import read_tensors
from comit_bench.tokenizers.family import Family, Preset, Release
from comit_bench.tokenizers.kmeans import KMeansPatchTokenizer
from comit_bench.tokenizers.registry import FAMILIES
from comit_bench.train import checkpoint
from comit_bench.train.checkpoint import Counters
from comit_bench.train.config import load_config

MOMENTS = [
    pytest.param(RENAMES, id="renames"),
    pytest.param(CHANGES, id="every-change", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the processes below are forks
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["comit-nano", "vq-grid-nano", "scenes-teacher"])
@pytest.mark.parametrize("changes", MOMENTS)
def test_checkpoints_of_a_training(tmp_path: Path, changes: tuple[str, ...], name: str) -> None:
    config = load_config(name, ())

    def work(root: Path) -> None:
        checkpoint.sweep(root)
        last = checkpoint.choose(root, "auto")
        first = 0 if last is None else checkpoint.step_of(last)
        assert first >= 1, "a checkpoint was lost"
        for step in range(first + 1, 5):
            save(root, step)
            checkpoint.tidy(root, keep_last=2, best=1)

    def save(root: Path, step: int) -> None:
        tensors = {"model.safetensors": {"a": torch.full((2,), float(step))}}
        checkpoint.save_checkpoint(root, tensors, Counters(step), config, "data")

    def look(root: Path) -> dict[str, Any]:
        return {
            p.name: (
                read_tensors(p / "model.safetensors")["a"].tolist(),
                json.loads((p / "state.json").read_text())["counters"]["step"],
            )
            for p in checkpoint.found(root)
        }

    def again(root: Path) -> None:  # what a kill kept from being tidied is tidied with the next checkpoint
        work(root)
        checkpoint.tidy(root, keep_last=2, best=1)

    die_everywhere(lambda root: save(root, 1), again, look, tmp_path, changes=changes, least=8)
    assert [*look(tmp_path / "calm")] == [f"step-0000000{n}" for n in (1, 3, 4)]


@pytest.mark.parametrize("changes", MOMENTS)
def test_a_fit_of_kmeans(tmp_path: Path, changes: tuple[str, ...]) -> None:
    def fitted(value: int) -> KMeansPatchTokenizer:
        return KMeansPatchTokenizer(
            torch.full((4, 12), value, dtype=torch.uint8), patch=2, resolution=4, training_data="x"
        )

    def look(root: Path) -> list[int]:
        return KMeansPatchTokenizer.load(root / "fit").centroids.unique().tolist()

    die_everywhere(
        lambda root: fitted(1).save(root / "fit"),
        lambda root: fitted(2).save(root / "fit"),
        look,
        tmp_path,
        changes=changes,
    )
    assert look(tmp_path / "calm") == [2]


def zipped(names: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return stream.getvalue()


@pytest.mark.parametrize("changes", MOMENTS)
def test_a_data_set_that_is_unpacked(tmp_path: Path, changes: tuple[str, ...]) -> None:
    fields: dict[str, Any] = {"name": "d", "version": 1, "title": "d", "reader": "coco", "folder": "d"}
    items = (
        DownloadSpec(url="https://no.where/i.zip", file="i.zip", unpack=".", creates="images"),
        DownloadSpec(url="https://no.where/a.zip", file="a.zip", unpack=".", creates="annotations/one.json"),
    )
    spec = DatasetSpec(**fields, licence="none", downloads=items)

    def begin(root: Path) -> None:
        (root / ".downloads").mkdir()
        (root / "annotations").mkdir()
        (root / "annotations" / "mine.json").write_text("mine")
        images = zipped({f"top/images/{n}.jpg": b"x" * n for n in (1, 2)})
        (root / ".downloads" / "i.zip").write_bytes(images)
        notes = zipped({"annotations/one.json": b"1", "annotations/two.json": b"2"})
        (root / ".downloads" / "a.zip").write_bytes(notes)

    def look(root: Path) -> dict[str, bytes]:
        parts = [p for p in root.rglob("*") if p.is_file() and ".downloads" not in p.parts]
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in parts}

    die_everywhere(
        begin, lambda root: download(spec, root, progress=False), look, tmp_path, changes=changes, least=6
    )
    assert len(look(tmp_path / "calm")) == 5


@pytest.mark.parametrize("changes", MOMENTS)
def test_weights_that_are_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...]
) -> None:
    release = Release(file="toy.pth", url="https://no.where/toy.pth", unpack="toy:unpack")
    real = weights.resolve
    unpack: Callable[..., Any] = lambda content, path: content  # noqa: E731
    monkeypatch.setattr(weights, "resolve", lambda target: unpack if target == "toy:unpack" else real(target))
    toy = Family(name="toy", loader="toy:load", presets=(Preset(name="toy", source=release),))
    monkeypatch.setattr("comit_bench.tokenizers.registry.FAMILIES", (*FAMILIES, toy))

    def begin(root: Path) -> None:
        for value in (1.0, 2.0):
            torch.save({"a": torch.full((3,), value)}, root / f"{value:.0f}.pth")
        weights.convert("toy", root / "1.pth", output=root / "toy")

    def look(root: Path) -> tuple[list[float], str]:
        note = json.loads((root / "toy" / "source.json").read_text())
        return read_tensors(root / "toy" / "model.safetensors")["a"].tolist(), note["file"]

    def work(root: Path) -> None:
        monkeypatch.setenv("COMIT_BENCH_CACHE", str(root / "cache"))
        if (root / "toy" / "source.json").exists():
            assert look(root) in [([1.0] * 3, "1.pth"), ([2.0] * 3, "2.pth")]
        weights.convert("toy", root / "2.pth", output=root / "toy")

    die_everywhere(begin, work, look, tmp_path, changes=changes, least=2)
    assert look(tmp_path / "calm") == ([2.0] * 3, "2.pth")


@pytest.mark.slow
def test_scenes_that_are_painted(tmp_path: Path) -> None:
    spec = GeneratorSpec(layout="recognition", train=3, val=2)
    die_everywhere(
        lambda root: None,
        lambda root: generate(spec, root / "set", progress=False),
        lambda root: verify(root / "set"),
        tmp_path,
        changes=RENAMES,
        least=9,
    )
