"""Counterfactual scenes and token-object assignment: what is painted, known answers, nulls, invariance."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from message_inputs import inputs_of, spec_of, write_recipe

import comit_bench
from comit_bench.data.scenes.digits import ATTRIBUTES, EDITS, OBJECTS, Scenes, paint
from comit_bench.data.scenes.generate import generate, verify
from comit_bench.errors import UsageError
from comit_bench.recipes.kinds import CounterfactualSpec
from comit_bench.recipes.specs import GeneratorSpec
from comit_bench.results.records import load_records
from comit_bench.tasks.changes import (
    Changes,
    Patterns,
    changed_ids,
    information,
    moved_codes,
    object_gaps,
    pair_up,
    permutations_within,
    readout,
    score_groups,
)
from comit_bench.tasks.counterfactual import Counterfactual, assign, summary
from comit_bench.tokenizers.base import TokenizerInfo, Tokens

SCENES = 24
FACTORS = [edit for edit in EDITS if edit not in ("original", "unchanged")]
DIGEST = "sha256:9a159ffe108b649601d0e4bc52b025a4d81ee7570c101a3f9b568ed0d60dbb21"  # 3 scenes, seed 0


def spec_for(scenes: int = SCENES, **settings: Any) -> GeneratorSpec:
    content = {"layout": "counterfactual", "train": 0, "val": scenes * len(EDITS)} | settings
    return GeneratorSpec.model_validate(content)


@pytest.fixture(scope="module")
def painted() -> Scenes:
    return paint(spec_for(), "val", range(SCENES * len(EDITS)))


def by_scene(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, len(EDITS), *values.shape[1:])


def names_of(scenes: int = SCENES) -> list[str]:
    return [f"{edit}/{scene:05d}" for scene in range(scenes) for edit in EDITS]


# --- what is painted --------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("variant", ["default", "hard"])
def test_an_edit_changes_its_half_only(variant: str, side: int) -> None:
    spec = spec_for(variant=variant, image_size=side)
    images = by_scene(paint(spec, "val", range(SCENES * len(EDITS))).images)
    changed = (images != images[:, :1]).any(axis=-1)  # [n, E, S, S]
    for number, edit in enumerate(EDITS):
        left, right = changed[:, number, :, : side // 2], changed[:, number, :, side // 2 :]
        touched = [part.any(axis=(1, 2)).all() for part in (left, right)]
        untouched = [not part.any() for part in (left, right)]
        if edit in ("original", "unchanged"):
            assert untouched == [True, True]
        elif edit == "background":
            assert touched == [True, True]
        else:
            own = OBJECTS.index(edit.split("_")[1])
            assert touched[own] and untouched[1 - own]


def test_exactly_one_thing_is_edited(painted: Scenes) -> None:
    known = {
        "digit": by_scene(painted.digits), "colour": by_scene(painted.colours),
        "box": by_scene(painted.boxes), "mask": by_scene(painted.masks),
        "photo": by_scene(painted.photos), "exemplar": by_scene(painted.exemplars),
    }  # fmt: skip
    may_change = {
        "moved": {"box", "mask"}, "recoloured": {"colour"}, "removed": {"box", "mask"},
        "replaced": {"digit", "exemplar", "box", "mask"},
    }  # fmt: skip
    for number, edit in enumerate(EDITS):
        attribute, _, place = edit.partition("_")
        for name, values in known.items():
            differs = values[:, number] != values[:, 0]
            if name == "photo":
                assert differs.any() == (edit == "background")
                continue
            for thing in range(2):
                allowed = place == OBJECTS[thing] and name in may_change[attribute]
                assert allowed or not differs[:, thing].any(), (edit, name)
    for thing, place in enumerate(OBJECTS):
        assert (
            known["digit"][:, EDITS.index(f"replaced_{place}"), thing] != known["digit"][:, 0, thing]
        ).all()
        assert (
            known["colour"][:, EDITS.index(f"recoloured_{place}"), thing] != known["colour"][:, 0, thing]
        ).all()
        assert not known["mask"][:, EDITS.index(f"removed_{place}"), thing].any()
        assert (known["box"][:, EDITS.index(f"removed_{place}"), thing] == 0).all()
        moved = known["box"][:, EDITS.index(f"moved_{place}"), thing] - known["box"][:, 0, thing]
        assert (np.abs(moved[:, 1]) >= 4).all()  # by a third of the digit's height or more
    assert (known["digit"][:, 0, 0] != known["digit"][:, 0, 1]).all()
    assert (known["colour"][:, 0, 0] != known["colour"][:, 0, 1]).all()


def test_recolouring_and_removing_change_the_object_only(painted: Scenes) -> None:
    """All is the same outside of a recoloured object, or of a removed one and its shadow."""
    images, masks = by_scene(painted.images), by_scene(painted.masks)
    for thing, place in enumerate(OBJECTS):
        mask = masks[:, 0, thing]
        grown, steps = np.pad(mask, ((0, 0), (3, 3), (3, 3))), range(7)
        near = np.stack([grown[:, y : y + 32, x : x + 32] for y in steps for x in steps]).any(axis=0)
        recoloured = (images[:, EDITS.index(f"recoloured_{place}")] != images[:, 0]).any(axis=-1)
        assert not (recoloured & ~near).any()
        assert recoloured[mask].mean() > 0.99
        removed = (images[:, EDITS.index(f"removed_{place}")] != images[:, 0]).any(axis=-1)
        assert removed[mask].mean() > 0.99 and removed.mean() < 0.3


def test_an_image_depends_on_its_number_only(painted: Scenes) -> None:
    for indices in ([7], [40, 3, 22], list(range(11, 33))):
        part = paint(spec_for(), "val", indices)
        np.testing.assert_array_equal(part.images, painted.images[indices])
        np.testing.assert_array_equal(part.masks, painted.masks[indices])


def test_objects_lie_whole_in_their_half(painted: Scenes) -> None:
    boxes = painted.boxes
    there = boxes[..., 2] > 0
    assert (boxes[:, 0, 0] + boxes[:, 0, 2] <= 14).all() and (boxes[:, 1, 0] >= 18)[there[:, 1]].all()
    ends = boxes[..., :2] + boxes[..., 2:]
    assert (ends <= 32).all() and (boxes[..., :2][there] >= 1).all()
    assert (boxes[..., 3][there] >= 9).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"train": 11}, "one split"), ({"val": 12}, "multiple of 11"), ({"image_size": 16}, "32")],
)
def test_settings_that_cannot_be_painted(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        paint(spec_for(**settings), "val", [0])


def test_class_folders_and_digest(tmp_path: Path) -> None:
    spec = spec_for(3)
    digest = generate(spec, tmp_path / "x", progress=False)
    assert digest == verify(tmp_path / "x") == DIGEST
    files = sorted(p.relative_to(tmp_path / "x").as_posix() for p in (tmp_path / "x").rglob("*.png"))
    assert files == sorted(f"val/{name}.png" for name in names_of(3))


# --- the measure ------------------------------------------------------------------------------------


def changes_from(flip: Callable[[int, str, int], bool], length: int, scenes: int = SCENES) -> Any:
    """Pairs and changes of ids that flip where ``flip(scene, edit, position)`` says so."""
    names = names_of(scenes)
    ids = np.zeros((len(names), length), dtype=np.int64)
    for row, name in enumerate(names):
        edit, scene = name.split("/")
        ids[row] = int(scene) * 2 + np.array([flip(int(scene), edit, k) for k in range(length)])
    pairs = pair_up(names)
    return pairs, changed_ids(ids, pairs)


def patterns(table: np.ndarray) -> Patterns:
    """Of changes [n, F, K] of pairs that are all there."""
    change = table.astype(np.float64)
    return Patterns.of(Changes(change, np.ones(table.shape[:2], bool), change[:0, 0]))


def scores_of(flip: Callable[[int, str, int], bool], length: int, scenes: int = SCENES) -> Any:
    return assign(*changes_from(flip, length, scenes), CounterfactualSpec())


def test_a_position_for_every_edit_scores_100() -> None:
    found = scores_of(lambda scene, edit, k: edit in FACTORS and FACTORS.index(edit) == k, len(FACTORS))
    assert {name: score.value for name, score in found.scores.items()} == pytest.approx(
        {"disentanglement": 1.0, "object": 1.0, "attribute": 1.0}
    )
    assert found.readout == 1
    result = summary(found)
    assert result.metrics["disentanglement"].stderr == pytest.approx(0, abs=1e-9)
    assert result.metrics["disentanglement"].chance < 10
    assert result.metrics["changed"].value == pytest.approx(100 / 9)
    assert result.details["specialisation_by_position"] == pytest.approx([100.0] * 9)
    assert result.details["effective_positions_by_edit"] == pytest.approx([1.0] * 9)


def test_a_position_for_every_object_tells_objects_but_no_attribute() -> None:
    found = scores_of(lambda scene, edit, k: edit.endswith(OBJECTS[k]), 2)
    assert found.scores["object"].value == pytest.approx(1)
    assert found.scores["attribute"].value == pytest.approx(0)
    result = summary(found)
    assert result.details["object_share_by_position"] == {"left": [1.0, 0.0], "right": [0.0, 1.0]}
    assert list(result.details["between_objects_by_attribute"].values()) == pytest.approx([100.0] * 4)
    assert result.details["noticed_by_edit"][0] == 0  # nobody noticed the background


def test_a_position_for_every_attribute_tells_attributes_but_no_object() -> None:
    found = scores_of(lambda scene, edit, k: edit.startswith(ATTRIBUTES[k]), 4)
    assert found.scores["attribute"].value == pytest.approx(1)
    assert found.scores["object"].value == pytest.approx(0)


def test_a_hash_of_the_whole_image_is_at_its_null() -> None:
    found = scores_of(lambda scene, edit, k: edit in FACTORS, 16)
    for score in found.scores.values():
        assert score.value == pytest.approx(0, abs=1e-12)
        assert score.chance == pytest.approx(0, abs=1e-12)
    assert found.readout == pytest.approx(1 / 9)
    assert summary(found).metrics["changed"].value == 100


@pytest.mark.parametrize(
    ("rates", "slack"), [([0.3] * 9, 0.0005), ([0.08 + 0.1 * f for f in range(9)], 0.0005)]
)
def test_changes_anywhere_are_at_the_null_however_many_they_are(rates: list[float], slack: float) -> None:
    """How much an edit changes must hardly look like knowing where it does."""
    rng = np.random.default_rng(1)
    gaps = []
    for _ in range(8):
        table = rng.random((60, 9, 16)) < np.array(rates)[None, :, None]
        score = score_groups(patterns(table), [[f] for f in range(9)], draws=32, seed=0)
        gaps.append(score.value - score.chance)
    assert abs(np.mean(gaps)) < slack, gaps


def test_popular_positions_alone_are_at_the_null() -> None:
    """Positions that change with every edit, others that never do."""
    rng = np.random.default_rng(2)
    rate = np.linspace(0, 1, 16) ** 2
    table = rng.random((60, 9, 16)) < rate
    found = scores_of(
        lambda scene, edit, k: edit in FACTORS and bool(table[scene, FACTORS.index(edit), k]), 16, scenes=60
    )
    score = found.scores["disentanglement"]
    assert abs(score.value - score.chance) < 4 * score.null.std()


def test_information_is_mutual_information_of_edit_and_position() -> None:
    profiles = np.random.default_rng(0).dirichlet(np.ones(6), size=4)
    joint = profiles / 4
    expected = (joint * np.log(joint / (joint.sum(0) * 0.25))).sum() / math.log(4)
    assert information(profiles) == pytest.approx(expected)
    assert information(np.ones((3, 5)) / 5) == 0
    assert information(np.zeros((3, 5))) == 0


def test_an_edit_that_changes_nothing_tells_nothing() -> None:
    table = np.zeros((5, 3, 2))
    table[:, 0, 0] = table[:, 1, 1] = 1
    profiles = patterns(table).profiles()
    np.testing.assert_allclose(profiles, [[1, 0], [0, 1], [0.5, 0.5]])
    assert information(profiles) == pytest.approx(2 / 3 * math.log(2) / math.log(3))
    table[0, 0] = 0  # not noticed in one of five scenes
    np.testing.assert_allclose(patterns(table).profiles()[0], [0.8 + 0.2 * 4 / 9, 0.2 * 5 / 9])
    assert not patterns(np.zeros((5, 3, 2))).profiles().any()


def test_fewer_positions_than_edits_bound_the_score() -> None:
    found = scores_of(lambda scene, edit, k: edit in FACTORS and FACTORS.index(edit) % 3 == k, 3)
    assert found.scores["disentanglement"].value == pytest.approx(math.log(3) / math.log(9))
    assert summary(found).details["most_possible"] == pytest.approx(50)


def test_outcomes_are_the_jackknife_and_see_the_spread_over_scenes() -> None:
    """The standard error of a score is the jackknife's, and that of other draws of scenes within a factor."""
    rng = np.random.default_rng(3)
    rate = rng.random((9, 12)) * 0.6
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(30):
        change = (rng.random((40, 9, 12)) < rate).astype(np.float64)
        changes = Changes(change, np.ones((40, 9), bool), change[:0, 0])
        assigned = assign(pair_up(names_of(40)), changes, CounterfactualSpec(null_draws=2))
        result = summary(assigned)
        assert result.outcomes is not None and result.outcomes.ids == assigned.pairs.scenes
        for name, metric in result.metrics.items():
            assert metric.stderr is not None and metric.n == 40
            found.setdefault(name, []).append((metric.value, metric.stderr))
        left_out = assigned.scores["object"].left_out
        jackknife = 100 * math.sqrt(39 / 40 * ((left_out - left_out.mean()) ** 2).sum())
        assert result.metrics["object"].stderr == pytest.approx(jackknife)
        assert result.metrics["object"].value == pytest.approx(100 * assigned.scores["object"].value)
    for name, pairs in found.items():
        values, errors = np.array(pairs).T
        assert np.std(values) == pytest.approx(np.mean(errors), rel=0.4), name


def test_scores_without_a_scene_are_those_of_the_others() -> None:
    table = np.random.default_rng(5).random((6, 9, 8)) < 0.4
    groups = [[f] for f in range(9)]
    score = score_groups(patterns(table), groups, draws=2, seed=0)
    for scene in range(6):
        rest = score_groups(patterns(np.delete(table, scene, axis=0)), groups, draws=2, seed=0)
        assert score.left_out[scene] == pytest.approx(rest.value)


def gaps_by_hand(table: np.ndarray, edits: Sequence[str]) -> list[float]:
    """The object gap of every scene with plain loops, from changes [n, F, K] that all change something."""
    gaps = []
    for scene in table.astype(float):
        same, cross = [], []
        for i, one in enumerate(edits):
            for j, other in enumerate(edits[:i]):
                if "_" not in one or "_" not in other or one.split("_")[0] == other.split("_")[0]:
                    continue
                cosine = scene[i] @ scene[j] / np.linalg.norm(scene[i]) / np.linalg.norm(scene[j])
                (same if one.split("_")[1] == other.split("_")[1] else cross).append(cosine)
        gaps.append(float(np.mean(same) - np.mean(cross)))
    return gaps


def gaps_of(table: np.ndarray) -> np.ndarray:
    """Of changes [n, F, K], edits in the order of ``FACTORS``."""
    pairs = pair_up(names_of(len(table)))
    order = [FACTORS.index(edit) for edit in pairs.edits]
    return object_gaps(patterns(table[:, order]), pairs)


def test_the_object_gap_is_that_of_plain_loops() -> None:
    table = np.random.default_rng(6).random((10, 9, 7)) * (np.arange(9)[:, None] % 2 + 0.1)
    np.testing.assert_allclose(gaps_of(table), gaps_by_hand(table, FACTORS))


@pytest.mark.parametrize(("part", "gap"), [(1, 1.0), (0, 0.0)])
def test_object_gaps_that_are_known(part: int, gap: float) -> None:
    """A position for each object: 1. A position for each attribute: 0, as for a hash of the whole image."""
    known = OBJECTS if part else ATTRIBUTES
    found = scores_of(lambda scene, edit, k: edit.split("_")[part:][:1] == [known[k]], len(known))
    metric = summary(found).metrics["object_gap"]
    assert metric.value == pytest.approx(gap) and metric.chance == 0 and metric.unit == ""
    hashed = summary(scores_of(lambda scene, edit, k: edit in FACTORS, 16)).metrics["object_gap"]
    assert hashed.value == pytest.approx(0)


def test_the_object_gap_has_chance_0_when_names_are_permuted() -> None:
    """Objects with positions of their own, some edits unnoticed: 0 in the mean."""
    rng = np.random.default_rng(7)
    pairs = pair_up(names_of(40))
    left = np.array([edit.endswith("left") for edit in pairs.edits])
    table = rng.random((40, 9, 10)) < np.where(left[:, None] == (np.arange(10) < 5), 0.5, 0.05)
    table[rng.random((40, 9)) < 0.1] = False
    change = table.astype(np.float64)
    seen = Patterns.of(Changes(change, np.ones((40, 9), bool), change[:0, 0]))
    assert np.mean(object_gaps(seen, pairs)) > 0.2
    inside = [f for f, edit in enumerate(pairs.edits) if "_" in edit]
    drawn = []
    for order in permutations_within(40, len(inside), 400, 0):
        whole = np.tile(np.arange(9), (40, 1))
        whole[:, inside] = np.array(inside)[order]
        drawn.append(np.mean(object_gaps(seen.permuted(whole), pairs)))
    assert abs(np.mean(drawn)) < 4 * np.std(drawn) / math.sqrt(400) < 0.01


def test_scenes_without_pairs_of_both_sorts_have_no_gap() -> None:
    names = [name for name in names_of(5) if not (name.endswith("00002") and "right" in name)]
    pairs = pair_up(names)
    ids = np.random.default_rng(8).integers(0, 2, (len(names), 6))
    result = summary(assign(pairs, changed_ids(ids, pairs), CounterfactualSpec(null_draws=2)))
    assert result.outcomes is not None and result.metrics["object_gap"].n == 4
    assert np.isnan(result.outcomes.values["object_gap"][0]).tolist() == [False, False, True, False, False]
    still = np.zeros_like(ids)  # nobody notices anything: at chance, not left out
    quiet = summary(assign(pairs, changed_ids(still, pairs), CounterfactualSpec(null_draws=2)))
    assert quiet.metrics["object_gap"].value == 0 and quiet.metrics["object_gap"].n == 4


def test_readout_is_that_of_a_plain_loop() -> None:
    rng = np.random.default_rng(4)
    known = patterns(rng.random((15, 4, 6)) < 0.2 + 0.5 * np.eye(4, 6))
    share, active = known.share, known.active
    assert not active.all()
    hits: list[list[float]] = [[] for _ in range(4)]
    for scene in range(15):
        for edit in range(4):
            if not active[scene, edit]:
                continue
            gaps = []
            for other in range(4):
                rest = [i for i in range(15) if active[i, other] and not (other == edit and i == scene)]
                gaps.append(((share[scene, edit] - share[rest, other].mean(axis=0)) ** 2).sum())
            hits[edit].append(float(np.argmin(gaps) == edit))
    assert readout(known) == pytest.approx(np.mean([np.mean(one) for one in hits]))
    assert 0.4 < readout(known) < 1


def test_pairs_that_are_not_there_are_left_out() -> None:
    names = [
        name for name in names_of(10) if name not in ("moved_left/00003", "original/00007", "unchanged/00001")
    ]
    pairs = pair_up(names)
    assert len(pairs.scenes) == 9 and "00007" not in pairs.scenes
    assert (pairs.edited < 0).sum() == 1 and (pairs.unchanged < 0).sum() == 1
    ids = np.arange(len(names))[:, None].repeat(4, axis=1)
    changes = changed_ids(ids, pairs)
    assert changes.present.sum() == 80 and changes.change[changes.present].all()
    assert not changes.change[~changes.present].any() and changes.floor.shape == (8, 4)
    result = summary(assign(pairs, changes, CounterfactualSpec(null_draws=4)))
    assert result.outcomes is not None and len(result.outcomes.ids) == 9
    assert np.isnan(result.outcomes.columns["changed/moved_left"]).tolist() == [i == 3 for i in range(9)]
    assert result.metrics["changed"].value == 100 == result.metrics["changed"].chance


@pytest.mark.parametrize("kept", ["original", "moved_left", "none"])
def test_too_few_images(kept: str) -> None:
    names = [name for name in names_of(4) if name.startswith((kept, "unchanged"))]
    with pytest.raises(UsageError, match="larger --limit"):
        pair_up(names)
    with pytest.raises(UsageError, match="moved_left"):
        pair_up([*(n for n in names_of(4) if not n.startswith("moved_left")), "moved_left/99999"])


def test_distances_of_codes_have_a_unit() -> None:
    generator = torch.Generator().manual_seed(0)
    names = names_of(200)
    codes = torch.randn(len(names), 3, 5, generator=generator).numpy() * np.array([1, 10, 0.0])[:, None]
    pairs = pair_up(names)
    changes = moved_codes(codes.astype(np.float32), pairs)
    rms = np.sqrt((changes.change**2).mean(axis=(0, 1)))
    assert rms == pytest.approx([1, 1, 0], abs=0.05)  # as far as two originals are apart
    same = codes[pairs.original][:, None].repeat(len(EDITS), axis=1)
    assert not moved_codes(same.reshape(codes.shape).astype(np.float32), pair_up(names)).change.any()


def test_a_position_that_never_varies_has_the_unit_of_the_others() -> None:
    names = names_of(5)
    codes = np.zeros((len(names), 2, 1), np.float32)
    codes[:, 0, 0] = [int(name[-1]) for name in names]
    codes[[n.startswith("removed") for n in names], 1, 0] = 1
    changes = moved_codes(codes, pair_up(names))
    removed = [f for f, edit in enumerate(sorted(FACTORS)) if edit.startswith("removed")]
    assert np.isfinite(changes.change).all() and (changes.change[:, removed, 1] > 0).all()


# --- from images ------------------------------------------------------------------------------------


class _Seeing:
    """Reads colour, digit, place and presence off the painter's notes: one position for each thing."""

    def __init__(self, painted: Scenes, mode: str) -> None:
        self.mode = mode
        self.known = {
            painted.images[i].tobytes(): self._values(painted, i) for i in range(len(painted.images))
        }
        length = 16 if mode == "hash" else 9
        self.info = TokenizerInfo(
            name=f"seeing-{mode}", family="seeing", kind="learned", weights=f"fitted:{mode}", parameters=0,
            message_length=length, vocab_size=1 << 15, code_dim=2, resolution=32,
            preprocessing="center_crop|resize(32,bilinear)",
        )  # fmt: skip

    def _values(self, painted: Scenes, i: int) -> list[int]:
        values = []
        base = i // len(EDITS) * len(EDITS)
        for thing in range(2):
            there = bool(painted.masks[i, thing].any())
            moved = EDITS[i % len(EDITS)] == f"moved_{OBJECTS[thing]}"
            place = painted.boxes[i if moved else base, thing, :2].tolist()
            values += [int(there), int(painted.colours[i, thing]), int(painted.digits[i, thing])]
            values += [int(place[0]) * 32 + int(place[1])]
        photo = hashlib.sha256(painted.photos[i].tobytes()).digest()
        return [*values, int.from_bytes(photo[:2], "big") % (1 << 15)]

    def encode(self, images_u8: torch.Tensor, *, policy: Any = None, generators: Any = None) -> Tokens:
        rows = []
        for image in images_u8:
            pixels = np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())
            if self.mode == "hash":
                digest = hashlib.sha256(pixels.tobytes()).digest()
                rows.append(np.frombuffer(digest, "<u2").astype(np.int64) % (1 << 15))
            else:
                rows.append(np.array(self.known[pixels.tobytes()]))
        ids = torch.from_numpy(np.stack(rows)).long()
        return Tokens(ids, self.codes_from_ids(ids))

    def codes_from_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([ids.remainder(181), ids.div(181, rounding_mode="floor")], dim=-1).float()

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> torch.Tensor:
        raise NotImplementedError


def test_tokenizers_with_known_answers(tmp_path: Path, painted: Scenes) -> None:
    write_recipe(tmp_path / "recipes", "counterfactual", "counterfactual", SCENES * len(EDITS))
    found = {}
    for mode in ("parts", "hash"):
        records = comit_bench.evaluate(
            [_Seeing(painted, mode)], ["small"], include=(tmp_path / "recipes",),
            cache=tmp_path / "cache", output=tmp_path / mode, device="cpu",
        )  # fmt: skip
        (record,) = (r for r in records if r.tokenizer.name.startswith("seeing"))
        found[mode] = record
    parts, hashed = found["parts"].metrics, found["hash"].metrics
    assert [parts[name].value for name in ("disentanglement", "object", "attribute")] == pytest.approx(
        [100] * 3
    )
    assert found["parts"].details["noticed_by_edit"] == [100.0] * 9
    for name in ("disentanglement", "object", "attribute"):
        assert hashed[name].value - (hashed[name].chance or 0) < 0.1
    assert hashed["changed"].value > 99.9


def test_from_images_to_a_record_for_any_batch(tmp_path: Path) -> None:
    write_recipe(tmp_path / "recipes", "counterfactual", "counterfactual", 8 * len(EDITS))
    found = {}
    for batch in (7, 64):
        found[batch] = comit_bench.evaluate(
            ["comit-nano", "pixel-oracle", "kmeans-patch"], ["small"], include=(tmp_path / "recipes",),
            cache=tmp_path / str(batch), output=tmp_path / str(batch), batch_size=batch, device="cpu",
        )  # fmt: skip
    metrics = {b: {r.tokenizer.name: r.metrics for r in records} for b, records in found.items()}
    assert metrics[7] == metrics[64]
    assert set(metrics[7]) == {"comit-nano", "pixel-oracle"}  # kmeans-patch has nothing to be fitted on
    oracle = metrics[7]["pixel-oracle"]
    assert oracle["object"].value == pytest.approx(100)  # patches lie in one half
    assert oracle["changed"].chance == 0
    (record,) = (
        r for r in load_records(tmp_path / "7" / "records", strict=True) if "nano" in r.tokenizer.name
    )
    assert record.details["edits"] == sorted(FACTORS)
    assert len(record.details["profile"]) == 9 and len(record.details["profile"][0]) == 16
    assert set(record.details["by_distance_of_codes"]) == {"disentanglement", "object", "attribute"}
    assert record.metrics["disentanglement"].n == 8


def test_the_order_of_images_does_not_matter() -> None:
    names = names_of(12)
    ids = torch.randint(0, 3, (len(names), 6), generator=torch.Generator().manual_seed(0))
    codes = torch.randn(len(names), 6, 2, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(2))
    results = []
    for rows in (torch.arange(len(names)), order):
        inputs = inputs_of(
            spec_of("counterfactual"), codes[rows], np.zeros(len(names)), EDITS, ids=ids[rows], vocab=3,
            names=tuple(names[i] for i in rows.tolist()),
        )  # fmt: skip
        results.append(Counterfactual().run(inputs))
    assert all(result is not None for result in results)
    for one, other in pairwise(results):
        assert one.metrics == other.metrics and one.details == other.details


def test_continuous_messages_and_a_wrong_main_metric() -> None:
    names = tuple(names_of(6))
    codes = torch.randn(len(names), 4, 2, generator=torch.Generator().manual_seed(1))
    inputs = inputs_of(spec_of("counterfactual"), codes, np.zeros(len(names)), EDITS, names=names)
    result = Counterfactual().run(inputs)
    assert result is not None and "by_distance_of_codes" not in result.details
    assert isinstance(changed_ids(np.zeros((len(names), 4), np.int64), pair_up(names)), Changes)
    wrong = inputs_of(
        spec_of("counterfactual", main_metric="objekt"), codes, np.zeros(len(names)), EDITS, names=names
    )
    with pytest.raises(UsageError, match="object"):
        Counterfactual().run(wrong)
