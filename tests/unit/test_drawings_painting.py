"""Scenes of drawings: decided by the seed alone, nothing shared by the splits, labelled as painted."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawing_specs import LAYOUTS, SIDE, spec_of

from comit_bench.data.scenes.atlas import load_drawings
from comit_bench.data.scenes.formats import painter, relations_between
from comit_bench.data.scenes.generate import generate
from comit_bench.data.scenes.painting import (
    ATTRIBUTES,
    EDITS,
    HUES,
    OBJECTS,
    PLACES,
    Scenes,
    _shrink,
    _turn,
    paint,
    pairs_of,
    places_of,
)  # fmt: skip
from comit_bench.errors import UsageError
from comit_bench.recipes.specs import (
    GeneratorSpec,
)


def fields(scenes: Scenes) -> dict[str, np.ndarray]:
    return dict(vars(scenes))


# --- painting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*LAYOUTS, "mixture"])
def test_an_image_depends_on_its_number_only(layout: str) -> None:
    spec = spec_of(layout)
    whole = fields(paint(spec, "val", range(30)))
    for indices in ([7], [29, 3, 17], list(range(5, 30))):
        for name, values in fields(paint(spec, "val", indices)).items():
            np.testing.assert_array_equal(values, whole[name][indices], err_msg=name)


def test_seed_split_and_layout_each_change_the_pictures() -> None:
    base = paint(spec_of("recognition"), "val", range(4)).images
    for spec, split in (
        (spec_of("recognition", seed=1), "val"),
        (spec_of("recognition"), "train"),
        (spec_of("objectness"), "val"),
    ):
        assert (paint(spec, split, range(4)).images != base).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("size", [1, 17, 24, 64, 90])
def test_shrinking_is_exact(size: int) -> None:
    """In any order of summation, since all sums are whole numbers: compared with integers."""
    cells = load_drawings().pixels[:3].transpose(0, 1, 3, 2)
    edges = np.arange(size + 1) * 64
    fine = np.repeat(cells.astype(np.int64), size, axis=1)  # 1/T pixels
    rows = np.add.reduceat(fine, edges[:-1], axis=1)
    both = np.add.reduceat(np.repeat(rows, size, axis=3), edges[:-1], axis=3)  # [m, T, 4, T]
    assert both.max() <= 255 * 4096
    np.testing.assert_array_equal(_shrink(cells, size) * 4096, both.transpose(0, 2, 1, 3))


def test_turned_hues_are_rotations_that_leave_grey_alone() -> None:
    for turn, (a, b, c) in HUES.items():
        matrix = np.array([[a, b, c], [c, a, b], [b, c, a]]) / 256
        assert a + b + c == 256
        angle = np.degrees(np.arccos(np.clip((np.trace(matrix) - 1) / 2, -1, 1)))
        assert angle == pytest.approx(abs(turn), abs=1)  # 256ths
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=0.01)
    assert list(HUES) == sorted(HUES) and [-turn for turn in HUES] == list(HUES)[::-1]
    grey = np.full((len(HUES), 3, 2, 2), 60, np.float32)
    np.testing.assert_array_equal(_turn(grey, np.full((len(HUES), 2, 2), 90, np.float32), np.arange(5)), grey)
    colour = np.array([90, 30, 0], np.float32)[None, :, None, None] * np.ones((5, 1, 2, 2), np.float32)
    turned = _turn(colour, np.full((5, 2, 2), 90, np.float32), np.arange(5))
    assert len(np.unique(turned[:, :, 0, 0], axis=0)) == 5 and turned.min() >= 0 and turned.max() <= 90


def test_vendors_and_photographs_of_the_splits_are_disjoint() -> None:
    known = load_drawings()
    for layout in ("recognition", "pairs", "relations", "mixture"):
        for split in ("train", "val"):
            scenes = paint(spec_of(layout), split, range(200))
            there = scenes.drawings >= 0
            assert {known.vendors[v].split for v in scenes.vendors[there]} == {split}
            np.testing.assert_array_equal(known.vendor[scenes.drawings[there]], scenes.vendors[there])
            np.testing.assert_array_equal(known.concept[scenes.drawings[there]], scenes.concepts[there])
            assert set(scenes.photos[:, 0]) == set(range(len(known.photos[split])))
            for which, left, top, side in scenes.photos:
                height, width = known.photos[split][which].shape[:2]
                assert left >= 0 <= top and left + side <= width and top + side <= height


@pytest.mark.parametrize("seed", [0, 3])
def test_pairs_of_the_splits_are_disjoint_and_even(seed: int) -> None:
    count = len(load_drawings().concepts)
    train, val = ([frozenset(p) for p in pairs_of(split, seed).tolist()] for split in ("train", "val"))
    every = {frozenset(p) for p in combinations(range(count), 2)}
    assert len({*train, *val}) == len(train) + len(val) == len(every) == 1770
    assert {*train, *val} == every
    for pairs in (train, val):
        assert len(set(Counter(c for pair in pairs for c in pair).values())) == 1, "uneven concepts"
    assert len(val) / len(every) == pytest.approx(0.2, abs=0.02)
    for split, pairs in (("train", train), ("val", val)):
        scenes = paint(spec_of("pairs", seed=seed), split, range(120))
        assert {frozenset(p) for p in scenes.concepts.tolist()} <= set(pairs)
        assert set(Counter(scenes.concepts.ravel().tolist()).values()) == {4}
    assert pairs_of("val", 0).tolist() != pairs_of("val", 3).tolist()


@pytest.mark.parametrize("side", [64, 96])
@pytest.mark.parametrize("layout", [*LAYOUTS, "mixture"])
def test_objects_are_whole_apart_and_what_is_said_of_them(layout: str, side: int) -> None:
    scenes = paint(spec_of(layout, image_size=side), "val", range(78))
    n, things = scenes.drawings.shape
    assert scenes.images.shape == (n, side, side, 3) and scenes.images.dtype == np.uint8
    assert scenes.masks.sum(axis=1).max() == 1, "objects overlap"
    border = np.ones((side, side), bool)
    border[2:-2, 2:-2] = False
    assert not scenes.masks[..., border].any(), "no room for the halo"
    for row in range(n):
        for k in range(things):
            x, y, w, h = scenes.boxes[row, k]
            mask = scenes.masks[row, k]
            if scenes.drawings[row, k] < 0:
                assert w == h == 0 and not mask.any()
                known = (scenes.concepts, scenes.vendors, scenes.hues, scenes.places)
                assert [values[row, k] for values in known] == [-1] * 4
                continue
            inside = mask[y : y + h, x : x + w]
            assert mask.sum() == inside.sum() > 0
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            centre = np.array([x + w / 2, y + h / 2])
            cell = (centre >= 11 / 32 * side).astype(int) + (centre >= 21 / 32 * side)
            assert scenes.places[row, k] == cell[0] + 3 * cell[1]


def test_objects_lie_everywhere() -> None:
    for layout in ("pairs", "mixture", "objectness"):
        scenes = paint(spec_of(layout), "train" if layout != "objectness" else "val", range(600))
        shares = (
            np.bincount(scenes.places[scenes.places >= 0], minlength=len(PLACES)) / (scenes.places >= 0).sum()
        )
        assert shares.min() > 0.003, (layout, shares)
        assert len(np.unique(scenes.hues[scenes.hues >= 0])) == len(HUES)
    assert places_of(np.array([[0, 0, 20, 20], [22, 22, 20, 20], [44, 0, 20, 20]]), 64).tolist() == [0, 4, 2]


def test_a_mixture_shows_one_to_three_objects_with_and_without_labels() -> None:
    scenes = paint(spec_of("mixture"), "train", range(600))
    counts = Counter((scenes.drawings >= 0).sum(axis=1).tolist())
    assert set(counts) == {1, 2, 3} and min(counts.values()) > 150
    there = scenes.drawings >= 0
    unlabelled = (scenes.concepts[there] < 0).mean()
    assert 0.3 < unlabelled < 0.9
    longest = scenes.boxes[..., 2:].max(axis=-1)
    single = longest[there.sum(axis=1) == 1, 0]
    assert (single > 32).mean() == pytest.approx(0.5, abs=0.12)
    assert longest[there.sum(axis=1) > 1].max() <= 28
    known = load_drawings()
    labelled = int(np.flatnonzero(scenes.concepts[:, 0] >= 0)[0])
    plain = int(np.flatnonzero(scenes.concepts[:, 0] < 0)[0])
    assert scenes.name(labelled, 0) == known.concepts[scenes.concepts[labelled, 0]]
    assert scenes.name(plain, 0) == known.names[scenes.drawings[plain, 0]]
    four = paint(spec_of("mixture", objects=4), "train", range(80))
    assert (four.drawings >= 0).sum(axis=1).max() == 4


def test_relations_hold_and_are_frequent() -> None:
    scenes = paint(spec_of("relations"), "train", range(400))
    counted: Counter[str] = Counter()
    for first, second in scenes.boxes.tolist():
        holds = relations_between(tuple(first), tuple(second))
        assert set(holds) & {"left of", "right of", "above", "below"}
        counted.update(holds)
    assert len(counted) == 6 and min(counted.values()) > 50
    assert (scenes.concepts[:, 0] != scenes.concepts[:, 1]).all()


def test_low_contrast_gets_a_light_halo() -> None:
    """Surroundings of an object are lighter than the same background without it, or the same."""
    spec, count = spec_of("counterfactual"), len(EDITS)
    scenes = paint(spec, "val", range(40 * count))
    images = scenes.images.reshape(40, count, SIDE, SIDE, 3).astype(int)
    masks = scenes.masks.reshape(40, count, 2, SIDE, SIDE)
    lit = []
    for scene in range(40):
        bare = images[scene, EDITS.index("removed_large")]
        x, y, w, h = scenes.boxes[scene * count, 0]
        near = np.zeros((SIDE, SIDE), bool)
        near[max(0, y - 2) : y + h + 2, max(0, x - 2) : x + w + 2] = True
        around = near & ~masks[scene, 0].any(axis=0)
        lit.append((images[scene, 0] - bare)[around].mean())
    assert sum(value > 20 for value in lit) > 5 and sum(abs(value) < 12 for value in lit) > 5


# --- counterfactual ---------------------------------------------------------------------------------

SCENES = 24


@pytest.fixture(scope="module")
def edited() -> Scenes:
    return paint(spec_of("counterfactual", val=SCENES * len(EDITS)), "val", range(SCENES * len(EDITS)))


def by_scene(values: np.ndarray) -> np.ndarray:
    return values.reshape(SCENES, len(EDITS), *values.shape[1:])


def test_exactly_one_thing_is_edited(edited: Scenes) -> None:
    known = {name: by_scene(values) for name, values in fields(edited).items() if name != "images"}
    may_change = {
        "moved": {"boxes", "masks", "places"},
        "recoloured": {"hues"},
        "redrawn": {"vendors", "drawings", "boxes", "masks", "places"},
        "replaced": {"concepts", "vendors", "drawings", "boxes", "masks", "places"} - {"vendors"},
        "removed": set(known) - {"photos"},
    }
    must_change = {"moved": "boxes", "recoloured": "hues", "redrawn": "vendors", "replaced": "concepts",
                   "removed": "drawings"}  # fmt: skip
    for number, edit in enumerate(EDITS):
        attribute, _, thing = edit.partition("_")
        for name, values in known.items():
            differs = values[:, number] != values[:, 0]
            if name == "photos":
                assert differs.any() == (edit == "background")
                continue
            for k in range(2):
                own = thing == OBJECTS[k]
                assert (own and name in may_change[attribute]) or not differs[:, k].any(), (edit, name)
                if own and must_change[attribute] == name:
                    assert differs[:, k].reshape(SCENES, -1).any(axis=1).all(), (edit, name)
    assert (known["concepts"][:, 0, 0] != known["concepts"][:, 0, 1]).all()
    new = known["concepts"][:, EDITS.index("replaced_large"), 0]
    assert (new != known["concepts"][:, 0, 1]).all()
    boxes = known["boxes"][:, 0]
    assert (boxes[:, 0, 2:].max(axis=1) > 1.15 * boxes[:, 1, 2:].max(axis=1)).all(), "large and small"


def test_all_else_stays_the_same_to_the_last_bit(edited: Scenes) -> None:
    """Outside of the edited object, before and after, and of the two pixels that halos reach."""
    images, masks = by_scene(edited.images), by_scene(edited.masks)
    for number, edit in enumerate(EDITS):
        changed = (images[:, number] != images[:, 0]).any(axis=-1)
        attribute, _, thing = edit.partition("_")
        if attribute not in ATTRIBUTES:
            assert changed.any(axis=(1, 2)).all() == (edit == "background")
            assert edit == "background" or not changed.any()
            continue
        k = OBJECTS.index(thing)
        assert not (changed & masks[:, 0, 1 - k]).any()
        assert changed.any(axis=(1, 2)).all()
        before, after = by_scene(edited.boxes)[:, 0, k], by_scene(edited.boxes)[:, number, k]
        for scene in range(SCENES):
            allowed = np.zeros((SIDE, SIDE), bool)
            for x, y, w, h in (before[scene], after[scene]):
                if w:  # faint edges of a drawing may lie outside of its mask
                    allowed[max(0, y - 6) : y + h + 6, max(0, x - 6) : x + w + 6] = True
            assert not (changed[scene] & ~allowed).any(), edit


def test_a_turned_hue_is_seen(edited: Scenes) -> None:
    images, masks = by_scene(edited.images).astype(int), by_scene(edited.masks)
    for k, thing in enumerate(OBJECTS):
        gap = np.abs(images[:, EDITS.index(f"recoloured_{thing}")] - images[:, 0]).max(axis=-1)
        means = [gap[scene][masks[scene, 0, k]].mean() for scene in range(SCENES)]
        assert min(means) > 6


# --- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layout": "recognition", "image_size": 300}, "image_size = 300"),
        ({"layout": "recognition", "image_size": 24}, "32"),
        ({"layout": "recognition", "seed": -1}, "seed = -1"),
        ({"layout": "recognition", "variant": "hard"}, "'hard'"),
        ({"layout": "objectness", "train": 5}, "train = 5"),
        ({"layout": "counterfactual", "val": 12}, "multiple of 13"),
        ({"layout": "mixture", "objects": 5}, r"5 objects of up to 28 px do not fit.*1 to 4"),
        ({"layout": "mixture", "objects": 0}, "0 objects"),
        ({"layout": "pairs", "image_size": 32}, "2 objects of up to 14 px do not fit"),
        ({"layout": "pairs", "objects": 3}, "only the layout 'mixture'"),
        ({"layout": "mixture", "name": "scenes"}, "only drawings"),
    ],
)
def test_settings_that_cannot_be_painted(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    spec = spec_of(**settings)
    with pytest.raises(UsageError, match=words):
        painter(spec).paint(spec, "val", [0])
    with pytest.raises(UsageError):
        generate(spec, tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()


def test_a_mixture_has_no_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="in memory"):
        generate(spec_of("mixture"), tmp_path / "x", progress=False)


def test_settings_of_digits_are_what_they_were() -> None:
    assert set(GeneratorSpec(layout="recognition").model_dump(mode="json")) == {
        "name", "layout", "variant", "seed", "image_size", "train", "val",
    }  # fmt: skip
    assert GeneratorSpec(name="drawings", layout="mixture", objects=2).model_dump()["objects"] == 2
