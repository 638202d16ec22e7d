"""Objectness: overlap by hand, maps that are known, the null model, invariance, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from comit_bench.commands import app as cli
from comit_bench.data.images import header_size, mask_of
from comit_bench.data.split import OpenData, PathList, Split
from comit_bench.errors import CorruptFileError, MissingError, UsageError
from comit_bench.metrics.overlap import (
    best_threshold,
    enlarge,
    most_possible,
    on_grid,
    overlaps,
    pixels_kept,
    shifted,
)
from comit_bench.nn.attention import AttentionRequest
from comit_bench.nn.ranks import Ranks
from comit_bench.recipes.kinds import ObjectnessSpec
from comit_bench.recipes.specs import TaskSpec
from comit_bench.results.records import load_records
from comit_bench.tasks import shards
from comit_bench.tasks.base import Inputs, Role
from comit_bench.tasks.objectness import Objectness, derangement, resolve_layers
from comit_bench.tasks.result import Result
from comit_bench.tokenizers.base import TileReceiver, TokenizerInfo, Tokens, attention_in_tiles

SIDE = 32
LAYERS = 3

# ---------------------------------------------------------------- overlap


def test_overlap_by_hand() -> None:
    values = torch.arange(16.0).reshape(1, 4, 4)  # the largest are at the bottom right
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[2:, 2:] = True  # values 10, 11, 14, 15
    found = overlaps(values, mask, (10, 25, 50, 99), resize="bilinear")[:, 0]
    # 10 % of 16 is 2 pixels: {15, 14}; 25 %: {15..12}; 50 %: {15..8}; 99 %: all 16
    assert found.tolist() == [2 / 4, 2 / 6, 4 / 8, 4 / 16]
    one = overlaps(values.flip(1, 2), mask, (10,), resize="bilinear")
    assert one.item() == 0.0


def test_equal_values_never_change_the_number_of_pixels() -> None:
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0] = True
    flat = torch.zeros(2, 4, 4)
    flat[1, 3, 3] = 1.0
    found = overlaps(flat, mask, (25, 50), resize="nearest")
    # reading order: a flat map keeps its first 4 (or 8) pixels; one pixel that stands out is kept before them
    assert found[:, 0].tolist() == [1.0, 4 / 8]
    assert found[:, 1].tolist() == [3 / 5, 4 / 8]


@pytest.mark.parametrize("distinct", [2, 5, 1000])
def test_overlap_equals_the_definition(distinct: int) -> None:
    rng = np.random.default_rng(distinct)
    maps = rng.integers(0, distinct, (20, 6, 6)).astype(np.float32)
    mask = rng.random((6, 6)) < 0.3
    for share in (1, 10, 33, 90, 99):
        found = overlaps(torch.from_numpy(maps), torch.from_numpy(mask), (share,), resize="bilinear")[0]
        for row, one in enumerate(maps):
            kept = np.zeros(36, dtype=bool)
            kept[np.argsort(-one.flatten(), kind="stable")[: pixels_kept(share, 36)]] = True
            both, either = (kept & mask.flatten()).sum(), (kept | mask.flatten()).sum()
            assert found[row].item() == pytest.approx(both / either, abs=1e-12)


def test_maps_are_enlarged_to_the_mask() -> None:
    small = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
    assert enlarge(small, 4, "nearest")[0].tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2
    assert enlarge(small, 4, "bilinear")[0, 0].tolist() == [0.0, 0.25, 0.75, 1.0]
    assert not torch.equal(enlarge(small, 4, "bicubic"), enlarge(small, 4, "bilinear"))
    with pytest.raises(ValueError, match="not finite"):
        overlaps(
            torch.full((1, 2, 2), torch.nan), torch.ones(4, 4, dtype=torch.bool), (10,), resize="nearest"
        )


def test_blobs_keep_values_and_neighbours() -> None:
    maps = torch.arange(2 * 3 * 20.0).reshape(2, 3, 4, 5)  # 2 heads, 3 tokens
    moved = shifted(maps, torch.Generator().manual_seed(0))
    assert torch.equal(moved.flatten(2).sort().values, maps.flatten(2))
    tries = [shifted(maps[0], torch.Generator().manual_seed(s)) for s in range(200)]
    assert len({tuple(t[0].flatten().tolist()) for t in tries}) == 20  # every place, nothing else
    assert torch.equal(moved[1] - maps[1], moved[0] - maps[0])  # heads of a token move together
    assert len({tuple((moved[0, k] - maps[0, k]).flatten().tolist()) for k in range(3)}) > 1  # tokens do not
    rolled = {
        tuple(torch.roll(maps[0, 0], (d, r), (0, 1)).flatten().tolist()) for d in range(4) for r in range(5)
    }
    assert {tuple(t[0].flatten().tolist()) for t in tries} == rolled


def test_no_map_reaches_more_than_the_most_possible() -> None:
    rng = np.random.default_rng(0)
    shares = (5, 10, 30, 90)
    for count in (1, 40, 102, 500, 1024):
        mask = np.zeros(SIDE * SIDE, dtype=bool)
        mask[rng.permutation(SIDE * SIDE)[:count]] = True
        target = torch.from_numpy(mask.reshape(SIDE, SIDE))
        limit = most_possible(count, SIDE, shares)
        assert limit == pytest.approx(overlaps(target.float()[None], target, shares, resize="nearest")[:, 0])
        maps = torch.rand(50, SIDE, SIDE) + 0.5 * target  # they know something
        assert (overlaps(maps, target, shares, resize="nearest").numpy() <= np.array(limit)[:, None]).all()


@pytest.mark.parametrize("resize", ["nearest", "bilinear"])
def test_the_mask_on_the_grid_of_the_maps(resize: str) -> None:
    mask = torch.from_numpy(squares(1, side=11, seed=4)[0])
    itself = on_grid(mask, 8, 8)
    blocks = mask.reshape(8, 4, 8, 4).double().mean(dim=(1, 3))
    assert torch.equal(itself.double(), blocks)
    best, values = 0.0, enlarge(itself[None], SIDE, resize)[0]
    for threshold in values.unique():
        kept = values >= threshold
        best = max(best, float((kept & mask).sum() / (kept | mask).sum()))
    assert best_threshold(itself, mask, resize=resize) == pytest.approx(best)
    assert 0.5 < best < 1
    assert best_threshold(on_grid(mask, SIDE, SIDE), mask, resize=resize) == 1


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_everybodys_maps_are_used_once_and_by_another_image(count: int) -> None:
    ids = [f"{i:04d}" for i in range(count)]
    drawn = [derangement(ids, 0, draw) for draw in range(6)]
    for partner in drawn:
        assert sorted(partner.tolist()) == list(range(count))
        assert count == 1 or (partner != np.arange(count)).all()
    np.testing.assert_array_equal(drawn[0], derangement(ids, 0, 0))
    order = np.random.default_rng(0).permutation(count)
    names = derangement([ids[i] for i in order], 0, 0)  # it belongs to the ids, not to their order
    assert [order[names[np.flatnonzero(order == i)[0]]] for i in range(count)] == drawn[0].tolist()
    if count > 2:
        assert any((one != drawn[0]).any() for one in [*drawn[1:], derangement(ids, 1, 0)])


def test_layers_of_a_recipe() -> None:
    assert [resolve_layers([0.857], depth)[0][0] for depth in (28, 24, 12, 8, 4, 3)] == [23, 20, 9, 6, 2, 2]
    assert resolve_layers([0.857, 0, 1, 2, 3, -1], 3) == ((2, 0, 1), (3,))
    assert resolve_layers([0.01], 4)[0] == (0,)


# ---------------------------------------------------------------- masks


def save_mask(path: Path, values: np.ndarray[Any, Any]) -> Path:
    Image.fromarray(values).save(path)
    return path


def load_mask(path: Path, preprocessing: str, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """The mask through the steps of a photograph of ``size``."""
    photo = path.parent / "photo.png"
    Image.new("RGB", size).save(photo)
    return mask_of(photo, path, preprocessing)[0]


def test_masks_pass_through_the_crop_of_their_image(tmp_path: Path) -> None:
    wide = np.zeros((8, 12), dtype=np.uint8)
    wide[:, :2] = 255  # cut off by the centre crop
    wide[2:4, 4:8] = 255
    path = save_mask(tmp_path / "m.png", wide)
    found = load_mask(path, "center_crop|resize(4,bilinear)", (12, 8))
    assert found.dtype == np.bool_ and found.astype(int).tolist() == [[0] * 4, [0, 1, 1, 0], [0] * 4, [0] * 4]
    assert load_mask(path, "center_crop(16)", (12, 8)).sum() == wide.astype(bool).sum()  # black border
    soft = np.array([[127, 128], [0, 255]], dtype=np.uint8)
    for mask in (soft, np.stack([soft] * 3, axis=-1)):
        assert load_mask(save_mask(path, mask), "resize(2,lanczos)", (2, 2)).tolist() == [[False, True]] * 2


def test_a_mask_of_another_size_than_its_image(tmp_path: Path) -> None:
    half = np.zeros((4, 6), dtype=np.uint8)
    half[1:2, 2:4] = 255
    path = save_mask(tmp_path / "m.png", half)
    found = load_mask(path, "center_crop|resize(4,bilinear)", (12, 8))
    assert found.astype(int).tolist() == [[0] * 4, [0, 1, 1, 0], [0] * 4, [0] * 4]
    with pytest.raises(CorruptFileError, match="6 x 4 pixels does not fit its image of 8 x 12"):
        load_mask(path, "center_crop|resize(4,bilinear)", (8, 12))
    with pytest.raises(MissingError, match=r"gone\.png"):
        load_mask(tmp_path / "gone.png", "resize(4,bilinear)", (4, 4))
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(CorruptFileError, match="bad"):
        load_mask(tmp_path / "bad.png", "resize(4,bilinear)", (4, 4))
    with pytest.raises(CorruptFileError, match="bad"):
        header_size(tmp_path / "bad.png")
    assert header_size(path) == (6, 4)


# ---------------------------------------------------------------- a benchmark of known maps


@dataclass
class Store:
    """Message number i is the number i."""

    count: int
    layout: Any = field(default_factory=lambda: SimpleNamespace(vocab_size=None))

    def offsets(self, rows: Any) -> None:
        return None

    def codes(self, rows: Any) -> Any:
        return np.asarray(rows, dtype=np.float32)[:, None, None]


@dataclass
class Fake:
    """Hands out maps [layers, times, n, H, K, h, w] that the test has made."""

    maps: Tensor
    times: tuple[float, ...] = (0.0, 0.5)
    calls: int = 0

    @property
    def info(self) -> TokenizerInfo:
        return TokenizerInfo(
            name="fake",
            family="fake",
            kind="learned",
            weights="none",
            parameters=0,
            message_length=self.maps.shape[4],
            vocab_size=None,
            code_dim=1,
            resolution=SIDE,
            preprocessing=f"center_crop|resize({SIDE},bilinear)",
        )

    @property
    def attention_layers(self) -> int:
        return self.maps.shape[0]

    def attention_times(self, times: Sequence[float]) -> tuple[float, ...]:
        return tuple(times) if self.times else ()

    def attention(
        self, tokens: Tokens, request: AttentionRequest, receive: TileReceiver, *, seeds: Sequence[int]
    ) -> None:
        self.calls += len(seeds)

        def tile(codes: Tensor, hand_on: Any) -> None:
            for time in range(max(1, len(self.attention_times(request.times)))):
                for number, layer in enumerate(request.layers):
                    hand_on(number, time, self.maps[layer, time, codes[:, 0, 0].long()])

        attention_in_tiles(tile, receive, tokens.codes)


def make_inputs(
    tmp_path: Path,
    masks: np.ndarray[Any, Any],
    fake: Fake,
    spec: dict[str, Any] | None = None,
    **more: Any,
) -> Inputs:
    names = [f"{i:04d}" for i in range(len(masks))]
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir(exist_ok=True)
    for name, mask in zip(names, masks, strict=True):
        if not (tmp_path / "masks" / f"{name}.png").exists():
            save_mask(tmp_path / "masks" / f"{name}.png", mask.astype(np.uint8) * 255)
            Image.new("RGB", mask.shape[::-1]).save(tmp_path / "images" / f"{name}.png")
    paths = [PathList(tmp_path / f, tuple(f"{n}.png" for n in names)) for f in ("images", "masks")]
    split = Split("val", tuple(names), *paths)
    rows = np.arange(len(masks))
    role = Role(split, rows, rows, store=Store(len(masks)))  # type: ignore[arg-type]
    task = TaskSpec(
        name="tiny",
        version=1,
        title="t",
        kind="objectness",
        suite="scenes",
        dataset="tiny",
        main_metric=more.pop("main_metric", "miou_top10"),
        objectness=ObjectnessSpec(**{"layers": (0,), "times": (0.5,), **(spec or {})}),
    )
    data = OpenData("tiny", 1, (), {"val": split}, "sha256:0", {}, tmp_path, kind="masks")
    given = {"seeds": [0], "cache": tmp_path, "tokenizer": fake, **more}
    return Inputs(spec=task, data=data, roles={"report": role}, **given)


def squares(count: int, side: int = 10, seed: int = 0) -> np.ndarray[Any, Any]:
    """One square at a random place per image."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, SIDE, SIDE), dtype=bool)
    for mask in masks:
        y, x = rng.integers(0, SIDE - side, 2)
        mask[y : y + side, x : x + side] = True
    return masks


def smooth(count: int, tokens: int, heads: int = 2, layers: int = 1, times: int = 1, seed: int = 0) -> Tensor:
    """Random smooth fields on a torus: rolling them changes nothing about their distribution."""
    g = torch.Generator().manual_seed(seed)
    fields = torch.randn(layers, times, count, heads, tokens, 16, 16, generator=g)
    frequency = torch.fft.fftfreq(16)
    damp = torch.exp(-60 * (frequency[:, None] ** 2 + frequency[None] ** 2))
    return torch.fft.ifft2(torch.fft.fft2(fields) * damp).real.contiguous()


def run(inputs: Inputs) -> Result:
    result = Objectness().run(inputs)
    assert result is not None
    return result


def test_maps_that_are_the_mask(tmp_path: Path) -> None:
    """100 of 1024 pixels are object; token 1 knows them, token 0 knows nothing and is flat."""
    masks = squares(5)
    maps = torch.zeros(1, 1, 5, 1, 2, SIDE, SIDE)
    maps[0, 0, :, 0, 1] = torch.from_numpy(masks).float()
    result = run(make_inputs(tmp_path, masks, Fake(maps), {"shares": (5, 10, 20)}))
    # the top 5 % are 51 pixels, all inside; 10 % are 102: all 100 and two more; 20 % are 205
    assert {name: m.value for name, m in result.metrics.items() if name.startswith("miou")} == pytest.approx(
        {"miou_top5": 51 / 100, "miou_top10": 100 / 102, "miou_top20": 100 / 205}
    )
    assert result.metrics["miou_top10"].stderr == pytest.approx(0) and result.metrics["miou_top10"].n == 5
    assert result.metrics["miou_top10"].unit == ""
    outcomes = result.outcomes
    assert outcomes is not None and outcomes.columns["best_token"].tolist() == [[1] * 5]
    assert outcomes.ids == [f"{i:04d}" for i in range(5)]
    details = result.details["objectness"]
    flat = [
        float(overlaps(torch.zeros(1, 4, 4), torch.from_numpy(m), (10,), resize="nearest")) for m in masks
    ]
    want = (100 / 102 + np.mean(flat)) / 2
    assert details["mean_over_tokens"]["top10"]["value"] == pytest.approx(want)
    assert details["best_head"]["top10"]["value"] == pytest.approx(100 / 102)
    gain = result.metrics["gain_top10"]
    assert gain.value == pytest.approx(100 / 102 - result.metrics["miou_top10"].chance)  # type: ignore[operator]
    assert gain.value > 0.5 and details["images"]["mean_object_share"] == pytest.approx(100 / 1024)
    # these maps are the mask at its own resolution: they reach all that can be reached
    attainable = details["attainable"]
    assert attainable["best_threshold"] == 1
    for share in (5, 10, 20):
        limit = pytest.approx(result.metrics[f"miou_top{share}"].value)
        assert attainable[f"top{share}"] == {"any_map": limit, "mask_as_map": limit}
    assert "0.98 by any map" in result.extra["attainable"]


def test_heads_are_averaged_and_the_best_head_is_another_number(tmp_path: Path) -> None:
    masks = squares(3)
    maps = torch.zeros(1, 1, 3, 2, 1, SIDE, SIDE)
    maps[0, 0, :, 0, 0] = torch.from_numpy(masks).float()
    maps[0, 0, :, 1, 0] = -2 * torch.from_numpy(masks).float()  # the mean avoids the object
    result = run(make_inputs(tmp_path, masks, Fake(maps), {"shares": (10,)}))
    assert result.metrics["miou_top10"].value == 0
    assert result.details["objectness"]["best_head"]["top10"]["value"] == pytest.approx(100 / 102)


def test_the_null_models_give_what_chance_gives(tmp_path: Path) -> None:
    """Maps that know nothing: metric, chance level and rolled null agree within three standard errors."""
    masks = squares(128)
    result = run(make_inputs(tmp_path, masks, Fake(smooth(128, 8)), {"null_draws": 4}))
    details = result.details["objectness"]
    for share in (10, 20, 30, 40):
        metric = result.metrics[f"miou_top{share}"]
        assert metric.stderr is not None and metric.chance is not None
        assert abs(metric.value - metric.chance) < 3 * metric.stderr
        assert metric.chance > 0.12  # the best of eight is far above the mean over tokens
        rolled = details["null_rolled"][f"top{share}"]
        assert abs(metric.value - rolled["value"]) < 3.5 * metric.stderr
        assert details["gain_over_rolled"][f"top{share}"]["value"] == pytest.approx(
            metric.value - rolled["value"]
        )
    gain = result.metrics["gain_top10"]
    assert gain.chance == 0 and gain.stderr is not None and abs(gain.value) < 3 * gain.stderr
    for name in ("best_head", "mean_over_tokens"):
        for entry in details[name].values():
            assert abs(entry["value"] - entry["chance"]) < 3.5 * entry["stderr"]


def test_the_null_is_the_maps_of_other_images_by_hand(tmp_path: Path) -> None:
    masks, maps = squares(9), smooth(9, 3)
    result = run(make_inputs(tmp_path, masks, Fake(maps), {"shares": (10, 30), "null_draws": 2}))
    ids = [f"{i:04d}" for i in range(9)]
    want = np.zeros((2, 9))
    for draw in range(2):
        for image, other in enumerate(derangement(ids, 0, draw)):
            mean = maps[0, 0, other].mean(dim=0)
            found = overlaps(mean, torch.from_numpy(masks[image]), (10, 30), resize="bilinear")
            want[:, image] += found.max(dim=1).values.numpy() / 2
    outcomes = result.outcomes
    assert outcomes is not None
    for row, share in zip(want, (10, 30), strict=True):
        np.testing.assert_allclose(outcomes.columns[f"null_other_top{share}"][0], row)
        assert result.metrics[f"miou_top{share}"].chance == pytest.approx(row.mean())
    gain = outcomes.values["gain_top10"]
    np.testing.assert_allclose(gain, outcomes.values["miou_top10"] - want[:1])
    assert result.metrics["gain_top10"].stderr == pytest.approx(gain.std(ddof=1) / 3)


def test_maps_that_share_a_place_gain_nothing(tmp_path: Path) -> None:
    """All objects are in the middle and so are all maps: far above rolled maps, not above other images'."""
    masks = np.zeros((20, SIDE, SIDE), dtype=bool)
    masks[:, 10:22, 10:22] = True
    maps = smooth(20, 4) * 0.01 + torch.from_numpy(masks[:, ::2, ::2]).float()[None, None, :, None, None]
    result = run(make_inputs(tmp_path, masks, Fake(maps)))
    details, metric = result.details["objectness"], result.metrics["miou_top10"]
    assert metric.chance == pytest.approx(metric.value, abs=0.02)
    assert result.metrics["gain_top10"].value == pytest.approx(0, abs=0.02)
    assert details["gain_over_rolled"]["top10"]["value"] > 0.2


def test_maps_that_always_look_elsewhere_gain_nothing(tmp_path: Path) -> None:
    """All objects in the middle, all maps in a corner: below rolled maps, which is no loss of knowledge."""
    masks = np.zeros((20, SIDE, SIDE), dtype=bool)
    masks[:, 10:22, 10:22] = True
    corner = torch.zeros(20, 16, 16)
    corner[:, :5, :5] = 1
    maps = smooth(20, 4) * 0.01 + corner[None, None, :, None, None]
    result = run(make_inputs(tmp_path, masks, Fake(maps)))
    assert result.metrics["gain_top10"].value == pytest.approx(0, abs=0.02)
    assert result.details["objectness"]["gain_over_rolled"]["top10"]["value"] < -0.1


def test_more_tokens_have_more_luck(tmp_path: Path) -> None:
    masks = squares(32)
    chance = [
        run(make_inputs(tmp_path, masks, Fake(smooth(32, k)))).metrics["miou_top10"].chance for k in (2, 32)
    ]
    assert chance[1] > chance[0] + 0.1  # type: ignore[operator]


# ---------------------------------------------------------------- invariance


def same(a: Result, b: Result) -> bool:
    assert a.outcomes is not None and b.outcomes is not None
    ours, theirs = ({**o.values, **o.columns, "id": o.ids} for o in (a.outcomes, b.outcomes))
    columns = ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    return columns and a.metrics == b.metrics and a.details == b.details


SWEEP = {"layers": (-1, 0), "times": (0.5, 0.1)}


def test_batch_size_changes_nothing(tmp_path: Path) -> None:
    masks, maps = squares(70), smooth(70, 3, layers=2, times=2)
    results = [
        run(make_inputs(tmp_path, masks, Fake(maps), SWEEP, seeds=[0, 1], batch_size=size))
        for size in (7, 64)
    ]
    assert same(*results)
    assert results[0].metrics["miou_top10"].n == 70


def test_ranks_and_a_kill_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks, maps = squares(150), smooth(150, 3)
    alone = run(make_inputs(tmp_path, masks, Fake(maps)))
    monkeypatch.setattr(Ranks, "share", lambda self, value: value)
    monkeypatch.setattr(Ranks, "agree", lambda self, error: None)
    second = Fake(maps)
    work = tmp_path / "work"
    # three shards: the second process does the middle one, the first one the others
    assert Objectness().run(make_inputs(tmp_path, masks, second, work=work, ranks=Ranks(1, 2))) is None
    assert second.calls > 0 and len(list(work.iterdir())) in (1, 2)
    done = len(list(work.iterdir()))

    class Killed(Exception):
        pass

    saved = shards.save_columns

    def save_then_die(path: Path, columns: Any) -> None:
        saved(path, columns)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_columns", save_then_die)
        with pytest.raises(Killed):
            run(make_inputs(tmp_path, masks, Fake(maps), work=work))
    assert len(list(work.iterdir())) == done + 1
    last = Fake(maps)
    assert same(run(make_inputs(tmp_path, masks, last, work=work)), alone)
    assert last.calls < 150  # what was finished is not computed again


def test_the_sweep_holds_every_layer_and_time_and_the_first_is_the_metric(tmp_path: Path) -> None:
    masks, maps = squares(10), smooth(10, 3, layers=2, times=2)
    spec = {"layers": (-1, 0, 7), "times": (0.5, 0.1)}
    result = run(make_inputs(tmp_path, masks, Fake(maps), spec))
    details = result.details["objectness"]
    assert (details["layer"], details["time"]) == (1, 0.5)
    assert details["sweep"]["layers"] == [1, 0] and details["layers_that_do_not_exist"] == [7]
    value = details["sweep"]["best_token"]["top10"]["value"]
    assert np.shape(value) == (2, 2) and value[0][0] == result.metrics["miou_top10"].value
    for row, layer in enumerate((-1, 0)):
        for column, time in enumerate((0.5, 0.1)):
            part = {"layers": (layer,), "times": (time,)}
            one = Fake(maps[:, [column]])
            alone = run(make_inputs(tmp_path, masks, one, part)).metrics["miou_top10"]
            assert value[row][column] == alone.value
    assert "optimistic" in details["sweep"]["note"]


def test_a_decoder_of_one_pass_has_no_time(tmp_path: Path) -> None:
    result = run(
        make_inputs(tmp_path, squares(4), Fake(smooth(4, 2), times=()), {"layers": (0,), "times": (0.5, 0.1)})
    )
    details = result.details["objectness"]
    assert details["time"] is None and details["sweep"]["read_at"] == []
    assert np.shape(details["sweep"]["best_token"]["top10"]["value"]) == (1, 1)


# ---------------------------------------------------------------- odd data


def test_images_without_object_are_left_out_and_listed(tmp_path: Path) -> None:
    masks, maps = squares(6), smooth(6, 3)
    (tmp_path / "b").mkdir()
    masks[[0, 3]] = False
    result = run(make_inputs(tmp_path / "b", masks, Fake(maps)))
    images = result.details["objectness"]["images"]
    assert images["left_out_without_object"] == ["0000", "0003"] and images["measured"] == 4
    outcomes = result.outcomes
    assert result.metrics["miou_top10"].n == 4 and outcomes is not None
    assert outcomes.ids == ["0001", "0002", "0004", "0005"]
    assert all(np.isfinite(v).all() for v in [*outcomes.values.values(), *outcomes.columns.values()])
    (tmp_path / "c").mkdir()
    with pytest.raises(UsageError, match="none of the 2 masks has an object"):
        run(make_inputs(tmp_path / "c", np.zeros((2, SIDE, SIDE), dtype=bool), Fake(maps)))


def test_one_image_alone_has_no_other(tmp_path: Path) -> None:
    result = run(make_inputs(tmp_path, squares(1), Fake(smooth(1, 3))))
    metric, details = result.metrics["miou_top10"], result.details["objectness"]
    assert metric.chance is None and metric.stderr is None and "gain_top10" not in result.metrics
    assert details["null_rolled"]["top10"]["value"] is not None
    assert details["best_head"]["top10"]["chance"] is None
    with pytest.raises(UsageError, match="one image only"):
        run(make_inputs(tmp_path, squares(1), Fake(smooth(1, 3)), main_metric="gain_top10"))


def test_an_image_alone_in_its_shard_has_no_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", 6)
    result = run(make_inputs(tmp_path, squares(7), Fake(smooth(7, 3))))
    assert result.metrics["miou_top10"].n == 7 and result.metrics["gain_top10"].n == 6
    assert result.outcomes is not None and np.isnan(result.outcomes.values["gain_top10"][0, 6])


def test_masks_of_another_size_are_counted(tmp_path: Path) -> None:
    masks, maps = squares(3), smooth(3, 2)
    inputs = make_inputs(tmp_path, masks, Fake(maps))
    before = run(inputs)
    twice = Image.open(tmp_path / "masks" / "0001.png").resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST)
    twice.save(tmp_path / "masks" / "0001.png")
    after = run(inputs)
    assert after.metrics == before.metrics
    assert after.details["objectness"]["images"]["masks_of_another_size"] == 1


# ---------------------------------------------------------------- refusals and recipes


@pytest.mark.parametrize(
    ("tokenizer", "spec", "says"),
    [
        (SimpleNamespace(info=None), {}, "gives no attention maps"),
        (Fake(smooth(2, 2)), {"layers": (4,)}, "has 1 layers, so there is no layer 4"),
        (Fake(smooth(2, 2)), {"layers": (0.5, 4)}, None),
    ],
)
def test_refusals(tmp_path: Path, tokenizer: Any, spec: dict[str, Any], says: str | None) -> None:
    task = make_inputs(tmp_path, squares(2), Fake(smooth(2, 2)), spec).spec
    reason = Objectness().refuses(task, tokenizer)
    assert reason is None if says is None else reason is not None and says in reason


def test_times_that_decoding_does_not_reach_are_refused(tmp_path: Path) -> None:
    from comit_bench.tokenizers.load import load_tokenizer

    task = make_inputs(tmp_path, squares(2), Fake(smooth(2, 2)), {"times": (0.95,)}).spec
    short = load_tokenizer("comit-nano", device="cpu")
    assert "no evaluation has t >= 0.95" in (Objectness().refuses(task, short) or "")
    long = load_tokenizer("comit-nano", device="cpu", steps=50)
    assert Objectness().refuses(task, long) is None


def test_wrong_main_metric(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="miou_top99"):
        run(make_inputs(tmp_path, squares(2), Fake(smooth(2, 2)), main_metric="miou_top99"))


@pytest.mark.parametrize(
    "wrong", [{"layers": ()}, {"times": (1.0,)}, {"shares": (10, 10)}, {"layers": (1.5,)}, {"shares": ()}]
)
def test_wrong_sections(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ObjectnessSpec(**wrong)
    assert ObjectnessSpec(layers=(0.5, 1, -1)).layers == (0.5, 1, -1)


def test_the_command_leaves_out_who_cannot_and_measures_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("pixel-oracle", "comit-nano")
    chosen = [part for name in names for part in ("--tokenizer", name)]
    arguments = [
        "--suite",
        "scenes",
        "--tasks",
        "objectness-scenes",
        "--limit",
        "6",
        "--output",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["comit-bench", "run", *arguments, *chosen])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    assert not ended.value.code
    lines = [line for line in (captured.out + captured.err).splitlines() if "is left out of" in line]
    assert len(lines) == 1 and lines[0].startswith("pixel-oracle") and "no attention maps" in lines[0]
    (record,) = load_records(tmp_path / "records", strict=True)
    assert record.tokenizer.name == "comit-nano" and record.metrics["miou_top10"].n == 6
    assert record.protocol["tokenizer"]["decode"]["steps"] == 10
    (table,) = (tmp_path / "records").rglob("*.parquet")
    stored = pq.read_table(table)
    assert stored.num_rows == 6 and {"id", "miou_top10", "gain_top10", "null_other_top10"} <= set(
        stored.column_names
    )
    assert np.mean(stored["miou_top10"].to_numpy()) == pytest.approx(record.metrics["miou_top10"].value)
