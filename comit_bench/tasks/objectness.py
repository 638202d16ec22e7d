"""Kind ``objectness``: does the attention of some token outline the object, though nobody told it to?

While a message is decoded, the maps between its tokens and the image are read, averaged over heads, resized
to the object's mask and cut to their largest 10, 20, ... percent of pixels. An image counts with the token
whose binary map has the highest intersection over union (IoU) with the mask, once per share.

The best of K maps is far from zero by chance, so every number stands beside a null model: the same image
with the K maps of *another image*. They have the tokenizer's number of maps, their smoothness, their size and
the places it usually looks at, but know nothing of this image. ``chance`` is the mean of that null and the
gain the difference to it, image by image. Each of ``null_draws`` draws hands the maps of 64 images round in a
circle of random order, so everybody's maps are used once (a derangement), and the same for all tokenizers.

The details hold a second null, the same maps each rolled around the edges by a random amount of its own. It
does not know where objects usually are, so a tokenizer that always looks at the middle beats it without
seeing anything; one that always looks at a corner falls below it. Neither of the two is always the larger.

They also say what is attainable: at a share that is not the object's nobody reaches 1.

Shape legend: ``S`` seeds, ``C`` cells (layers x times), ``P`` shares, ``n`` images, ``K`` tokens,
``H`` heads.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comit_bench.data.images import header_size, mask_of, output_side
from comit_bench.errors import BenchError, CorruptFileError, UnsupportedOperation, UsageError
from comit_bench.metrics.overlap import best_threshold, most_possible, on_grid, overlaps, shifted
from comit_bench.metrics.statistics import estimate
from comit_bench.nn.attention import AttentionRequest
from comit_bench.recipes.kinds import ObjectnessSpec
from comit_bench.recipes.specs import TaskSpec
from comit_bench.results.outcomes import Outcomes
from comit_bench.seeding import generator_for, seed_for
from comit_bench.tasks.base import Inputs, Role, Rows, Task, check_main_metric
from comit_bench.tasks.result import Result
from comit_bench.tasks.shards import Columns, in_shards, joined, noise_seeds
from comit_bench.tokenizers.base import Attends, Tokenizer

LEVELS = ("best", "head", "mean", "null_other", "null_other_head", "null_other_mean", "null_rolled")
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

    ``scores`` holds for every level float64 [n, S, P], except ``best`` [n, S, C, P]; ``mask_as_map`` [n, P]
    and ``threshold`` [n] are those of the mask itself on the maps' grid, cut by share or by the best
    threshold. ``kept`` has the main layer's maps by head, [H, K, h, w] per image, for the null model.
    """

    spec: ObjectnessSpec
    masks: NDArray[np.bool_]
    times: int
    scores: dict[str, Floats]
    token: NDArray[np.int64]
    mask_as_map: Floats
    threshold: Floats
    kept: list[Tensor] = field(default_factory=list)

    @classmethod
    def empty(cls, spec: ObjectnessSpec, masks: NDArray[np.bool_], seeds: int, plan: Plan) -> _Shard:
        """Room for the scores; those of images without an object stay NaN."""
        count, shares = len(masks), len(spec.shares)
        cells = plan.shape[0] * plan.shape[1]
        scores = {level: np.full((count, seeds, shares), np.nan) for level in LEVELS}
        scores["best"] = np.full((count, seeds, cells, shares), np.nan)
        token = np.full((count, seeds), -1, dtype=np.int64)
        grid = np.full((count, shares), np.nan), np.full(count, np.nan)
        return cls(spec, masks, plan.shape[1], scores, token, *grid)

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
        if main and seed == 0:
            mask = torch.from_numpy(self.masks[image])
            itself = on_grid(mask, *maps.shape[-2:])
            self.mask_as_map[image] = self.score(image, itself)
            self.threshold[image] = best_threshold(itself, mask, resize=self.spec.resize)

    def compare(self, seed: int, ids: Sequence[str]) -> None:
        """Score the null models: maps of other images of the shard, where they are and rolled at random.

        An image that is alone in its shard has no other; its own maps are rolled.
        """
        count, draws = len(self.kept), self.spec.null_draws
        partners = [derangement(ids, self.spec.null_seed, draw) for draw in range(draws)]
        for image, name in enumerate(ids):
            if not self.masks[image].any():
                continue
            generator = generator_for(self.spec.null_seed, f"objectness-null/{name}")
            other, rolled = [], []
            for partner in partners:
                maps = self.kept[int(partner[image])]
                other.append(self.score(image, maps.mean(dim=0)))  # [P, K]
                rolled.append(self.score(image, shifted(maps.mean(dim=0), generator)).max(axis=1))
            self.scores["null_rolled"][image, seed] = np.mean(rolled, axis=0)
            if count > 1:
                best, mean = np.max(other, axis=2), np.mean(other, axis=2)  # [draws, P]
                self.scores["null_other"][image, seed] = best.mean(axis=0)
                self.scores["null_other_mean"][image, seed] = mean.mean(axis=0)
                heads = self.score(image, self.kept[int(partners[0][image])])  # [P, H, K]
                self.scores["null_other_head"][image, seed] = heads.max(axis=(1, 2))
        self.kept.clear()


def derangement(ids: Sequence[str], seed: int, draw: int) -> Rows:
    """For each of some images another one, and each once: int64 [n], positions; [0] of a single image.

    The images stand in a circle, in the order of a hash of seed, draw and id; everybody takes the one before.
    """
    order = sorted(range(len(ids)), key=lambda image: seed_for(seed, f"objectness-null/{draw}/{ids[image]}"))
    partner = np.empty(len(ids), dtype=np.int64)
    partner[order] = np.roll(order, 1)
    return partner


def score_images(inputs: Inputs, role: Role, plan: Plan, positions: Rows) -> Mapping[str, NDArray[Any]]:
    """Everything about one shard; no number depends on ``inputs.batch_size``.

    Args:
        inputs: The run.
        role: Whose images.
        plan: What is read.
        positions: int64 [n], positions in the role.

    Returns:
        Scores by level as in :class:`_Shard`, ``token`` [n, S], ``mask_as_map`` [n, P], ``threshold`` [n],
        ``any_map`` [n, P] (the most any map can have), ``object`` [n] (share of the cropped pixels that are
        object), and of the files ``whole`` [n], ``form`` [n] and ``resized`` bool [n].
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
    side = masks.pixels.shape[-1]
    most = [most_possible(int(mask.sum()), side, spec.shares) for mask in masks.pixels]
    return {
        **shard.scores,
        "token": shard.token,
        "any_map": np.array(most),
        "mask_as_map": shard.mask_as_map,
        "threshold": shard.threshold,
        "object": masks.pixels.mean(axis=(1, 2)),
        "whole": masks.whole,
        "form": np.array(masks.forms),
        "resized": masks.resized,
    }


def _counted(forms: NDArray[Any]) -> str:
    return ", ".join(f"{count} read as {form}" for form, count in sorted(Counter(forms.tolist()).items()))


def _told(values: Floats, chance: Floats | None = None) -> dict[str, float | None]:
    """Mean over seeds and images [S, n] with its error, and the mean of a null; NaN is left out."""
    there = values[:, np.isfinite(values).all(axis=0)]
    if not there.size:
        return {"value": None, "stderr": None, "chance": None}
    found, null = estimate(there), None if chance is None else _told(chance)["value"]
    return {"value": found.value, "stderr": found.stderr, "chance": null}


@dataclass(frozen=True, slots=True)
class _Scores:
    """All shards together, images without an object left out. Levels are [S, n, P], ``best`` [S, n, C, P]."""

    levels: dict[str, Floats]
    shares: tuple[int, ...]

    def values(self, level: str, share: int) -> Floats:
        """[S, n] of the main layer and time; NaN for images for which the level is not defined."""
        column = self.shares.index(share)
        values = self.levels[level]
        return values[:, :, 0, column] if level == "best" else values[:, :, column]

    def told(self, level: str, null: str | None) -> dict[str, Any]:
        """One level in the details, by share."""
        return {
            f"top{share}": _told(
                self.values(level, share), None if null is None else self.values(null, share)
            )
            for share in self.shares
        }


def _outcomes(
    scores: _Scores, columns: Columns, main: int, ids: Sequence[str], seeds: Sequence[int]
) -> Outcomes:
    """IoU at every share, the gain at the main one, and beside them both nulls and what is attainable.

    Without another image to compare with there is no gain.
    """
    values = {f"miou_top{share}": scores.values("best", share) for share in scores.shares}
    gain = scores.values("best", main) - scores.values("null_other", main)
    if np.isfinite(gain).any():
        values[f"gain_top{main}"] = gain
    further: dict[str, Any] = {"object_share": columns["object"], "best_token": columns["token"].T}
    for column, share in enumerate(scores.shares):
        for null in ("null_other", "null_rolled"):
            further[f"{null}_top{share}"] = scores.values(null, share)
        further[f"any_map_top{share}"] = columns["any_map"][:, column]
    return Outcomes(ids=ids, seeds=seeds, values=values, columns=further)


def _attainable(columns: Columns, shares: Sequence[int]) -> dict[str, Any]:
    """Mean over images of the highest IoU, without and with the share fixed."""
    means = {
        name: columns[name].astype(np.float64).mean(axis=0)
        for name in ("threshold", "any_map", "mask_as_map")
    }
    by_share = {
        f"top{share}": {name: float(means[name][column]) for name in ("any_map", "mask_as_map")}
        for column, share in enumerate(shares)
    }
    return {"best_threshold": float(means["threshold"]), **by_share}


class Objectness(Task):
    """Attention maps against the object's mask."""

    def protocol(self, inputs: Inputs) -> dict[str, Any]:
        """The rules that stand in no recipe."""
        return {
            "objectness": {
                "mask": "through the image's crop, nearest pixel, white is object; useless ones left out",
                "null": "maps of another image of the same 64, everybody's once per draw",
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
        columns = {name: joined(shards, name)[there] for name in shards[0] if name != "form"}
        levels = {level: columns[level].astype(np.float64).swapaxes(0, 1) for level in LEVELS}
        scores, ids = _Scores(levels, spec.shares), np.array(role.ids)
        main = int(inputs.spec.main_metric.rpartition("top")[2])
        outcomes = _outcomes(scores, columns, main, ids[there].tolist(), inputs.seeds)
        metrics = {}
        for name in outcomes.values:
            kind, _, share = name.rpartition("_top")
            chance = 0.0 if kind == "gain" else _told(scores.values("null_other", int(share)))["value"]
            metrics[name] = outcomes.metric(name, unit="", chance=chance)
        if inputs.spec.main_metric not in metrics:
            raise UsageError(
                f"{inputs.spec.name}: {inputs.spec.main_metric} compares with the maps of another image, and "
                "there is one image only. Use more images (a larger --limit)."
            )
        details = self._details(plan, scores) | {"attainable": _attainable(columns, spec.shares)}
        details["images"] = {
            "measured": int(there.sum()),
            "left_out_without_object": ids[~there].tolist(),
            "masks_without_object": ids[whole == 0].tolist(),
            "masks_all_object": ids[whole == 1].tolist(),
            "masks_unreadable": ids[np.isnan(whole)].tolist(),
            "masks_read_as": dict(sorted(Counter(forms.tolist()).items())),
            "masks_of_another_size": int(joined(shards, "resized").sum()),
            "mean_object_share": float(columns["object"].astype(np.float64).mean()),
        }
        most = details["attainable"][f"top{main}"]
        note = (
            f"miou_top{main} {most['any_map']:.2f} by any map, {most['mask_as_map']:.2f} by the mask itself "
            "at the resolution of the maps"
        )
        return Result(
            metrics=metrics,
            extra={"attainable": note},
            details={"objectness": details},
            outcomes=outcomes,
        )

    def _details(self, plan: Plan, scores: _Scores) -> dict[str, Any]:
        layers, times = plan.shape
        sweep: dict[str, Any] = {}
        for column, share in enumerate(scores.shares):
            cells = scores.levels["best"][:, :, :, column]  # [S, n, C]
            found = [estimate(cells[:, :, cell]) for cell in range(layers * times)]
            sweep[f"top{share}"] = {
                key: [
                    [getattr(found[row * times + time], key) for time in range(times)]
                    for row in range(layers)
                ]
                for key in ("value", "stderr")
            }
        over_rolled = {
            f"top{share}": _told(scores.values("best", share) - scores.values("null_rolled", share))
            for share in scores.shares
        }
        return {
            "layer": plan.request.layers[0],
            "time": plan.read_at[0] if plan.read_at else None,
            "best_head": scores.told("head", "null_other_head"),
            "mean_over_tokens": scores.told("mean", "null_other_mean"),
            "null_rolled": scores.told("null_rolled", None),
            "gain_over_rolled": over_rolled,
            "sweep": {
                "layers": list(plan.request.layers),
                "times": list(plan.request.times) if plan.read_at else [],
                "read_at": list(plan.read_at),
                "best_token": sweep,
                "note": OPTIMISTIC,
            },
            "layers_that_do_not_exist": list(plan.missing),
        }
