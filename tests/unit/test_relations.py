"""The relations executor: candidates, chunks, a fit that reads plain signs, controls, hard negatives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from comit_bench.data.split import OpenData, Split, Triplets
from comit_bench.errors import CorruptFileError, UsageError
from comit_bench.probing.fit import Examples, MessageSource, build_probe
from comit_bench.probing.pool import ProbePool
from comit_bench.recipes.kinds import NegativesSpec
from comit_bench.recipes.specs import ProbeSpec, TaskSpec
from comit_bench.tasks import contrast
from comit_bench.tasks.base import Inputs, Role
from comit_bench.tasks.contrast import (
    ContrastTask,
    batch_candidates,
    draw_samples,
    hard_candidates,
    ranked,
)
from comit_bench.tasks.negatives import Truth, Words, draw_lists, groups_of, role_table, stored_lists
from comit_bench.tasks.relations import (
    Relations,
    chance_levels,
    chosen_triplets,
    majority_outputs,
    score_outputs,
    standardised,
    vocabulary,
)

OBJECTS = ("ant", "bee", "cat", "dog", "elk", "fox")
PREDICATES = ("left of", "right of", "above")
WORDS = Words(len(OBJECTS), len(PREDICATES))
LEFT, RIGHT = 0, 1


def table_of(count: int, seed: int) -> NDArray[np.int64]:
    """Per image one relation and its mirror: a left of b, b right of a."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(count, len(OBJECTS), generator=generator).argsort(dim=1)[:, :2].numpy()
    image, a, b = np.arange(count), order[:, 0], order[:, 1]
    rows = [
        np.stack([image, a, np.full(count, LEFT), b], 1),
        np.stack([image, b, np.full(count, RIGHT), a], 1),
    ]
    table = np.concatenate(rows)
    return table[np.lexsort(table.T[::-1])]


def role(count: int, seed: int, *, name: str) -> Role:
    """Token 0 shows the object on the left, token 1 the one on the right."""
    table = table_of(count, seed)
    lefts = table[table[:, 2] == LEFT]
    codes = 0.1 * torch.randn(count, 2, len(OBJECTS), generator=torch.Generator().manual_seed(seed + 9))
    codes[lefts[:, 0], 0, lefts[:, 1]] += 1
    codes[lefts[:, 0], 1, lefts[:, 3]] += 1
    ids = tuple(f"{name}/{i:05d}" for i in range(count))
    rows = np.arange(count)
    return Role(
        Split(name, ids, [Path("x")] * count, Triplets(table)), rows, rows, MessageSource(codes=codes)
    )


def recipe(**changes: Any) -> TaskSpec:
    probe = ProbeSpec(
        width=32, depth=2, heads=4, batch_size=32, learning_rate=3e-3, max_epochs=10, patience=10, mlp_ratio=1
    )
    settings: dict[str, Any] = dict(name="r", version=1, title="r", kind="relations", suite="scenes")
    negatives = NegativesSpec(train=3, report=7, predicate=2, swapped=True)
    return TaskSpec(**(settings | {"dataset": "d", "probe": probe, "negatives": negatives} | changes))


def inputs(tmp_path: Path, **changes: Any) -> Inputs:
    roles = {"train": role(300, 0, name="train"), "early_stop": role(60, 1, name="stop")}
    roles["report"] = role(200, 2, name="val")
    splits = {r.split.name: r.split for r in roles.values()}
    prints = {name: f"sha256:{name}" for name in splits}
    data = OpenData(
        "d", 1, OBJECTS, splits, "sha256:0", prints, tmp_path, kind="relations", predicates=PREDICATES
    )
    given: dict[str, Any] = dict(spec=recipe(), data=data, roles=roles, seeds=[0], cache=tmp_path, workers=1)
    return Inputs(**(given | changes))


def contrast_task(**changes: Any) -> ContrastTask:
    roles = {name: role(40, seed, name=name) for seed, name in enumerate(("train", "early_stop", "report"))}
    spec = recipe()
    generator = torch.Generator().manual_seed(5)
    given: dict[str, Any] = {
        "spec": spec.probe.model_copy(update={"max_epochs": 2}),
        "negatives": spec.negatives,
        "words": WORDS,
        **{name: Examples(r.source(), torch.arange(len(r)), r.row_tensor()) for name, r in roles.items()},
        "table": role_table(roles["train"], known=False),
        "known": role_table(roles["train"], known=True),
        "stop_lists": draw_lists(roles["early_stop"], WORDS, spec.negatives).only(range(4)),
        "report_lists": draw_lists(roles["report"], WORDS, spec.negatives),
        "objects": torch.randn(len(OBJECTS), 8, generator=generator),
        "predicates": torch.randn(len(PREDICATES), 8, generator=generator),
    }
    return ContrastTask(**(given | changes))


def test_grouped_probe_equals_repeated_messages_and_its_gradients() -> None:
    for depth in (1, 2, 3):
        spec = ProbeSpec(width=16, depth=depth, heads=2, mlp_ratio=2)
        lean, plain = (build_probe(spec, code_shape=(5, 6), outputs=1, seed=0, extra=(3, 8)) for _ in "ab")
        generator = torch.Generator().manual_seed(1)
        codes = torch.randn(4, 5, 6, generator=generator)
        extra = torch.randn(4, 7, 3, 8, generator=generator)
        grouped = lean.forward_groups(codes, extra)
        repeated = plain(codes.repeat_interleave(7, 0), extra.flatten(0, 1)).unflatten(0, (4, 7))
        torch.testing.assert_close(grouped, repeated, rtol=1e-5, atol=1e-5)
        grouped.square().sum().backward()
        repeated.square().sum().backward()
        for a, b in zip(lean.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


def test_every_role_has_a_projection_of_its_own() -> None:
    probe = build_probe(
        ProbeSpec(width=16, depth=1, heads=2), code_shape=(5, 6), outputs=1, seed=0, extra=(3, 8)
    )
    one = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(1, 3, 8)
    states = probe.embed_extra(one) - probe.type_embed[2:]
    assert not torch.allclose(states[0, 0], states[0, 2])
    assert probe.type_embed.shape[0] == 5


def test_stored_candidates_are_never_true_and_never_twice(tmp_path: Path) -> None:
    spec, images = NegativesSpec(train=3, report=7, predicate=2, per_image=None), role(120, 3, name="val")
    lists, digest = stored_lists(images, WORDS, spec, cache=tmp_path, fingerprint="f")
    truth = Truth(role_table(images, known=True), WORDS)
    assert len(lists.images) == len(images.split.labels.table)  # every true triplet is a sample
    for image, triplets, valid in zip(lists.images, lists.triplets, lists.valid, strict=True):
        assert truth.holds(image, triplets[0])
        negatives = triplets[1:][valid[1:]]
        assert not truth.holds(np.full(len(negatives), image), negatives).any()
        for part in lists.kinds.values():
            numbers = WORDS.number(triplets[part][valid[part]])
            assert len(set(numbers.tolist())) == len(numbers)
        hard = triplets[lists.kinds["predicate"]][valid[lists.kinds["predicate"]]]
        assert (hard[:, [0, 2]] == triplets[0, [0, 2]]).all() and (hard[:, 1] != triplets[0, 1]).all()
        assert (triplets[lists.kinds["swapped"]][0] == triplets[0, ::-1]).all()
    again, same = stored_lists(images, WORDS, spec, cache=tmp_path, fingerprint="f")
    assert same == digest == again.digest()
    (path,) = (tmp_path / "negatives").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match="damaged list"):
        stored_lists(images, WORDS, spec, cache=tmp_path, fingerprint="f")


def check_groups(lists: Any, metric: str) -> None:
    """Every set of candidates has each of them as the true one exactly once."""
    picked = lists.columns()[metric]
    seen: dict[frozenset[int], list[int]] = {}
    for triplets, valid in zip(lists.triplets[:, picked], lists.valid[:, picked], strict=True):
        numbers = WORDS.number(triplets[valid]).tolist()
        seen.setdefault(frozenset(numbers), []).append(numbers[0])
    for candidates, truths in seen.items():
        assert len(truths) % len(candidates) == 0
        assert all(truths.count(one) == len(truths) // len(candidates) for one in candidates)


def uneven_role(count: int, seed: int, *, name: str) -> Role:
    """A world of strong habits: a fifth of all images say the same, the others few things very unevenly."""
    draw = np.random.default_rng(seed)
    share = 1.0 / np.arange(1, 61) ** 1.2
    share[0] = share[1:].sum() / 4
    which = draw.choice(60, count, p=share / share.sum())
    table = np.stack([np.arange(count), which % 6, which // 6 % 3, (which % 6 + 1 + which // 18) % 6], axis=1)
    ids = tuple(f"{name}/{i:05d}" for i in range(count))
    split = Split(name, ids, [Path("x")] * count, Triplets(table))
    return Role(split, np.arange(count), np.arange(count))


def test_whoever_sees_no_image_gains_nothing_however_uneven_the_world_is() -> None:
    images = uneven_role(800, 0, name="val")
    lists = draw_lists(images, WORDS, NegativesSpec(report=15, predicate=2))
    for metric in ("top1@4", "top1@16"):
        check_groups(lists, metric)
    # The best guess there is: how often each triplet is the true one in these very lists.
    numbers = WORDS.number(lists.triplets)
    outputs = torch.from_numpy(
        np.bincount(numbers[:, 0], minlength=WORDS.triplets)[numbers].astype(np.float64)
    )
    found, levels = score_outputs(outputs, lists), chance_levels(lists)
    for metric in ("top1@4", "top1@16"):
        assert 100 * np.nanmean(found[metric]) == pytest.approx(levels[metric], abs=1e-9)
    predicates = lists.triplets[..., 1]
    outputs = torch.from_numpy(np.bincount(predicates[:, 0], minlength=3)[predicates].astype(np.float64))
    found = score_outputs(outputs, lists)
    assert 100 * np.nanmean(found["predicate"]) == pytest.approx(levels["predicate"], abs=1e-9)
    # Drawn as often as they occur, without repetition, negatives would give the common one away.
    table, draw = role_table(images, known=False), np.random.default_rng(0)
    counts = np.bincount(WORDS.number(table[:, 1:]), minlength=WORDS.triplets)
    hits = []
    for own in WORDS.number(table[:, 1:]).tolist():
        others = np.where(np.arange(WORDS.triplets) == own, 0, counts)
        rivals = draw.choice(WORDS.triplets, 15, replace=False, p=others / others.sum())
        hits.append(counts[own] > counts[rivals].max())
    assert 100 * np.mean(hits) > 15  # chance is 6.25


def test_the_blind_row_is_at_chance_in_an_uneven_world(tmp_path: Path) -> None:
    roles = {"train": uneven_role(600, 0, name="train"), "early_stop": uneven_role(150, 1, name="stop")}
    roles["report"] = uneven_role(400, 2, name="val")
    probe = recipe().probe.model_copy(update={"max_epochs": 6, "patience": 6})
    spec = recipe(probe=probe, negatives=NegativesSpec(train=3, report=15, predicate=2))
    given = inputs(tmp_path, spec=spec)
    splits = {r.split.name: r.split for r in roles.values()}
    prints = {name: f"sha256:uneven-{name}" for name in splits}
    data = replace(given.data, splits=splits, fingerprints=prints)
    row = Relations().blind(replace(given, data=data, roles=roles, seeds=[0, 1]))
    for metric in ("top1@4", "top1@16"):
        assert row.metrics[metric].value == pytest.approx(row.metrics[metric].chance, abs=0.5)
    # It did learn what two words have to do with each other, which no choice of negatives hides.
    assert row.metrics["swapped"].value > 60
    assert "early_stop_hard" in row.extra


def test_groups_hold_no_two_that_agree_and_everybody_is_in_one() -> None:
    draw = np.random.default_rng(0)
    said = draw.integers(0, 12, 300).tolist()
    true = [{one, *draw.integers(0, 12, 2).tolist()} for one in said]
    groups = groups_of(said, true, 4)
    assert sorted(n for group in groups for n in group) == list(range(300))
    assert max(map(len, groups)) == 4
    for group in groups:
        for a in group:
            assert all(said[b] not in true[a] for b in group if b != a)
    many = groups_of([7] * 2000, [{7}] * 2000, 4)  # nobody says anything else
    assert [len(group) for group in many] == [1] * 2000


def test_synonyms_say_the_same_so_they_are_no_negatives(tmp_path: Path) -> None:
    given = inputs(tmp_path)
    notes = {"synonyms": {"words": [["dog", "cat"], ["elk", "not in the vocabulary"]], "predicates": []}}
    words = vocabulary(replace(given, data=replace(given.data, notes=notes)))
    assert words.object_sense is not None and words.object_sense.tolist() == [0, 1, 2, 2, 4, 5]
    assert words.predicate_sense is None and vocabulary(given).object_sense is None
    cat, dog = OBJECTS.index("cat"), OBJECTS.index("dog")
    truth = Truth(np.array([[0, cat, LEFT, 0]]), words)
    assert truth.holds(np.array(0), np.array([dog, LEFT, 0])) and words.number(np.array([dog, 0, 1])) == (
        words.number(np.array([cat, 0, 1]))
    )
    images = role(120, 3, name="val")
    spec = NegativesSpec(report=15, predicate=2)
    known = Truth(role_table(images, known=True), words)
    plain, meant = draw_lists(images, WORDS, spec), draw_lists(images, words, spec)

    def false(lists: Any) -> int:
        holds = known.holds(lists.images[:, None], lists.triplets)[:, 1:] & lists.valid[:, 1:]
        return int(holds.sum())

    assert false(plain) > 0 == false(meant)
    batch = draw_samples(role_table(images, known=False), 0, 1)
    for triplets, valid in (
        batch_candidates(batch, known, 5, torch.Generator().manual_seed(0)),
        hard_candidates(batch, known, spec, np.array([9, 9, 1]), torch.Generator().manual_seed(0)),
    ):
        wrong = known.holds(batch[:, :1], triplets) & valid & (triplets != batch[:, None, 1:]).any(-1)
        assert not wrong.any()
    one, other = (
        stored_lists(images, some, spec, cache=tmp_path, fingerprint="f")[1] for some in (WORDS, words)
    )
    assert one != other


def test_hard_negatives_in_training_keep_the_words_and_are_drawn_as_common_as_they_are() -> None:
    table = table_of(2000, 1)
    table[:, 2] = LEFT  # so that every other predicate is false
    truth, batch = Truth(table, WORDS), draw_samples(table, 0, 1)
    spec = NegativesSpec(predicate=1, swapped=True)
    common = np.array([5, 30, 10])
    triplets, valid = hard_candidates(batch, truth, spec, common, torch.Generator().manual_seed(0))
    assert triplets.shape == (2000, 2, 3) and valid[:, 0].all()
    assert (triplets[:, 0, [0, 2]] == batch[:, [1, 3]]).all() and (triplets[:, 0, 1] != LEFT).all()
    share = (triplets[:, 0, 1] == RIGHT).mean()
    assert abs(share - 30 / 40) < 4 * np.sqrt(0.75 * 0.25 / 2000)
    assert (triplets[:, 1] == batch[:, :0:-1]).all()
    assert (valid[:, 1] == ~truth.holds(batch[:, 0], batch[:, :0:-1])).all()
    never = np.array([5, 0, 0])  # other predicates never occur
    assert not hard_candidates(batch, truth, spec, never, torch.Generator().manual_seed(0))[1][:, 0].any()
    none = NegativesSpec(predicate=0, swapped=False)
    assert hard_candidates(batch, truth, none, common, torch.Generator())[0].shape == (2000, 0, 3)


def test_the_fit_stops_by_the_candidates_of_the_main_metric(tmp_path: Path) -> None:
    seen = []

    class Watched(Inputs):
        def fit(self, task: Any) -> Any:
            seen.append(task.stop_lists.valid.shape[1])
            raise InterruptedError

    for metric, count in (("top1@4", 4), ("top1@8", 8), ("swapped", 2)):
        given = inputs(tmp_path, spec=recipe(main_metric=metric))
        watched = Watched(**{name: getattr(given, name) for name in Inputs.__dataclass_fields__})
        with pytest.raises(InterruptedError):
            Relations().run(watched)
        assert seen.pop() == count


def test_lists_of_a_size_that_makes_no_whole_blocks_are_refused() -> None:
    for count in (1, 4, 14):
        with pytest.raises(ValueError, match="report"):
            NegativesSpec(report=count)


def test_what_the_area_filter_dropped_is_no_negative() -> None:
    table = np.array([[0, 0, 0, 1], [1, 2, 0, 3]])
    known = np.concatenate([table, [[0, 2, 0, 3]]])
    split = Split("val", ("a", "b"), [Path("x")] * 2, Triplets(table, known[np.lexsort(known.T[::-1])]))
    two = Role(split, np.arange(2), np.arange(2))
    lists = draw_lists(two, WORDS, NegativesSpec(report=3, per_image=None))
    assert not lists.valid[
        0, lists.kinds["random"]
    ].any()  # the only other triplet is true of image 0 as well
    assert not lists.valid[1, lists.kinds["random"]].any()  # what is lent to nobody borrows from nobody
    plain = replace(split, labels=Triplets(table))
    lists = draw_lists(replace(two, split=plain), WORDS, NegativesSpec(report=3, per_image=None))
    assert lists.valid[:, lists.kinds["random"]].sum(axis=1).tolist() == [1, 1]


def test_lists_of_fewer_images_are_those_of_all() -> None:
    images = role(30, 3, name="val")
    lists = draw_lists(images, WORDS, NegativesSpec(report=7))
    kept = lists.keep(np.array([4, 7, 20]))
    assert kept.images.tolist() == [0, 1, 2]
    assert np.array_equal(kept.triplets, lists.triplets[np.isin(lists.images, [4, 7, 20])])


def test_in_batch_negatives_are_others_and_not_true() -> None:
    table = table_of(64, 1)
    truth, batch = Truth(table, WORDS), draw_samples(table, 0, 1)
    assert sorted(batch[:, 0].tolist()) == list(range(64))
    assert truth.holds(batch[:, 0], batch[:, 1:]).all()
    assert not np.array_equal(batch, draw_samples(table, 0, 2))
    triplets, valid = batch_candidates(batch, truth, 5, torch.Generator().manual_seed(0))
    assert triplets.shape == (64, 6, 3) and (triplets[:, 0] == batch[:, 1:]).all()
    wrong = truth.holds(batch[:, None, 0], triplets[:, 1:]) & valid[:, 1:]
    assert not wrong.any() and valid.sum() > 64
    few, mask = batch_candidates(batch[:2], truth, 5, torch.Generator().manual_seed(0))
    assert few.shape == (2, 2, 3) and mask[:, 0].all()


def test_ties_count_as_a_random_order() -> None:
    logits = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 9]])
    valid = torch.tensor([[True] * 3, [True] * 3, [True] * 3, [True, True, False]])
    loss, right = ranked(logits, valid)
    assert right.tolist() == pytest.approx([1, 1 / 3, 0, 1 / 2])
    assert loss[3].item() == pytest.approx(np.log(2))


def test_chunks_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of equal weights; fits differ as far as Adam blows up the rounding of a sum."""
    found = []
    for tokens in (contrast.CHUNK_TOKENS, 30):  # all at once, one image at a time
        monkeypatch.setattr(contrast, "CHUNK_TOKENS", tokens)
        task = contrast_task()
        fit = contrast._Fit(task, 0, torch.device("cpu"))
        assert (len(fit._chunks(40, 6)) == 1) is (tokens > 30)
        found.append(fit._answers("early_stop", task.stop_lists))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_gradients_of_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one step from equal weights, so that nothing can hide behind an optimiser."""
    found = []
    for tokens in (contrast.CHUNK_TOKENS, 60):
        monkeypatch.setattr(contrast, "CHUNK_TOKENS", tokens)
        task = contrast_task()
        fit = contrast._Fit(
            replace(task, spec=task.spec.model_copy(update={"batch_size": 64})), 0, torch.device("cpu")
        )
        monkeypatch.setattr(fit.optimizer, "step", lambda: None)
        fit.epoch(1)
        found.append([p.grad.clone() for p in fit.probe.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_workers_and_messages_on_disk_give_the_same_numbers() -> None:
    task = contrast_task()
    plain = task.fit(3)
    with ProbePool(2) as pool:
        held = task.held()
        assert held is not None
        by_worker = pool.fit(held, [3, 4])[0]
    codes = task.train.messages.codes
    assert codes is not None
    streamed = replace(
        task,
        train=Examples(
            MessageSource(read=lambda rows: codes[rows], count=40), torch.arange(40), torch.arange(40)
        ),
    )
    for other in (by_worker, streamed.fit(3)):
        assert torch.equal(plain.outputs, other.outputs)  # type: ignore[arg-type]


def test_relations_are_read_and_the_control_lands_at_chance(tmp_path: Path) -> None:
    given = inputs(tmp_path)
    result = Relations().run(given)
    assert list(result.metrics) == ["top1@4", "top1@8", "predicate", "swapped"]
    metrics = result.metrics
    assert metrics["top1@4"].value > 80 and metrics["top1@4"].chance == pytest.approx(25, abs=1)
    assert metrics["top1@8"].value < metrics["top1@4"].value
    assert metrics["top1@8"].chance == pytest.approx(12.5, abs=1)
    assert metrics["swapped"].chance == pytest.approx(50)
    # Seen in training, so that they can be known: predicate and swapped say where things stand.
    assert metrics["predicate"].value > 90 and metrics["swapped"].value > 90
    assert sum(part["n"] for part in result.details["by_predicate"].values()) == metrics["top1@4"].n
    assert metrics["top1@4"].n in (199, 200)  # one may be left alone
    assert result.unconverged == tuple(
        seed for seed, best in zip([0], result.extra["best_epoch"], strict=True) if best == 10
    )
    control = Relations().run(replace(given, control="permute-labels", seeds=[0, 1, 2]))
    metric = control.metrics["top1@4"]
    assert metric.chance is not None and abs(metric.value - metric.chance) < 3 * metric.stderr


def test_outcomes_hold_every_sample_and_what_was_chosen(tmp_path: Path) -> None:
    given = inputs(tmp_path, seeds=[0, 1])
    given = replace(
        given, spec=recipe(probe=given.spec.probe.model_copy(update={"max_epochs": 2})), learning_rates=()
    )
    result = Relations().run(given)
    found = result.outcomes
    assert found is not None and list(found.ids) == list(given.roles["report"].ids) and found.clusters is None
    truth, answers = found.columns["truth"], found.columns["answer"]
    names = {f"{a} {p} {b}" for a in OBJECTS for p in PREDICATES for b in OBJECTS}
    assert set(truth) <= names and len(answers) == 2 and set(answers[0]) <= names
    for seed in range(2):
        values = found.values["top1@4"][seed]
        right = np.array(answers[seed]) == np.array(truth)
        assert (right == (values > 0))[values % 1 == 0].all()  # ties aside
    for name, metric in result.metrics.items():
        values = found.values[name]
        there = np.isfinite(values).all(axis=0)
        assert metric.n == there.sum() and metric.value == pytest.approx(100 * values[:, there].mean())


def test_several_samples_of_an_image_are_one_cluster(tmp_path: Path) -> None:
    spec = recipe(negatives=NegativesSpec(train=3, report=3, predicate=0, swapped=False, per_image=None))
    found = Relations().majority(inputs(tmp_path, spec=spec)).outcomes
    assert found is not None and found.clusters is not None
    assert len(found.ids) == 400 == len(set(found.ids)) and len(set(found.clusters)) == 200
    assert all(name.partition("#")[0] == image for name, image in zip(found.ids, found.clusters, strict=True))


def test_majority_knows_frequencies_only(tmp_path: Path) -> None:
    given = inputs(tmp_path)
    row = Relations().majority(given).metrics
    for name in ("top1@4", "top1@8"):
        assert row[name].value == pytest.approx(row[name].chance)
    # "above" never occurs, so nobody is asked about it
    assert row["predicate"].chance == 50
    assert abs(row["predicate"].value - 50) < 4 * row["predicate"].stderr
    lists = draw_lists(given.roles["report"], WORDS, given.spec.negatives)
    train = np.array([[0, 0, 0, 1], [1, 0, 0, 1], [2, 3, 1, 4]])
    outputs = majority_outputs(train, lists, WORDS)
    assert outputs.shape == lists.triplets.shape[:2]
    first = chosen_triplets(outputs, lists, "top1@8")
    assert first.shape == (len(lists.images), 3)
    assert set(score_outputs(outputs, lists)) == set(chance_levels(lists))


def test_protocol_names_the_encoder_and_the_candidates(tmp_path: Path) -> None:
    protocol = Relations().protocol(inputs(tmp_path))
    assert protocol["text"]["name"] == "random-t5" and protocol["text"]["seed"] == 0
    assert all(value.startswith("sha256:") for value in protocol["negatives"].values())
    other = Relations().protocol(inputs(tmp_path, spec=recipe(negatives=NegativesSpec(train=3, report=11))))
    assert other["negatives"] != protocol["negatives"]


def test_broken_images_leave_their_samples(tmp_path: Path) -> None:
    given = inputs(tmp_path)
    whole = given.roles
    good = np.setdiff1d(np.arange(200), [3, 50])
    fewer = replace(given, roles={**whole, "report": replace(whole["report"], rows=good)}, whole_roles=whole)
    lists, everything = Relations()._lists(fewer, "report"), Relations()._lists(given, "report")
    kept = np.isin(everything.images, good)
    assert len(lists.images) == 198 and np.array_equal(lists.triplets, everything.triplets[kept])
    assert Relations().protocol(given) == Relations().protocol(replace(given, roles=whole))


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="main_metric 'top5' is not measured"):
        Relations().run(inputs(tmp_path, spec=recipe(main_metric="top5")))
    with pytest.raises(UsageError, match="training set has too few images"):
        contrast_task(table=np.zeros((0, 4), np.int64)).fit(0)


def test_standardised_vectors() -> None:
    texts = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)) + 30
    found = standardised(texts)
    assert found.mean(dim=0).abs().max() < 1e-4 and found.square().mean().item() == pytest.approx(1, rel=1e-4)
