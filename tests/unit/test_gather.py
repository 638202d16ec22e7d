"""Kind gather: the contract behind it, definitions, the null, invariance, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from tiny import write_images, write_recipes
from torch import Tensor
from typer.testing import CliRunner

from comit_bench import evaluate
from comit_bench.commands.app import app
from comit_bench.errors import BenchError, UnsupportedOperation, UsageError
from comit_bench.figures import gather as figure
from comit_bench.figures.inputs import Images
from comit_bench.figures.style import FULL
from comit_bench.metrics.similarity import psnr
from comit_bench.pipeline.jobs import Settings, make_jobs
from comit_bench.recipes.specs import find_tasks
from comit_bench.results.records import Record
from comit_bench.results.render.text import to_csv, to_latex
from comit_bench.results.table import build_table
from comit_bench.seeding import generator_for
from comit_bench.tasks import gather
from comit_bench.tasks.base import find_task
from comit_bench.tasks.objectness import derangement
from comit_bench.tokenizers.base import CropStep, Gathers, Streams, Tokens, gathers
from comit_bench.tokenizers.comit.crops import GLOBAL, CropGeometry, parse_policy
from comit_bench.tokenizers.load import load_tokenizer
from comit_bench.tokenizers.pixels import PixelOracleTokenizer

COUNT = 10
GEOMETRY = CropGeometry(crop=12, half=16)


class Painter(PixelOracleTokenizer):
    """Its message is a grey image onto which every crop is pasted: it gathers without loss.

    ``keep`` is how many of the latest crops it remembers.
    """

    def __init__(self, keep: int = 10) -> None:
        super().__init__(device="cpu")
        self.keep = keep
        self.info = replace(self.info, name=f"painter-{keep}")
        self.asked: list[int] = []

    def policy(self, name: str | None) -> Any:
        return parse_policy(name or "global")

    def encode_by_crop(
        self, images_u8: Tensor, *, policy: str, generators: Streams = None, later: Tensor | None = None
    ) -> list[CropStep]:
        self.asked.append(len(images_u8))
        cells = self.policy(policy).indices(len(images_u8), generators)
        boxes = GEOMETRY.boxes(32)[cells + 1]  # [K, B, 3]
        steps = []
        for k in range(len(cells)):
            canvas = torch.full_like(images_u8, 128)
            for i in range(max(0, k + 1 - self.keep), k + 1):
                source = images_u8 if later is None or i == 0 else later
                for b, (left, top, side) in enumerate(boxes[i].tolist()):
                    where = (b, slice(None), slice(top, top + side), slice(left, left + side))
                    canvas[where] = source[where]
            steps.append(CropStep(self.encode(canvas), boxes[k]))
        return steps

    def decode_one_step(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        return self.decode(tokens, seeds=seeds)


class Wrapped:
    """Hands everything on to another tokenizer."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def write_task(root: Path, name: str = "tiny-gather", seeds: int = 1, **section: object) -> None:
    task = {
        "name": name,
        "version": 1,
        "title": "Crop by crop",
        "kind": "gather",
        "suite": "extra",
        "dataset": "tiny",
        "split": {"report": "val"},
        "seeds": seeds,
        "gather": {"count": COUNT, **section},
    }
    folder = root / "recipes" / "probes" / name
    folder.mkdir(parents=True)
    (folder / "task.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_images(tmp_path / "data", train=1)
    write_recipes(tmp_path / "recipes", kind="classification")
    write_task(tmp_path)
    return tmp_path


def settings_in(root: Path, output: str = "out", **changes: Any) -> dict[str, Any]:
    return {
        "data_root": root / "data",
        "include": (root / "recipes",),
        "cache": root / "cache",
        "output": root / output,
        "device": "cpu",
        **changes,
    }


def values(record: Record) -> dict[str, Any]:
    return {name: metric.model_dump() for name, metric in record.metrics.items()}


def per_image(root: Path, output: str = "out") -> dict[str, list[Any]]:
    (path,) = (root / output / "records").rglob("*.parquet")
    return dict(pq.read_table(path).to_pydict())


def originals(root: Path) -> tuple[list[str], Tensor]:
    """Names and pixels of all val images."""
    paths = sorted((root / "data" / "tiny" / "val").rglob("*.png"))
    images = [torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1) for path in paths]
    return [f"{path.parent.name}/{path.stem}" for path in paths], torch.stack(images)


def measure(
    tokenizer: Any, root: Path, output: str = "out", task: str = "tiny-gather", **changes: Any
) -> Record:
    (record,) = evaluate(tokenizer, [task], references=False, **settings_in(root, output, **changes))
    return record


def curve(record: Record, row: str) -> dict[str, list[float]]:
    found: Any = record.details["gather"]
    return dict(found["by_crops"][row])


# ---------------------------------------------------------------------------------------- contract


@pytest.fixture(scope="module")
def nano() -> Any:
    return load_tokenizer("comit-nano", device="cpu")


def pictures(count: int, seed: int = 0) -> Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1).mul(255).byte()


def streams(count: int) -> list[torch.Generator]:
    return [generator_for(0, f"image {i}") for i in range(count)]


def test_who_gathers(nano: Any) -> None:
    assert gathers(nano) and isinstance(nano, Gathers) and gathers(Wrapped(nano)) and gathers(Painter())
    for name in ("titok-nano", "pixel-oracle"):
        assert not gathers(load_tokenizer(name, device="cpu"))


@pytest.mark.parametrize("policy", ["random:9", "global+random:10", "raster:3", "global", "random-shared:2"])
def test_every_step_is_the_message_of_the_policy_that_stops_there(nano: Any, policy: str) -> None:
    images = pictures(3)
    steps = nano.encode_by_crop(images, policy=policy, generators=streams(3))
    name, _, count = policy.partition(":")
    assert len(steps) == int(count or 1)
    for k, step in enumerate(steps, start=1):
        short = nano.encode(images, policy=f"{name}:{k}" if count else name, generators=streams(3))
        assert torch.equal(step.tokens.ids, short.ids), k
        torch.testing.assert_close(step.tokens.codes, short.codes, rtol=0, atol=0)
        torch.testing.assert_close(step.tokens.offsets, short.offsets, rtol=0, atol=0)


def test_frames_are_those_of_the_crops(nano: Any) -> None:
    steps = nano.encode_by_crop(pictures(2), policy="global+raster:10")
    assert [step.boxes.dtype for step in steps] == [torch.int64] * 10
    assert steps[0].boxes.tolist() == [[0, 0, 32]] * 2
    assert steps[1].boxes.tolist() == [[0, 0, 12]] * 2 and steps[6].boxes.tolist() == [[20, 10, 12]] * 2
    images = torch.arange(32 * 32).view(1, 1, 32, 32).expand(2, 3, -1, -1)
    for crop, (left, top, side) in zip(GEOMETRY.local_crops(images)[0], GEOMETRY.boxes(32)[1:], strict=True):
        assert torch.equal(crop, images[0, :, top : top + side, left : left + side])
    assert GEOMETRY.boxes(32)[GLOBAL + 1].tolist() == [0, 0, 32]


def test_later_crops_come_from_the_other_images(nano: Any) -> None:
    images, others = pictures(3), pictures(3, seed=1)
    how: dict[str, Any] = {"policy": "random:3"}
    own = nano.encode_by_crop(images, generators=streams(3), **how)
    same = nano.encode_by_crop(images, generators=streams(3), later=images, **how)
    mixed = nano.encode_by_crop(images, generators=streams(3), later=others, **how)
    foreign = nano.encode_by_crop(others, generators=streams(3), **how)
    for a, b in zip(own, same, strict=True):
        assert torch.equal(a.tokens.ids, b.tokens.ids)
    assert torch.equal(mixed[0].tokens.ids, own[0].tokens.ids)
    assert not torch.equal(mixed[2].tokens.ids, own[2].tokens.ids)
    assert not torch.equal(mixed[2].tokens.ids, foreign[2].tokens.ids), "the first crop is their own"
    assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(own, mixed, strict=True))
    alone = nano.encode_by_crop(images[:1], policy="global", later=others[:1])
    assert torch.equal(alone[0].tokens.ids, nano.encode(images[:1]).ids)
    with pytest.raises(ValueError, match="adaptive policy chooses crops by one image"):
        nano.encode_by_crop(images, policy="adaptive:3", generators=streams(3), later=others)
    with pytest.raises(ValueError, match="takes uint8 images"):
        nano.encode_by_crop(images, policy="raster:3", later=others[..., :16])
    with pytest.raises(UsageError, match="unknown cropping policy"):
        nano.encode_by_crop(images, policy="rasta:3")


def test_one_step_is_that_of_the_figures_and_depends_on_the_seed(nano: Any) -> None:
    tokens = nano.encode(pictures(3))
    seen = nano.decode_one_step(tokens, seeds=[5, 6, 7])
    noise = torch.stack([nano.noise(seed) for seed in (5, 6, 7)])
    floats = nano.one_step(tokens.codes, tokens.offsets, noise)
    assert seen.dtype == torch.uint8 and seen.shape == (3, 3, 32, 32)
    assert (seen.float() - floats.add(1).mul(127.5).clamp(0, 255)).abs().max() <= 2
    assert not torch.equal(nano.decode_one_step(tokens, seeds=[6, 7, 5]), seen)


# -------------------------------------------------------------------------------------- definitions


def test_numbers_are_those_of_the_crops(root: Path) -> None:
    measure(Painter(), root)
    ids, images = originals(root)
    table = per_image(root)
    rows = [next(i for i, name in enumerate(ids) if name in told) for told in table["id"]]
    assert len(rows) == COUNT
    partner = derangement(table["id"], 0, 0)
    for j, row in enumerate(rows):
        order = torch.randperm(9, generator=generator_for(0, f"gather/{table['id'][j]}"))
        found = {}
        for kind, other in (("", images[row]), ("null_", images[rows[partner[j]]])):
            canvas = torch.full((3, 32, 32), 128, dtype=torch.uint8)
            for k, cell in enumerate(order.tolist()):
                left, top, side = GEOMETRY.boxes(32)[cell + 1].tolist()
                where = (slice(None), slice(top, top + side), slice(left, left + side))
                canvas[where] = (images[row] if k == 0 else other)[where]
                if k in (0, 2, 8):
                    found[f"{kind}psnr@random:{k + 1}"] = psnr(images[row][None], canvas[None]).item()
        for name, value in found.items():
            assert table[name][j] == pytest.approx(value, rel=1e-12), name
        assert table["gather_gain"][j] == pytest.approx(found["psnr@random:9"] - found["psnr@random:1"])
        over = found["psnr@random:9"] - found["null_psnr@random:9"]
        assert table["gain_over_null"][j] == pytest.approx(over)
        assert table["psnr@global"][j] == table["psnr@global+random:4"][j] == 100.0
        assert table["gaining_images"][j] == 1.0


def test_metrics_and_their_null_levels(root: Path) -> None:
    record = measure(Painter(), root)
    assert list(record.metrics) == [
        "gather_gain", "gain_over_null", "psnr@random:1", "psnr@random:3", "psnr@random:9", "psnr@global",
        "psnr@global+random:4", "gaining_images",
    ]  # fmt: skip
    m, table = record.metrics, per_image(root)
    assert all(one.n == COUNT and one.higher_is_better and one.stderr is not None for one in m.values())
    assert m["gaining_images"].unit == "%" and m["gaining_images"].value == 100.0
    assert {one.unit for name, one in m.items() if name != "gaining_images"} == {"dB"}
    gain = m["psnr@random:9"].value - m["psnr@random:1"].value
    assert m["gather_gain"].value == pytest.approx(gain) and gain > 10
    assert m["gain_over_null"].chance == 0.0
    details: Any = record.details["gather"]
    for name in ("psnr@random:1", "psnr@global"):
        assert m[name].chance == details["psnr_mean_colour"]
    for name in ("psnr@random:3", "psnr@random:9", "psnr@global+random:4"):
        assert m[name].chance == pytest.approx(np.mean(table[f"null_{name}"]))
    null = np.array(table["null_psnr@random:9"]) - np.array(table["null_psnr@random:1"])
    assert m["gather_gain"].chance == pytest.approx(null.mean())
    assert m["gaining_images"].chance == pytest.approx(100 * (null > 0).mean())
    assert curve(record, "random")["psnr"] == sorted(curve(record, "random")["psnr"])
    assert [len(curve(record, row)["null_psnr"]) for row in gather.POLICIES] == [9, 10]
    assert len(curve(record, "random")["mse"]) == 9 and curve(record, "random")["mse"][-1] == 0
    assert curve(record, "random")["null_psnr"][0] == curve(record, "random")["psnr"][0]


def test_a_message_that_forgets_gains_nothing(root: Path) -> None:
    m = measure(Painter(keep=1), root).metrics
    assert abs(m["gather_gain"].value) < 1.5 and m["psnr@global+random:4"].value < m["psnr@global"].value
    assert 0 < m["gaining_images"].value < 100


def test_every_seed_is_another_order_and_noise(root: Path) -> None:
    write_task(root, "tiny-two", seeds=2)
    metric = measure(Painter(keep=3), root, task="tiny-two").metrics["psnr@random:3"]
    assert len(set(metric.per_seed)) == 2 and metric.std


def test_full_decoding_stands_beside(root: Path) -> None:
    write_task(root, "tiny-full", full=True)
    record = measure(Painter(), root, task="tiny-full")
    assert set(record.metrics) - set(gather._names(full=False)) == {f"full_psnr@{p}" for p in gather.POINTS}
    for point in gather.POINTS:
        assert record.metrics[f"full_psnr@{point}"].value == record.metrics[f"psnr@{point}"].value
    task = find_tasks((root / "recipes",))["tiny-full"].spec
    plain = find_tasks((root / "recipes",))["tiny-gather"].spec
    assert find_task(task).decodings(task) == find_task(plain).decodings(plain) + 5


def test_one_image_has_no_null(root: Path) -> None:
    record = measure(Painter(), root, limit=1)
    assert "gain_over_null" not in record.metrics and record.metrics["gather_gain"].chance is None
    assert record.metrics["psnr@random:3"].chance is not None
    assert any("left_out: the null" in note for note in record.notes)


# --------------------------------------------------------------------------------------- invariance


def test_batch_size_and_order_change_nothing(nano: Any, root: Path) -> None:
    one = measure(nano, root, "a", batch_size=3)
    two = measure(nano, root, "b", batch_size=64, overwrite="always")
    assert values(one) == values(two) and one.protocol_digest == two.protocol_digest
    assert per_image(root, "a") == per_image(root, "b")
    images, ids = pictures(5), list("abcde")
    how: dict[str, Any] = {"seed": 0, "batch_size": 2}
    steps = gather.steps_of(nano, images, ids, "random", **how)
    turned = gather.steps_of(nano, images.flip(0), ids[::-1], "random", **how)
    for a, b in zip(steps, turned, strict=True):
        assert torch.equal(a.tokens.codes, b.tokens.codes.flip(0)) and torch.equal(a.boxes, b.boxes.flip(0))
    seen = gather.decoded(nano, steps[2].tokens, ids, **how)
    again = gather.decoded(nano, turned[2].tokens, ids[::-1], **how)
    assert torch.equal(seen, again.flip(0))


def test_a_row_is_encoded_once(root: Path) -> None:
    painter = Painter()
    measure(painter, root, batch_size=64)
    assert painter.asked == [COUNT] * 4, "two rows of crops, each with its null"


# ----------------------------------------------------------------------------- refusals and tables


def test_the_order_is_the_same_with_and_without_the_whole_image(nano: Any) -> None:
    how: dict[str, Any] = {"seed": 3, "batch_size": 8}
    rows = [gather.steps_of(nano, pictures(2), ["a", "b"], row, **how) for row in gather.POLICIES]
    for local, mixed in zip(rows[0], rows[1][1:], strict=True):
        assert torch.equal(local.boxes, mixed.boxes)
    assert not torch.equal(rows[0][0].boxes[0], rows[0][0].boxes[1])


def test_tokenizers_that_see_whole_images_are_left_out(root: Path) -> None:
    spec = find_tasks((root / "recipes",))["tiny-gather"].spec
    assert find_task(spec).refuses(spec, Painter()) is None
    refused = find_task(spec).refuses(spec, load_tokenizer("titok-nano", device="cpu"))
    assert refused == "its message does not grow crop by crop (COMiT's does)"
    assert evaluate("titok-nano", ["tiny-gather"], references=False, **settings_in(root)) == []


def test_policies_mean_nothing_here(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(**settings_in(root, policy=("raster:3", "global")))
    jobs = make_jobs(["comit-nano"], ["tiny-gather", "tiny-colours"], settings)
    told = [(job.task.spec.name, job.policy) for job in jobs]
    assert told == [("tiny-gather", None), ("tiny-colours", "raster:3"), ("tiny-colours", "global")]
    assert "tiny-gather says itself which crops it looks at: --policy is ignored" in caplog.text


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda steps: steps[:-1], "8 steps, but the contract wants a list of 9 CropStep"),
        (lambda steps: None, "returned None, but"),
        (lambda steps: [step.tokens for step in steps], "a list of 9 CropStep"),
        (lambda steps: [replace(s, boxes=s.boxes.float()) for s in steps], "boxes float32"),
        (lambda steps: [replace(s, boxes=s.boxes[:, :2]) for s in steps], r"boxes int64 \[10, 2\]"),
        (lambda steps: [CropStep(Tokens(None, s.tokens.codes[:1]), s.boxes) for s in steps], "codes float32"),
        (lambda steps: [CropStep(Tokens(None, s.tokens.codes / 0), s.boxes) for s in steps], "not finite"),
    ],
)
def test_what_a_plugin_returns_is_looked_at(root: Path, broken: Any, words: str) -> None:
    class Broken(Painter):
        def encode_by_crop(self, *args: Any, **how: Any) -> Any:
            return broken(super().encode_by_crop(*args, **how))

    with pytest.raises(BenchError, match=words):
        measure(Broken(), root)


def test_wrong_recipes(root: Path) -> None:
    write_task(root, "tiny-wrong", crops=3)
    with pytest.raises(UsageError, match=r"gather\.crops: unknown key"):
        find_tasks((root / "recipes",))


def test_a_wrong_main_metric_is_told(root: Path) -> None:
    path = root / "recipes" / "probes" / "tiny-gather" / "task.yaml"
    task = yaml.safe_load(path.read_text()) | {"main_metric": "psnr@random:2"}
    path.write_text(yaml.safe_dump(task))
    with pytest.raises(UsageError, match=r"'psnr@random:2' is not measured.* 'psnr@random"):
        measure(Painter(), root)


def test_columns_of_tables(root: Path) -> None:
    record = measure(Painter(), root)
    table = build_table([record])
    assert [column.metric for column in table.columns] == list(record.metrics)
    assert table.groups[0].subtitle == f"v1, 32 px, {COUNT} images"
    assert all(column.higher_is_better for column in table.columns)
    assert "tiny-gather-v1:psnr@global+random:4_mean" in to_csv(table).splitlines()[0].split(",")
    assert r"gather\_gain dB $\uparrow$" in to_latex(table) and "psnr@random:9 dB" in to_latex(table)


def test_outcomes_can_be_compared(root: Path) -> None:
    measure(Painter(), root)
    (path,) = (root / "out" / "records").rglob("*.parquet")
    names = set(pq.read_schema(path).names)
    assert {"gather_gain", "gain_over_null", "psnr@global", "gaining_images"} <= names


def test_the_recipes() -> None:
    found = {name: recipe.spec for name, recipe in find_tasks().items() if recipe.spec.kind == "gather"}
    assert set(found) >= {"gather-scenes", "gather-drawings", "gather-imagenet"}
    for spec in found.values():
        assert not spec.by_default and spec.main_metric == "gather_gain" and spec.task_kind.own_crops
    assert found["gather-imagenet"].gather.full and found["gather-imagenet"].gather.count == 5000


# -------------------------------------------------------------------------------------------- figure


def figure_inputs(count: int) -> Images:
    names = tuple(f"image {i}" for i in range(count))
    return Images(names, pictures(count), tuple(Path(name) for name in names))


def test_the_figure_shows_what_the_task_measures(nano: Any) -> None:
    inputs = figure_inputs(5)
    data = figure.compute(nano, inputs, count=2)
    assert data.names == ("image 0", "image 4"), "spread over all"
    how: dict[str, Any] = {"seed": 0, "batch_size": 64}
    steps = gather.steps_of(nano, inputs.images, inputs.names, "random", **how)
    seen = gather.decoded(nano, steps[4].tokens, inputs.names, **how)
    np.testing.assert_allclose(data.psnr["random"][4], psnr(inputs.images, seen))
    assert np.array_equal(data.pictures[2], seen[[0, 4]].numpy()) and figure.SHOWN[2] == ("random", 5)
    assert np.array_equal(data.picture_psnr[2], data.psnr["random"][4, [0, 4]])
    assert np.array_equal(data.boxes[3], steps[3].boxes[[0, 4]])
    assert {row: values.shape for row, values in data.null.items()} == {
        "random": (9, 5), "global+random": (10, 5)
    }  # fmt: skip
    assert np.array_equal(data.null["random"][0], data.psnr["random"][0])


def test_the_figure_says_what_it_shows(nano: Any) -> None:
    drawn = figure.draw(figure.compute(nano, figure_inputs(3), count=2))
    texts = [text.get_text() for axes in drawn.axes for text in axes.texts]
    assert sorted(texts) == sorted([str(place) for place in range(1, 10)] * 2)
    words = " ".join(text.get_text() for text in drawn.texts)
    for told in ("order of crops", "1 crop ", "9 crops", "whole image", " dB", "all crops but the first are"):
        assert told in words, told
    curves = drawn.axes[-1]
    legend = curves.get_legend()
    assert legend is not None and curves.get_ylabel() == "PSNR, one step (dB)"
    assert [text.get_text() for text in legend.get_texts()] == [
        "whole image, then crops", "crops alone", "later crops of another image", "mean colour",
    ]  # fmt: skip
    assert drawn.get_size_inches()[0] == pytest.approx(FULL, abs=0.1)
    for axes in drawn.axes:
        box = axes.get_position()
        assert 0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1


def test_one_image_is_drawn_without_null_and_bars(nano: Any) -> None:
    data = figure.compute(nano, figure_inputs(1))
    assert not data.null and data.pictures.shape == (5, 1, 3, 32, 32)
    legend = figure.draw(data).axes[-1].get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()][2:] == ["mean colour"]


def test_whole_image_tokenizers_have_no_such_figure() -> None:
    titok = load_tokenizer("titok-nano", device="cpu")
    with pytest.raises(UnsupportedOperation, match="does not build its message crop by crop"):
        figure.compute(titok, figure_inputs(2))


def test_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate(pictures(3)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    asked = ["figure", "gather", "--images", str(folder), "--output", str(tmp_path / "out"), "--quiet"]
    done = CliRunner().invoke(app, [*asked, "--count", "1", "--curve-count", "2"])
    assert done.exit_code == 0, done.output
    names = [Path(line).name for line in done.stdout.split("\n") if line]
    assert names == ["gather-comit-nano.pdf", "gather-comit-nano.png"]
    done = CliRunner().invoke(app, [*asked, "--policy", "raster:3"])
    assert isinstance(done.exception, UsageError) and "looks at crops of its own" in str(done.exception)
