"""Kind ``reconstruction``: images -> messages -> images, and how much of them came back.

The reference of every number are the same images after the tokenizer's own crop, as uint8, and never an
image that was saved or resized again. Decoded images stay where they were decoded until they are numbers;
no image is written. In the same pass both sides go through the feature network, unless an earlier
tokenizer with the same preprocessing has left the statistics of the originals in the cache.

Decoders that draw noise decode once per seed. Those that draw none (``tokenizers.base.decodes_with_noise``)
decode once, and every seed has the same values: their spread over seeds is 0.

=====================  =========================================================================
``psnr``               dB, mean over images; ``chance``: every image painted in the mean colour of all
``ssim``               at most 1, mean over images
``lpips``              mean over images, when its weights are on this machine
``rfid``               Fréchet distance of Inception features
``fd_scenes_teacher``  the same on features of the scenes-teacher; never comparable with an FID, and never
                       ranked: tokenizers trained with SREPA had this teacher
``kid``, ``kd_...``    kernel distance on the same features
``precision``,         improved precision and recall on the same features
``recall``
=====================  =========================================================================

Means over images (the first three) have outcomes; distances between sets have none and no standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comit_bench.data.images import Step, image_size, output_side, parse_preprocessing
from comit_bench.errors import MissingError, UnsupportedOperation
from comit_bench.files import digest_json
from comit_bench.metrics import frechet, perceptual, similarity
from comit_bench.metrics.frechet import Statistics
from comit_bench.recipes.kinds import ReconstructionSpec
from comit_bench.recipes.specs import TaskSpec
from comit_bench.results.outcomes import Outcomes
from comit_bench.results.schema import Metric
from comit_bench.seeding import seed_for
from comit_bench.tasks.base import Inputs, Role, Rows, Task, check_main_metric
from comit_bench.tasks.result import Result
from comit_bench.tasks.shards import (
    Batch,
    Columns,
    batches,
    load_columns,
    noise_seeds,
    save_columns,
    shard_by_shard,
)
from comit_bench.tokenizers.base import Tokenizer, decodes_with_noise
from comit_bench.tokenizers.contract import check_decoded

SHOWN = 10  # worst and best images whose ids the record keeps
REFERENCE_FORMAT = 1  # of the cached statistics of originals
PIXELS = {"psnr": ("dB", True), "ssim": ("", True), "lpips": ("", False)}
Float = NDArray[np.float64]


class Reconstruction(Task):
    """Decoded images against the originals."""

    def protocol(self, inputs: Inputs) -> dict[str, Any]:
        """Resolution, view and number of images are the column's, not only the tokenizer's."""
        section = inputs.spec.reconstruction
        protocol = pixel_protocol(inputs, section.count)
        if section.features is not None:
            protocol["features"] = perceptual.feature_identity(section.features)
        if section.kid:
            kid = {"subsets": frechet.KID_SUBSETS, "size": frechet.KID_SIZE, "seed": frechet.KID_SEED}
            protocol["kid"] = kid
        if section.precision_recall:
            protocol["neighbours"] = frechet.NEIGHBOURS
        return protocol

    def prepare(self, spec: TaskSpec, *, cache: Path, offline: bool) -> None:
        """Weights of the feature network; nothing is ever downloaded for a measurement."""
        name = spec.reconstruction.features
        if name == "inception":
            perceptual.find_inception()
            if find_spec("torchvision") is None:
                raise MissingError(f"rFID needs torchvision beside torch-fidelity: {perceptual.EXTRA}")

    def refuses(self, spec: TaskSpec, tokenizer: Tokenizer) -> str | None:
        """Tokenizers without a decoder, and images too small for SSIM."""
        if not callable(getattr(tokenizer, "decode", None)):
            return "it has no decoder, so there is nothing to compare with the originals"
        side = tokenizer.info.resolution
        if spec.reconstruction.ssim and side < similarity.WINDOW:
            return f"SSIM needs images of at least {similarity.WINDOW} px, and it sees {side} px"
        return None

    def decodings(self, spec: TaskSpec) -> float:
        return 1.0

    def run(self, inputs: Inputs) -> Result | None:
        """Decode everything, once per noise seed where there is noise, and compare."""
        inputs.check()
        role = first_images(inputs.roles["report"], inputs.spec.reconstruction.count)
        meter = _Meter.of(inputs, role)
        runs = []
        seeds = inputs.seeds if decodes_with_noise(inputs.the_tokenizer()) else inputs.seeds[:1]
        for number, seed in enumerate(seeds):
            shards = meter.look(seed, originals=number == 0)
            if shards is None:
                continue
            runs.append(_gather(shards, keep=meter.keeps_features))
            if number == 0:
                meter.keep_reference(runs[0])
        return _result(meter, runs) if inputs.ranks.first else None


def pixel_protocol(inputs: Inputs, count: int | None) -> dict[str, Any]:
    """What numbers about pixels must have in common; ``count`` is the most images, None is all."""
    role, info = inputs.roles["report"], inputs.the_tokenizer().info
    images = len(role) if count is None else min(len(role), count)
    return {
        "column": f"{info.resolution} px, {images} images",
        "images": images,
        "resolution": info.resolution,
        "view": view_of(role.split.preprocessing(info.preprocessing), role),
        "psnr_cap": similarity.PSNR_CAP,
    }


def view_of(preprocessing: str, role: Role) -> str:
    """What of the images a recipe shows, in words; equal where two recipes show the same.

    Images that have the final size already are shown as they are. Else ``center_crop|resize(N,F)`` and
    ``resize_short(N,F)|center_crop(N)`` both show the centred square at N pixels (they differ in how they
    round an odd margin), and any other recipe stands for itself.
    """
    steps, side = parse_preprocessing(preprocessing), output_side(preprocessing)
    turned = ", upright" if steps[0].name == "exif" else ""
    steps = steps[1:] if turned else steps
    if all(step.size in (None, side) for step in steps) and _all_squares(role, side):
        return f"as they are, {side} px{turned}"
    if len(steps) == 2:
        one, two = steps
        crop_first = one == Step("center_crop") and two.name == "resize"
        resize_first = one.name == "resize_short" and two == Step("center_crop", one.size)
        if crop_first or resize_first:
            return f"centred square, {side} px, {two.filter or one.filter}{turned}"
    return preprocessing


def _all_squares(role: Role, side: int) -> bool:
    """Whether every image that can be opened has this size; stops at the first that has not."""
    return all(image_size(role.split.paths, int(index)) in (None, (side, side)) for index in role.images)


def first_images(role: Role, count: int | None) -> Role:
    """The ``count`` first images in the order of a hash of their ids; broken ones are gone already."""
    if count is None or count >= len(role):
        return role
    ids = role.ids
    order = sorted(range(len(ids)), key=lambda row: seed_for(0, "count/" + ids[row]))
    return replace(role, rows=role.rows[np.sort(order[:count])])


@dataclass(slots=True)
class _Reference:
    """The originals as a set; ``features`` only where subsets or neighbours are asked for."""

    statistics: Statistics
    features: NDArray[np.float32] | None = None

    def columns(self) -> dict[str, NDArray[np.generic]]:
        s = self.statistics
        columns: dict[str, Any] = {"count": np.array(s.count), "mean": s.mean, "scatter": s.scatter}
        return columns if self.features is None else {**columns, "features": self.features}

    @classmethod
    def load(cls, path: Path, *, features: bool) -> _Reference | None:
        columns: Any = load_columns(path)
        if columns is None or (features and "features" not in columns):
            return None
        statistics = Statistics(int(columns["count"]), columns["mean"], columns["scatter"])
        return cls(statistics, columns["features"] if features else None)


@dataclass(slots=True)
class _Run:
    """What one seed gave: numbers per image, and both sets."""

    pixels: dict[str, Float]  # psnr, ssim, lpips; moments of the originals
    decoded: Statistics | None
    originals: _Reference | None
    features: NDArray[np.float32] | None


@dataclass(slots=True)
class _Meter:
    """Measures shards of a role, and keeps the statistics of the originals."""

    inputs: Inputs
    role: Role
    spec: ReconstructionSpec
    network: perceptual.FeatureNetwork | None
    lpips: Callable[[Tensor, Tensor], Tensor] | None
    left_out: list[str] = field(default_factory=list)
    reference: _Reference | None = None

    @classmethod
    def of(cls, inputs: Inputs, role: Role) -> _Meter:
        spec, left_out = inputs.spec.reconstruction, []
        features, lpips = spec.features, spec.lpips
        if lpips is not None:
            reason = inputs.ranks.share(perceptual.why_no_lpips(lpips))
            if reason is not None:
                left_out.append(f"lpips ({reason})")
                lpips = None
        if features is not None and len(role) < 2:
            left_out.append("distances between sets (they need at least two images)")
            features = None
        network, judge = inputs.ranks.together(
            lambda: (
                None if features is None else perceptual.feature_network(features, inputs.device),
                None if lpips is None else perceptual.load_lpips(lpips, inputs.device),
            )
        )
        meter = cls(inputs, role, spec, network, judge, left_out)
        if network is not None and inputs.ranks.first:
            meter.reference = _Reference.load(meter.reference_path, features=meter.keeps_features)
        return meter

    @property
    def keeps_features(self) -> bool:
        """Whether the vectors themselves are needed, not only their statistics."""
        return self.network is not None and (self.spec.kid or self.spec.precision_recall)

    @property
    def reference_path(self) -> Path:
        """One file per set of images, preprocessing and network: tokenizers share it."""
        assert self.spec.features is not None
        data = self.inputs.data
        key = {
            "format": REFERENCE_FORMAT,
            "data": data.fingerprints[self.role.split.name],
            "ids": digest_json(self.role.ids),
            "preprocessing": self.role.split.preprocessing(self.inputs.the_tokenizer().info.preprocessing),
            "features": perceptual.feature_identity(self.spec.features),
            "vectors": self.keeps_features,
            "device": self.inputs.device.type,
        }
        return self.inputs.cache / "references" / f"{digest_json(key)[7:31]}.npz"

    def look(self, seed: int, *, originals: bool) -> Iterable[Columns] | None:
        """All shards of one seed on the first process; None on the others.

        The originals' features are computed beside, unless they are known. Work that was begun with
        them goes on with them.
        """
        plain = f"decoding-{seed}"
        both = f"{plain}-and-originals"
        work = self.inputs.work
        begun = work is not None and any(work.glob(f"{both}-*.npz"))
        wanted = originals and self.network is not None and (self.reference is None or begun)
        wanted = self.inputs.ranks.share(wanted)
        return shard_by_shard(
            self.inputs,
            self.role,
            both if wanted else plain,
            lambda positions: self.measure(positions, seed, originals=wanted),
        )

    def measure(self, positions: Rows, seed: int, *, originals: bool) -> dict[str, NDArray[np.generic]]:
        """Numbers of one shard; the calls below see the whole shard, whatever the batch size is."""
        images, decoded = [], []
        for batch in batches(self.inputs, self.role, positions):
            decoded.append(self.decode(batch, seed))
            images.append(batch.images.to(decoded[-1].device, non_blocking=True))
        one, two = torch.cat(images), torch.cat(decoded)
        columns: dict[str, Tensor] = {"psnr": similarity.psnr(one, two), "moments": moments(one)}
        if self.spec.ssim:
            columns["ssim"] = similarity.ssim(one, two)
        if self.lpips is not None:
            columns["lpips"] = self.lpips(one, two)
        if self.network is not None:
            columns["decoded"] = self.network(two)
            if originals:
                columns["originals"] = self.network(one)
        return {name: value.cpu().numpy() for name, value in columns.items()}

    def decode(self, batch: Batch, seed: int) -> Tensor:
        """uint8 [b, 3, S, S] where the tokenizer runs.

        Raises:
            UnsupportedOperation: The tokenizer has no decoder; names it.
            BenchError: It returned no such images.
        """
        tokenizer = self.inputs.the_tokenizer()
        try:
            decoded = tokenizer.decode(batch.tokens, seeds=noise_seeds(seed, batch.ids))
        except (UnsupportedOperation, NotImplementedError) as error:
            raise UnsupportedOperation(
                f"{tokenizer.info.name} is left out of {self.inputs.spec.name}: it cannot decode ({error})"
            ) from error
        return check_decoded(decoded, tokenizer.info, len(batch.ids))

    def keep_reference(self, run: _Run) -> None:
        """Remember the originals, for the next seed and for the next tokenizer."""
        if run.originals is not None:
            self.reference = run.originals
            save_columns(self.reference_path, run.originals.columns())


def moments(images: Tensor) -> Tensor:
    """int64 [B, 2, 3]: sums over pixels, and sums of squares, per colour channel."""
    values = images.long().flatten(2)
    return torch.stack([values.sum(dim=2), values.square().sum(dim=2)], dim=1)


def _gather(shards: Iterable[Columns], *, keep: bool) -> _Run:
    """Join the numbers per image; sum up features shard by shard and forget them unless they are needed."""
    pixels: dict[str, list[Any]] = {}
    sums: dict[str, Statistics] = {}
    vectors: dict[str, list[Any]] = {}
    for shard in shards:
        for name, values in shard.items():
            if name not in ("decoded", "originals"):
                pixels.setdefault(name, []).append(values)
                continue
            part = Statistics.of(cast(Any, values))
            sums[name] = sums[name].merged(part) if name in sums else part
            if keep:
                vectors.setdefault(name, []).append(values)
    whole = {name: np.concatenate(parts) for name, parts in vectors.items()}
    originals = _Reference(sums["originals"], whole.get("originals")) if "originals" in sums else None
    joined = {name: np.concatenate(parts) for name, parts in pixels.items()}
    return _Run(joined, sums.get("decoded"), originals, whole.get("decoded"))


def _result(meter: _Meter, runs: Sequence[_Run]) -> Result:
    inputs, ids = meter.inputs, meter.role.ids
    times = len(inputs.seeds) // len(runs)  # that a run stands for: 1, or all where nothing is random
    values = {
        name: np.stack([run.pixels[name] for run in runs] * times).astype(np.float64)
        for name in PIXELS
        if name in runs[0].pixels
    }
    outcomes = Outcomes(ids=ids, seeds=inputs.seeds, values=values)
    null = null_psnr(runs[0].pixels["moments"], inputs.the_tokenizer().info.resolution)
    metrics: dict[str, Metric] = {}
    for name in values:
        unit, better = PIXELS[name]
        chance = null["all"] if name == "psnr" else None
        metrics[name] = outcomes.metric(name, unit=unit, chance=chance, higher_is_better=better)
    metrics |= _between_sets(meter, runs, null["colour"], times)
    check_main_metric(inputs.spec, metrics)
    details: dict[str, Any] = {
        "psnr_own_mean_colour": null["own"],
        "identical": int((values["psnr"] >= similarity.PSNR_CAP).all(axis=0).sum()),
        "decodings": len(runs),
        **_extremes(ids, values["psnr"].mean(axis=0)),
    }
    extra = {"left_out": "; ".join(meter.left_out)} if meter.left_out else {}
    return Result(metrics=metrics, extra=extra, details=details, outcomes=outcomes)


def null_psnr(moments: NDArray[np.generic], side: int) -> dict[str, Any]:
    """PSNR of decoders that paint one colour, exactly, from sums over pixels.

    Args:
        moments: int64 [n, 2, 3], see ``_moments``.
        side: Of the images, in pixels.

    Returns:
        ``all``: every image in the mean colour of all images; ``own``: every image in its own mean
        colour; ``colour``: the three values of the former, rounded to uint8.
    """
    pixels = side * side
    sums, squares = moments[:, 0].astype(np.float64), moments[:, 1].astype(np.float64)  # [n, 3]

    def mean_psnr(colour: Float) -> float:
        error = (squares - 2 * colour * sums + pixels * colour**2).sum(axis=1) / (3 * pixels)
        return float(similarity.psnr_of(torch.from_numpy(error)).mean())

    colour = np.rint(sums.mean(axis=0) / pixels)
    return {"all": mean_psnr(colour), "own": mean_psnr(np.rint(sums / pixels)), "colour": colour}


def _between_sets(meter: _Meter, runs: Sequence[_Run], colour: Float, times: int) -> dict[str, Metric]:
    """Distances between the set of originals and the set of reconstructions, per run ``times`` over.

    The scenes-teacher is no judge to rank by: it taught the tokenizers that were trained with SREPA.
    """
    network, reference, spec = meter.network, meter.reference, meter.spec
    if network is None or reference is None:
        return {}
    n = len(meter.role)
    inception = spec.features == "inception"
    side = meter.inputs.the_tokenizer().info.resolution
    plain = torch.from_numpy(colour).to(torch.uint8)[None, :, None, None].expand(1, 3, side, side)
    point = network(plain.contiguous())[0].numpy()

    def metric(values: list[float], unit: str, *, chance: float | None = None, more: bool) -> Metric:
        return Metric.from_seeds(
            values * times, n=n, unit=unit, chance=chance, higher_is_better=more, unranked=not inception
        )

    distances = [frechet.frechet_distance(reference.statistics, _known(run.decoded)) for run in runs]
    null = frechet.distance_to_point(reference.statistics, point)
    name = "rfid" if inception else "fd_scenes_teacher"
    metrics = {name: metric(distances, "", chance=null, more=False)}
    if spec.kid:
        pairs = ((_known(reference.features), _known(run.features)) for run in runs)
        kernel = [1000 * frechet.kernel_distance(*pair)[0] for pair in pairs]
        name = "kid" if inception else "kd_scenes_teacher"
        metrics[name] = metric(kernel, "×1e-3", more=False)
    if spec.precision_recall and n <= frechet.NEIGHBOURS:
        meter.left_out.append(f"precision and recall (they need more than {frechet.NEIGHBOURS} images)")
    elif spec.precision_recall:
        both = [frechet.precision_recall(_known(reference.features), _known(run.features)) for run in runs]
        metrics["precision"] = metric([p for p, _ in both], "%", more=True)
        metrics["recall"] = metric([r for _, r in both], "%", more=True)
    return metrics


def _known(value: Any) -> Any:
    assert value is not None
    return value


def _extremes(ids: Sequence[str], values: Float) -> dict[str, list[dict[str, object]]]:
    """The worst and the best images by PSNR, the worst or best first; equals in the order of their ids."""
    order = sorted(range(len(ids)), key=lambda row: (float(values[row]), ids[row]))
    best = sorted(range(len(ids)), key=lambda row: (-float(values[row]), ids[row]))

    def told(rows: Sequence[int]) -> list[dict[str, object]]:
        return [{"id": ids[row], "psnr": float(values[row])} for row in rows[:SHOWN]]

    return {"worst": told(order), "best": told(best)}
