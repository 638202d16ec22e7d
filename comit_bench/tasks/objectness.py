"""Kind ``objectness``: does the attention of some token outline the object, though nobody told it to?

While a message is decoded, the maps between its tokens and the image are read, averaged over heads, resized
to the object's mask and cut to their largest 10, 20, ... percent of pixels. An image counts with the token
whose binary map has the highest intersection over union (IoU) with the mask, once per share.

The best of K maps is far from zero by chance, so every number stands beside a null model: the best of K
*random blobs*, which are the maps of another image, each rolled around the edges by a random amount of its
own. They have the tokenizer's number of maps, their smoothness and their size, but know nothing of the image
or of where objects usually are. The same maps left where they are (``other_image``) know the latter.

Shape legend: ``S`` seeds, ``C`` cells (layers x times), ``P`` shares, ``n`` images, ``K`` tokens,
``H`` heads.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comit_bench.errors import BenchError, CorruptFileError, UnsupportedOperation, UsageError
from comit_bench.metrics.overlap import overlaps, shifted
from comit_bench.nn.attention import AttentionRequest
from comit_bench.results.schema import Metric
from comit_bench.seeding import generator_for
from comit_bench.tasks.base import Inputs, Role, Rows, Task, check_main_metric
from comit_bench.tasks.result import Result, over_images
from comit_bench.tasks.shards import Columns, in_shards, joined, noise_seeds
from comit_bench.tokenizers.base import Attends

if TYPE_CHECKING:
    from comit_bench.recipes.kinds import ObjectnessSpec
    from comit_bench.recipes.specs import TaskSpec
    from comit_bench.tokenizers.base import Tokenizer

LEVELS = ("best", "head", "mean", "null", "null_head", "null_mean", "other_image")
Floats = NDArray[np.float64]
_log = logging.getLogger(__name__)
OPTIMISTIC = (
    "The metrics use the first layer and time of the recipe, chosen before anything was measured. The best "
    "cell of the sweep was found on these very images: it is an optimistic number."
)


def resolve_layers(
    layers: Sequence[int | float], depth: int
) -> tuple[tuple[int, ...], tuple[int | float, ...]]:
    """Recipe layers -> zero-based blocks in order, each once; and those that ``depth`` blocks do not have.

    A fraction f is block number f * depth, rounded, counted from 1.
    """
    found: list[int] = []
    missing: list[int | float] = []
    for layer in layers:
        if isinstance(layer, float):
            index = max(int(layer * depth + 0.5), 1) - 1
        else:
            index = layer if layer >= 0 else depth + layer
        if not 0 <= index < depth:
            missing.append(layer)
        elif index not in found:
            found.append(index)
    return tuple(found), tuple(missing)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is read from one tokenizer.

    Attributes:
        request: Layers and times; the first of each give the metrics.
        read_at: The time of the evaluation that answers each time; empty for a decoder of one pass.
        missing: Layers of the recipe that the tokenizer does not have.
    """

    request: AttentionRequest
    read_at: tuple[float, ...]
    missing: tuple[int | float, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and times of the sweep."""
        return len(self.request.layers), max(1, len(self.read_at))


def make_plan(spec: ObjectnessSpec, tokenizer: Tokenizer) -> Plan:
    """Layers and times of a recipe, for one tokenizer."""
    if not isinstance(tokenizer, Attends):
        raise UnsupportedOperation(
            "its adapter gives no attention maps between message and image (COMiT, TiTok and ALIT do)"
        )
    layers, missing = resolve_layers(spec.layers, tokenizer.attention_layers)
    if spec.layers[0] in missing:
        raise UnsupportedOperation(
            f"its decoder has {tokenizer.attention_layers} layers, so there is no layer {spec.layers[0]}"
        )
    try:
        times = tokenizer.attention_times(spec.times)
    except ValueError as error:
        raise UnsupportedOperation(f"objectness.times of the recipe: {error}") from error
    asked = spec.times if times else spec.times[:1]
    request = AttentionRequest(layers=layers, times=asked, path=spec.path, softmax=spec.values == "weights")
    return Plan(request, times, missing)


UNREADABLE = "cannot be read"


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    """Masks of some images.

    Attributes:
        pixels: bool [n, S, S], through the images' own crops; nothing is set where a mask is of no use.
        forms: How each was read (``comit_bench.data.masks``), or :data:`UNREADABLE`.
        whole: float64 [n], share of the file's pixels that are object; NaN where it cannot be read.
        resized: bool [n], which had another size than their image.
        problems: Position -> why a mask is of no use: unreadable, without an object, or nothing but object.
    """

    pixels: NDArray[np.bool_]
    forms: tuple[str, ...]
    whole: Floats
    resized: NDArray[np.bool_]
    problems: dict[int, str]


def read_masks(role: Role, preprocessing: str, positions: Rows) -> Masks:
    """Masks of the images at some positions of a role.

    Raises:
        MissingError: A mask or image is not there.
    """
    from comit_bench.data.images import header_size, mask_of, output_side

    side = output_side(preprocessing)
    pixels = np.zeros((len(positions), side, side), dtype=np.bool_)
    whole = np.full(len(positions), np.nan)
    resized = np.zeros(len(positions), dtype=np.bool_)
    forms, problems = [], {}
    for place, image in enumerate(role.images[positions].tolist()):
        path, photo = role.split.labels[image], role.split.paths[image]
        try:
            cropped, mask = mask_of(photo, path, preprocessing)
        except CorruptFileError as error:
            forms.append(UNREADABLE)
            problems[place] = str(error)
            continue
        forms.append(mask.form)
        whole[place] = mask.share
        resized[place] = sorted(mask.pixels.shape) != sorted(header_size(photo))
        if mask.problem is not None:
            problems[place] = f"{path}: {mask.problem}"
        else:
            pixels[place] = cropped
    return Masks(pixels, tuple(forms), whole, resized, problems)


def examine_masks(role: Role, preprocessing: str, most: float, name: str) -> None:
    """Look at all masks before anything is computed: those of no use are counted and warned about.

    Args:
        role: Whose masks.
        preprocessing: Of the images.
        most: Share of the masks that may be of no use.
        name: Of the data set.
    """
    found = read_masks(role, preprocessing, np.arange(len(role)))
    if not found.problems:
        return
    some = "; ".join(list(found.problems.values())[:3])
    text = f"{name}: {len(found.problems)} of {len(role)} masks are of no use: {some}"
    if len(found.problems) > most * len(role):
        raise BenchError(
            f"{text}. That is more than the {most:.1%} the dataset recipe allows (max_broken). White is the "
            "object, black is not: replace these masks."
        )
    _log.warning("%s. Their images are left out and listed in the record.", text)


@dataclass(slots=True)
class _Shard:
    """Scores of the images of one shard, as they are computed.

    ``scores`` holds for every level float64 [n, S, P], except ``best`` [n, S, C, P]. ``kept`` has the main
    layer's maps by head, [H, K, h, w] per image, for the null model.
    """

    spec: ObjectnessSpec
    masks: NDArray[np.bool_]
    times: int
    scores: dict[str, Floats]
    token: NDArray[np.int64]
    kept: list[Tensor] = field(default_factory=list)

    @classmethod
    def empty(cls, spec: ObjectnessSpec, masks: NDArray[np.bool_], seeds: int, plan: Plan) -> _Shard:
        """Room for the scores; those of images without an object stay NaN."""
        count, shares = len(masks), len(spec.shares)
        cells = plan.shape[0] * plan.shape[1]
        scores = {level: np.full((count, seeds, shares), np.nan) for level in LEVELS}
        scores["best"] = np.full((count, seeds, cells, shares), np.nan)
        return cls(spec, masks, plan.shape[1], scores, np.full((count, seeds), -1, dtype=np.int64))

    def score(self, image: int, maps: Tensor) -> Floats:
        """IoU float64 [P, ...] of maps [..., h, w] with an image's mask."""
        mask = torch.from_numpy(self.masks[image])
        flat = maps.reshape(-1, *maps.shape[-2:])
        found = overlaps(flat, mask, self.spec.shares, resize=self.spec.resize)
        return found.numpy().reshape(-1, *maps.shape[:-2])

    def take(self, seed: int, image: int, layer: int, time: int, maps: Tensor) -> None:
        """Score one image's maps [H, K, h, w] of one layer and time."""
        main = layer == 0 and time == 0
        if main:
            self.kept.append(maps.clone())
        if not self.masks[image].any():
            return
        by_token = self.score(image, maps.mean(dim=0))  # [P, K]
        self.scores["best"][image, seed, layer * self.times + time] = by_token.max(axis=1)
        if main:
            self.scores["mean"][image, seed] = by_token.mean(axis=1)
            self.scores["head"][image, seed] = self.score(image, maps).max(axis=(1, 2))
            self.token[image, seed] = by_token.mean(axis=0).argmax()

    def compare(self, seed: int, ids: Sequence[str]) -> None:
        """Score the null model: maps of other images of the shard, where they are and rolled at random."""
        count = len(self.kept)
        for image, name in enumerate(ids):
            if not self.masks[image].any():
                continue
            generator = generator_for(self.spec.null_seed, f"objectness-null/{name}")
            best, mean = [], []
            for draw in range(self.spec.null_draws):
                other = int(torch.randint(max(count - 1, 1), (), generator=generator))
                other += int(other >= image and count > 1)  # another image, unless there is none
                maps = self.kept[other]
                blobs = shifted(maps, generator)
                by_token = self.score(image, blobs.mean(dim=0))
                best.append(by_token.max(axis=1))
                mean.append(by_token.mean(axis=1))
                if draw == 0:
                    self.scores["null_head"][image, seed] = self.score(image, blobs).max(axis=(1, 2))
                    if count > 1:
                        there = self.score(image, maps.mean(dim=0))
                        self.scores["other_image"][image, seed] = there.max(axis=1)
            self.scores["null"][image, seed] = np.mean(best, axis=0)
            self.scores["null_mean"][image, seed] = np.mean(mean, axis=0)
        self.kept.clear()


def score_images(inputs: Inputs, role: Role, plan: Plan, positions: Rows) -> Mapping[str, NDArray[Any]]:
    """Everything about one shard; no number depends on ``inputs.batch_size``.

    Args:
        inputs: The run.
        role: Whose images.
        plan: What is read.
        positions: int64 [n], positions in the role.

    Returns:
        Scores by level as in :class:`_Shard`, ``token`` [n, S], ``object`` [n] (share of the cropped pixels
        that are object), and of the files ``whole`` [n], ``form`` [n] and ``resized`` bool [n].
    """
    tokenizer = inputs.the_tokenizer()
    spec = inputs.spec.objectness
    masks = read_masks(role, role.split.preprocessing(tokenizer.info.preprocessing), positions)
    shard = _Shard.empty(spec, masks.pixels, len(inputs.seeds), plan)
    ids = [role.split.ids[image] for image in role.images[positions]]
    assert isinstance(tokenizer, Attends)  # make_plan has looked
    for number, seed in enumerate(inputs.seeds):
        for start in range(0, len(positions), inputs.batch_size):
            part = positions[start : start + inputs.batch_size]

            def receive(
                first: int, layer: int, time: int, maps: Tensor, start: int = start, number: int = number
            ) -> None:
                for row, one in enumerate(maps.float()):
                    shard.take(number, start + first + row, layer, time, one)

            tokenizer.attention(
                role.tokens(tokenizer, part),
                plan.request,
                receive,
                seeds=noise_seeds(seed, ids[start : start + len(part)]),
            )
        shard.compare(number, ids)
    files = {"whole": masks.whole, "form": np.array(masks.forms), "resized": masks.resized}
    return {**shard.scores, "token": shard.token, "object": masks.pixels.mean(axis=(1, 2)), **files}


def _counted(forms: NDArray[Any]) -> str:
    return ", ".join(f"{count} read as {form}" for form, count in sorted(Counter(forms.tolist()).items()))


def _summary(metric: Metric) -> dict[str, float | None]:
    return {"value": metric.value, "stderr": metric.stderr, "chance": metric.chance}


@dataclass(frozen=True, slots=True)
class _Scores:
    """All shards together, images without an object left out. Levels are [S, n, P], ``best`` [S, n, C, P]."""

    levels: dict[str, Floats]
    shares: tuple[int, ...]

    def metric(self, level: str, share: int, null: str | None) -> Metric:
        """One level at one share of the main layer and time, over images."""
        values = self.values(level, share)
        chance = None if null is None else float(self.values(null, share).mean())
        return over_images(values, unit="", chance=chance)

    def values(self, level: str, share: int) -> Floats:
        """[S, n] of the main layer and time; images for which the level is not defined are left out."""
        column = self.shares.index(share)
        values = self.levels[level]
        values = values[:, :, 0, column] if level == "best" else values[:, :, column]
        return values[:, np.isfinite(values).all(axis=0)]


class Objectness(Task):
    """Attention maps against the object's mask."""

    def protocol(self, inputs: Inputs) -> dict[str, Any]:
        """The rules that stand in no recipe."""
        return {
            "objectness": {
                "mask": "through the image's crop, nearest pixel, white is object; useless ones left out",
                "null": "maps of another image of the same 64, each rolled at random",
            }
        }

    def refuses(self, spec: TaskSpec, tokenizer: Tokenizer) -> str | None:
        """Why a tokenizer cannot be measured; None when it can."""
        try:
            make_plan(spec.objectness, tokenizer)
        except UnsupportedOperation as error:
            return str(error)
        return None

    def examine(self, inputs: Inputs) -> None:
        """Look at the masks before tokens are made.

        Raises:
            BenchError: Too many are of no use.
        """
        role, recipe = inputs.roles["report"], inputs.the_tokenizer().info.preprocessing
        examine_masks(role, role.split.preprocessing(recipe), inputs.data.max_broken, inputs.data.name)

    def decodings(self, spec: TaskSpec) -> float:
        """Decoding stops after the last time that is read."""
        return min(1.0, max(spec.objectness.times) + 0.1)

    def run(self, inputs: Inputs) -> Result | None:
        """Measure; None in all processes but the first.

        Raises:
            UnsupportedOperation: The tokenizer has no attention maps.
            UsageError: No image has an object in its crop, or the main metric does not exist.
        """
        inputs.check()
        spec, role = inputs.spec.objectness, inputs.roles["report"]
        names = [f"miou_top{share}" for share in spec.shares]
        gains = [f"gain_top{share}" for share in spec.shares]
        check_main_metric(inputs.spec, dict.fromkeys(names + gains))
        plan = make_plan(spec, inputs.the_tokenizer())
        shards = in_shards(inputs, role, "attention", lambda rows: score_images(inputs, role, plan, rows))
        return None if shards is None else self._result(inputs, role, plan, shards)

    def _result(self, inputs: Inputs, role: Role, plan: Plan, shards: list[Columns]) -> Result:
        spec = inputs.spec.objectness
        there = joined(shards, "object").astype(np.float64) > 0
        whole, forms = joined(shards, "whole").astype(np.float64), joined(shards, "form")
        if not there.any():
            usable = (whole > 0) & (whole < 1)
            why = (
                f" left after the tokenizer's crop ({inputs.the_tokenizer().info.preprocessing})"
                if usable.any()
                else f" and something else in it ({_counted(forms)}): look at the files, not at the crop"
            )
            raise UsageError(f"{inputs.spec.name}: none of the {len(role)} masks has an object{why}")
        levels = {level: joined(shards, level).astype(np.float64)[there].swapaxes(0, 1) for level in LEVELS}
        scores = _Scores(levels, spec.shares)
        metrics = {f"miou_top{share}": scores.metric("best", share, "null") for share in spec.shares}
        main = int(inputs.spec.main_metric.rpartition("top")[2])
        over_null = scores.values("best", main) - scores.values("null", main)
        metrics[f"gain_top{main}"] = over_images(over_null, unit="", chance=0.0)
        ids = np.array(role.ids)
        columns: dict[str, Any] = {
            "id": ids[there].tolist(),
            "object_share": joined(shards, "object").astype(np.float64)[there],
            "best_token": joined(shards, "token").astype(np.int64)[there][:, 0],
        }
        for level in LEVELS:
            for column, share in enumerate(spec.shares):
                values = levels[level][:, :, 0, column] if level == "best" else levels[level][:, :, column]
                columns[f"{'miou' if level == 'best' else level}_top{share}"] = values.mean(axis=0)
        details = self._details(plan, scores)
        details["images"] = {
            "measured": int(there.sum()),
            "left_out_without_object": ids[~there].tolist(),
            "masks_without_object": ids[whole == 0].tolist(),
            "masks_all_object": ids[whole == 1].tolist(),
            "masks_unreadable": ids[np.isnan(whole)].tolist(),
            "masks_read_as": dict(sorted(Counter(forms.tolist()).items())),
            "masks_of_another_size": int(joined(shards, "resized").sum()),
            "mean_object_share": float(columns["object_share"].mean()),
        }
        return Result(metrics=metrics, details={"objectness": details}, per_image=columns)

    def _details(self, plan: Plan, scores: _Scores) -> dict[str, Any]:
        layers, times = plan.shape
        sweep: dict[str, Any] = {}
        for column, share in enumerate(scores.shares):
            cells = scores.levels["best"][:, :, :, column]  # [S, n, C]
            found = [over_images(cells[:, :, cell], unit="") for cell in range(layers * times)]
            sweep[f"top{share}"] = {
                key: [
                    [getattr(found[row * times + time], key) for time in range(times)]
                    for row in range(layers)
                ]
                for key in ("value", "stderr")
            }

        def each(level: str, null: str | None) -> dict[str, Any]:
            return {f"top{share}": _summary(scores.metric(level, share, null)) for share in scores.shares}

        others = scores.levels["other_image"]
        return {
            "layer": plan.request.layers[0],
            "time": plan.read_at[0] if plan.read_at else None,
            "best_head": each("head", "null_head"),
            "mean_over_tokens": each("mean", "null_mean"),
            "other_image": each("other_image", None) if np.isfinite(others).any() else None,
            "sweep": {
                "layers": list(plan.request.layers),
                "times": list(plan.request.times) if plan.read_at else [],
                "read_at": list(plan.read_at),
                "best_token": sweep,
                "note": OPTIMISTIC,
            },
            "layers_that_do_not_exist": list(plan.missing),
        }
