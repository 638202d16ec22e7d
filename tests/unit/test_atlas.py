"""The drawings that come with the package: whole, licensed, every vendor in one split, damage is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from comit_bench.data.scenes import atlas
from comit_bench.data.scenes.atlas import CELL, FOLDER, load_drawings, read_drawings
from comit_bench.data.scenes.formats import PREDICATES
from comit_bench.errors import CorruptFileError, UsageError
from comit_bench.recipes.kinds import TextSpec
from comit_bench.tasks import text
from comit_bench.tasks.text import TABLE_FILE, find_text_encoder

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {"Apache-2.0", "MIT", "CC-BY-4.0", "CC0-1.0", "LicenseRef-public-domain"}
INDEX = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))


def files() -> list[dict[str, Any]]:
    return [*INDEX["vendors"], *INDEX["photos"]]


def test_the_folder_holds_what_the_index_lists_and_stays_small() -> None:
    found = {path.relative_to(FOLDER).as_posix(): path for path in FOLDER.rglob("*") if path.is_file()}
    assert set(found) == {"index.json", *(entry["file"] for entry in files())}
    for entry in files():
        assert sha256(found[entry["file"]].read_bytes()).hexdigest() == entry["sha256"], entry["file"]
    assert sum(path.stat().st_size for path in (*found.values(), TABLE_FILE)) < 6_000_000


def test_licences_allow_it_and_are_told() -> None:
    told = (ROOT / "THIRD_PARTY_LICENSES.md").read_text(encoding="utf-8")
    for entry in files():
        assert entry["licence"] in ALLOWED, "no share-alike, nothing unknown"
        assert entry["author"] in told
    for vendor in INDEX["vendors"]:
        assert f"`{vendor['file']}`" in told
        assert f"`{vendor['package']}` {vendor['version']}" in told and vendor["homepage"] in told
    for photo in INDEX["photos"]:
        assert f"`{Path(photo['file']).name.rsplit('-', 1)[0]}-*.png`" in told


def test_every_vendor_is_in_one_split_and_draws_every_concept() -> None:
    drawings = load_drawings()
    splits = [vendor.split for vendor in drawings.vendors]
    assert splits == ["train"] * 5 + ["val"] * 2 and len({v.name for v in drawings.vendors}) == 7
    assert len(drawings.concepts) == 60 and list(drawings.concepts) == sorted(drawings.concepts)
    for number in range(len(drawings.vendors)):
        assert set(drawings.concept[drawings.vendor == number]) >= set(range(60))
    unlabelled = drawings.vendor[drawings.concept == -1]
    assert len(unlabelled) > 800
    assert {splits[number] for number in unlabelled} == {"train"}
    per_vendor = list(zip(drawings.vendor.tolist(), drawings.names, strict=True))
    assert len(set(per_vendor)) == len(per_vendor)


def test_pixels_are_premultiplied_centred_and_all_different() -> None:
    pixels = load_drawings().pixels
    assert pixels.shape == (len(load_drawings().names), CELL, CELL, 4) and pixels.dtype == np.uint8
    assert (pixels[..., :3] <= pixels[..., 3:]).all()
    assert len({cell.tobytes() for cell in pixels}) == len(pixels)
    inked = pixels[..., 3] > 0
    extents = []
    for axis in (1, 2):
        line = inked.any(axis=axis)
        first, after = line.argmax(axis=1), CELL - line[:, ::-1].argmax(axis=1)
        extents.append(after - first)
        assert (np.abs(first - (CELL - after)) <= 2).all()
    assert (np.maximum(*extents) >= CELL - 1).all()


def test_the_pools_of_the_splits_share_no_vendor() -> None:
    drawings = load_drawings()
    for number, concept in enumerate(drawings.concepts):
        train, val = drawings.pool("train", concept), drawings.pool("val", concept)
        assert len(train) >= 5 and len(val) == 2
        assert not set(drawings.vendor[train]) & set(drawings.vendor[val])
        assert (drawings.concept[[*train, *val]] == number).all()
        assert (drawings.pool("train", number) == train).all()
    assert not len(drawings.pool("val", -1))


def test_photographs_of_the_splits_share_nothing() -> None:
    photos = load_drawings().photos
    assert set(photos) == {"train", "val"}
    squares = {}
    for split, several in photos.items():
        assert len(several) == 8
        assert all(
            photo.ndim == 3 and photo.shape[2] == 3 and min(photo.shape[:2]) >= 64 for photo in several
        )
        squares[split] = {
            photo[y : y + 16, x : x + 16].tobytes()
            for photo in several
            for y in range(0, photo.shape[0] - 15, 16)
            for x in range(0, photo.shape[1] - 15, 16)
            if photo[y : y + 16, x : x + 16].std() > 2
        }
    assert min(map(len, squares.values())) > 100 and not squares["train"] & squares["val"]


def test_nobody_writes_into_the_drawings() -> None:
    drawings = load_drawings()
    assert load_drawings() is drawings
    for array in (drawings.pixels, drawings.concept, drawings.vendor, drawings.photos["val"][0]):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda d: d.pool("train", "caat"), r"unknown concept 'caat'.*Did you mean 'cat'"),
        (lambda d: d.vendor_index("notto"), r"unknown vendor 'notto'.*'noto'"),
        (lambda d: d.pool("test", "cat"), r"unknown split 'test'.*train, val"),
        (lambda d: d.pool("train", 60), r"concept 60: expected 0 to 59"),
    ],
)
def test_unknown_names_are_told(ask: Callable[[atlas.Drawings], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ask(load_drawings())


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder of drawings that a test may damage."""
    return Path(shutil.copytree(FOLDER, tmp_path / "atlas"))


@pytest.mark.parametrize("name", ["noto.png", "photos/grass-val.png", "index.json"])
@pytest.mark.parametrize("harm", ["missing", "cut", "changed"])
def test_damage_is_one_error_that_names_the_file(copy: Path, name: str, harm: str) -> None:
    path = copy / name
    content = path.read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(content[:-9])
    elif harm == "changed":
        path.write_bytes(content[:70] + bytes([content[70] ^ 255]) + content[71:])
    with pytest.raises(CorruptFileError, match=rf"{name}: .*reinstall comit_bench"):
        read_drawings(copy)


@pytest.mark.parametrize("change", ["name", "package", "sha256", "split"])
def test_a_vendor_in_both_splits_is_refused(copy: Path, change: str) -> None:
    index = json.loads((copy / "index.json").read_text(encoding="utf-8"))
    first, last = index["vendors"][0], index["vendors"][-1]
    last[change] = "test" if change == "split" else first[change]
    (copy / "index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CorruptFileError, match=r"index.json: vendor 'noto|index.json: vendor 'fxemoji'"):
        read_drawings(copy)


# ------------------------------------------------------------------ sentence vectors


def test_the_table_holds_every_concept_and_predicate() -> None:
    encoder = find_text_encoder(TextSpec(encoder="minilm-table"), offline=True)
    texts = [*load_drawings().concepts, *PREDICATES]
    vectors = encoder.features(texts, None)
    assert vectors.shape == (66, 384) and vectors.isfinite().all()
    assert np.allclose(vectors.norm(dim=1), 1.0, atol=1e-3)
    assert TABLE_FILE.stat().st_size < 100_000
    place = {name: number for number, name in enumerate(texts)}
    near = vectors @ vectors.T  # what random words do not give: meaning
    assert near[place["cat"], place["dog"]] > near[place["cat"], place["helicopter"]]
    assert near[place["pizza"], place["hamburger"]] > near[place["pizza"], place["anchor"]]
    assert encoder.identity["table"].startswith("sha256:")
    assert (encoder.features(["Cat", "cat"], None) == vectors[place["cat"]]).all()


def test_a_text_that_is_not_in_the_table_is_told() -> None:
    encoder = find_text_encoder(TextSpec(encoder="minilm-table"), offline=True)
    with pytest.raises(UsageError, match=r"text 'teapots' has no vector in minilm-table.*random-t5"):
        encoder.features(["cat", "teapots"], None)


@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_a_damaged_table_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    path = tmp_path / "table.safetensors"
    if harm == "cut":
        path.write_bytes(TABLE_FILE.read_bytes()[:-9])
    monkeypatch.setattr(text, "TABLE_FILE", path)
    with pytest.raises(CorruptFileError, match=r"table.safetensors: .*reinstall"):
        find_text_encoder(TextSpec(encoder="minilm-table"), offline=True).features(["cat"], None)
