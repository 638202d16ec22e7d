"""Figures of the structure of messages: their arrays against the tasks, their files, their commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from comit_bench.commands.app import app
from comit_bench.commands.figure import NEEDS
from comit_bench.data.scenes.digits import EDITS, paint
from comit_bench.errors import UnsupportedOperation, UsageError
from comit_bench.figures import codebook, counterfactual, neighbours, style
from comit_bench.figures.inputs import Images, encode
from comit_bench.recipes.kinds import CounterfactualSpec
from comit_bench.recipes.specs import GeneratorSpec
from comit_bench.tasks.changes import changed_ids, pair_up
from comit_bench.tasks.counterfactual import assign
from comit_bench.tasks.retrieval import nearest
from comit_bench.tokenizers.load import load_tokenizer

SCENES = 6


@pytest.fixture(scope="module")
def nano() -> Any:
    return load_tokenizer("comit-nano", device="cpu")


@pytest.fixture(scope="module")
def oracle() -> Any:
    return load_tokenizer("pixel-oracle", device="cpu")


def as_inputs(names: list[str], images: np.ndarray) -> Images:
    pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
    return Images(tuple(names), pixels, tuple(Path(name) for name in names))


@pytest.fixture(scope="module")
def digits() -> Images:
    spec = GeneratorSpec(layout="recognition", train=0, val=40)
    scenes = paint(spec, "val", range(40))
    names = [f"{scenes.name(i, 0).replace(' ', '_')}/{i:05d}" for i in range(40)]
    names = [name if i % 2 else f"digit_{i % 4}/{i:05d}" for i, name in enumerate(names)]
    return as_inputs(names, scenes.images)


@pytest.fixture(scope="module")
def pairs() -> Images:
    spec = GeneratorSpec(layout="counterfactual", train=0, val=SCENES * len(EDITS))
    scenes = paint(spec, "val", range(SCENES * len(EDITS)))
    return as_inputs([f"{edit}/{scene:05d}" for scene in range(SCENES) for edit in EDITS], scenes.images)


def check_files(figure: Any, folder: Path) -> None:
    first = [path.read_bytes() for path in style.save(figure, folder / "one")]
    assert first[0].startswith(b"%PDF-") and first[1].startswith(b"\x89PNG")
    assert [path.read_bytes() for path in style.save(figure, folder / "two")] == first
    with Image.open(folder / "one.png") as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_neighbours_are_those_of_the_task(nano: Any, digits: Images, tmp_path: Path) -> None:
    data = neighbours.compute(nano, digits, queries=3, k=4, seed=1)
    codes = encode(nano, digits, seed=1).codes
    found = nearest(lambda rows: codes[rows], 40, 4)
    place = {name: i for i, name in enumerate(digits.names)}
    for row, names in enumerate(data.names):
        query = place[names[0]]
        assert [place[name] for name in names[1:]] == found.index[query].tolist()
        np.testing.assert_array_equal(data.distance[row], found.distance[query])
        np.testing.assert_array_equal(data.images[row, 0], digits.images[query].numpy())
    assert data.classes is not None and data.recall is not None and data.chance is not None
    assert [row[0] for row in data.classes] == [row[0].rpartition("/")[0] for row in data.names]
    assert data.recall[1] >= data.recall[0] and data.chance[1] > data.chance[0]
    figure = neighbours.draw(data)
    texts = [text.get_text() for text in figure.texts]
    marks = sum(own == row[0] for row in data.classes for own in row[1:])
    assert sum(text.startswith("✓") for text in texts) == marks
    assert sum(text.startswith("✗") for text in texts) == 12 - marks
    check_files(figure, tmp_path)


def test_neighbours_without_classes(nano: Any, digits: Images, tmp_path: Path) -> None:
    flat = Images(tuple(f"{i:03d}" for i in range(40)), digits.images, digits.paths)
    data = neighbours.compute(nano, flat, queries=2, k=3)
    assert data.classes is None and data.recall is None
    figure = neighbours.draw(data)
    assert not any(text.get_text().startswith(("✓", "✗")) for text in figure.texts)
    with pytest.raises(UsageError, match="neighbours"):
        neighbours.compute(nano, flat, k=40)
    with pytest.raises(UsageError, match="query"):
        neighbours.compute(nano, flat, queries=0)


def test_codebook_counts_and_matrix(nano: Any, oracle: Any, digits: Images, tmp_path: Path) -> None:
    data = codebook.compute(nano, digits, positions=5)
    assert data.positions.tolist() == [0, 4, 8, 11, 15]
    assert data.shared.shape == (5, 5) and np.isnan(np.diag(data.shared)).all()
    np.testing.assert_array_equal(data.shared, data.shared.T)
    assert data.use.images == 40 and int(data.use.counts.sum()) == 40 * 16
    check_files(codebook.draw(data), tmp_path)
    with pytest.raises(UnsupportedOperation, match="continuous"):
        codebook.compute(oracle, digits)


def test_counterfactual_shows_what_is_measured(nano: Any, pairs: Images, tmp_path: Path) -> None:
    data = counterfactual.compute(nano, pairs, count=2)
    ids = encode(nano, pairs).ids
    assert ids is not None and data.by_id
    known = pair_up(pairs.names)
    expected = assign(known, changed_ids(ids.numpy(), known), CounterfactualSpec())
    np.testing.assert_array_equal(data.found.profiles, expected.profiles)
    assert {n: s.value for n, s in data.found.scores.items()} == {
        n: s.value for n, s in expected.scores.items()
    }
    assert sorted(data.edits.tolist()) == list(range(9)) and known.edits[data.edits[-1]] == "background"
    place = {name: i for i, name in enumerate(pairs.names)}
    for row, scene in enumerate(data.shown):
        for column, edit in enumerate(["original", *(known.edits[f] for f in data.edits)]):
            image = pairs.images[place[f"{edit}/{known.scenes[scene]}"]].numpy()
            np.testing.assert_array_equal(data.images[row, column], image)
    figure = counterfactual.draw(data)
    strips = [
        axes.images[0].get_array()
        for axes in figure.axes
        if axes.images and axes.images[0].get_array().ndim == 2
    ]
    assert len(strips) == 2 * 9
    np.testing.assert_array_equal(strips[0].ravel(), data.found.changes.change[data.shown[0], data.edits[0]])
    check_files(figure, tmp_path)


def test_counterfactual_of_continuous_codes(oracle: Any, pairs: Images, tmp_path: Path) -> None:
    data = counterfactual.compute(oracle, pairs, count=1)
    assert not data.by_id and data.found.scores["object"].value == pytest.approx(1)
    check_files(counterfactual.draw(data), tmp_path)
    with pytest.raises(UsageError, match="scene"):
        counterfactual.compute(oracle, pairs, count=0)
    with pytest.raises(UsageError, match="original"):
        counterfactual.compute(oracle, as_inputs(["a", "b"], np.zeros((2, 32, 32, 3), np.uint8)))


def write(inputs: Images, folder: Path) -> Path:
    for name, image in zip(inputs.names, inputs.images, strict=True):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.moveaxis(image.numpy(), 0, -1)).save(path)
    return folder


def test_commands_on_folders(digits: Images, pairs: Images, tmp_path: Path) -> None:
    assert {"neighbours", "codebook", "counterfactual"} <= NEEDS.keys()
    folders = {"digits": write(digits, tmp_path / "digits"), "pairs": write(pairs, tmp_path / "pairs")}
    calls = {
        "neighbours": ["digits", "--count", 2, "-k", 3], "codebook": ["digits"], "counterfactual": ["pairs"],
    }  # fmt: skip
    for name, (source, *options) in calls.items():
        arguments = ["figure", name, "--images", folders[str(source)], "--output", tmp_path / "out", *options]
        done = CliRunner().invoke(app, [str(one) for one in arguments])
        assert done.exit_code == 0, done.output
        written = [Path(line) for line in done.stdout.split("\n") if line]
        assert [path.suffix for path in written] == [".pdf", ".png"]
        assert all(path.name.startswith(f"{name}-comit-nano") and path.is_file() for path in written)
