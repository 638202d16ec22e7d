"""The training configuration: one YAML per preset, ``key=value`` overrides, everything validated first.

Letters in the descriptions say where a default comes from (spec, "Training as the paper describes it"):
[P] printed in the paper, [I] inferred, [N] not printed: our choice.
"""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from comit_bench.errors import UsageError, did_you_mean, shown
from comit_bench.files import check_relative, user_path
from comit_bench.nn.teachers import DrawingsTeacherSpec, ScenesTeacherSpec
from comit_bench.nn.vae import DCT_ORDERS
from comit_bench.recipes.kinds import SpecModel
from comit_bench.recipes.reading import parse_yaml
from comit_bench.recipes.specs import parse_mapping, validate_mapping
from comit_bench.tokenizers.comit.crops import GRID, CropGeometry
from comit_bench.tokenizers.comit.model import PRESETS, ComitSpec
from comit_bench.tokenizers.push import check_repository

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Level = Annotated[int, Field(ge=2, le=1_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
MOST_CROPS = 9  # of one image, beside a leading global crop that does not count
LONGEST_NAME = 100


def _one_folder(value: str) -> str:
    check_relative(value)
    if (
        value in (".", "..")
        or value != Path(value).name
        or len(value) > LONGEST_NAME
        or not value.isprintable()
    ):
        raise ValueError(
            f"expected the name of one folder, at most {LONGEST_NAME} characters, without slashes"
        )
    return value


def _a_path(value: Path) -> Path:
    user_path(value, "it")
    return value


Name = Annotated[str, AfterValidator(_one_folder)]
UserPath = Annotated[Path, AfterValidator(_a_path)]


class ModelConfig(SpecModel):
    """The network: a preset name, and what differs from it."""

    preset: str = "comit-nano"
    mask_mode: Literal["additive", "hard"] | None = None  # None: the preset's
    message_length: Count | None = None
    fsq_levels: Annotated[tuple[Level, ...], Field(min_length=1, max_length=32)] | None = None
    vocab_size: Count | None = None  # only checked against the levels
    depth: Count | None = None
    width: Count | None = None
    heads: Count | None = None
    representation_layer: Annotated[int, Field(ge=0)] | None = None
    in_channels: Count | None = None  # of the latents, in and out
    vae_factor: Count | None = None  # pixels of a latent; image and local crops grow with it
    image_size: Count | None = None  # only checked against latent side x VAE factor
    vae_path: UserPath | None = None  # directory of the SD-VAE; None: the hub
    # message: embedded codes start as strong as positions; released: a tenth of them [N for nano]
    init: Literal["released", "message"] = "released"

    def _changed(self, spec: ComitSpec) -> ComitSpec:
        """A preset's spec with the settings given here; crops grow with the pixels of a latent."""
        checked = {"preset", "vocab_size", "image_size", "vae_path", "init"}
        changes = self.model_dump(exclude=checked, exclude_none=True)
        if spec.vae != "dct" and {"in_channels", "vae_factor"} & changes.keys():
            raise ValueError(f"in_channels and vae_factor are for the DCT, but {self.preset} has {spec.vae}")
        if self.in_channels is not None:
            if self.in_channels not in DCT_ORDERS:
                known = " or ".join(map(str, DCT_ORDERS))
                raise ValueError(f"in_channels: expected {known} channels of the DCT, got {self.in_channels}")
            changes["out_channels"] = self.in_channels
        if self.vae_factor is not None:
            if self.vae_factor < 3:
                raise ValueError(f"vae_factor: expected 3 pixels a side or more, got {self.vae_factor}")
            crop, half = (
                n * self.vae_factor // spec.vae_factor for n in (spec.geometry.crop, spec.geometry.half)
            )
            changes["geometry"] = CropGeometry(crop=crop, half=half)
        return replace(spec, **changes)

    def spec(self) -> ComitSpec:
        """The network's spec, after making sure that all sizes fit each other."""
        if self.preset not in PRESETS:
            raise UsageError(f"model.preset: unknown {self.preset!r}.{did_you_mean(self.preset, PRESETS)}")
        try:
            spec = self._changed(PRESETS[self.preset])
            crop, cell = spec.geometry.crop, spec.vae_factor * spec.patch_size
            if crop % cell or crop >= spec.image_size:
                raise ValueError(
                    f"local crops of {crop} px must be a multiple of {cell} px (VAE factor x patch) and "
                    f"smaller than the image, {spec.image_size} px"
                )
            if spec.image_size - crop < GRID - 1:
                raise ValueError(
                    f"local crops of {crop} px leave no room for a {GRID} x {GRID} grid in an image of "
                    f"{spec.image_size} px, which crops.places=grid and every cropping policy need"
                )
        except ValueError as error:
            raise UsageError(f"model: {error}") from error
        vocabulary = math.prod(spec.fsq_levels)
        if self.vocab_size is not None and vocabulary != self.vocab_size:
            raise UsageError(
                f"model.vocab_size is {self.vocab_size}, but the levels "
                f"{list(spec.fsq_levels)} make {vocabulary}"
            )
        if spec.representation_layer >= spec.depth:
            raise UsageError(
                f"model.representation_layer {spec.representation_layer} (zero-based) needs depth "
                f"{spec.representation_layer + 1} or more, got {spec.depth}"
            )
        if self.image_size is not None and self.image_size != spec.image_size:
            raise UsageError(
                f"model.image_size is {self.image_size}, but {self.preset} has {spec.image_size}"
            )
        return spec


class CropsConfig(SpecModel):
    """Which crops a training sample sees.

    The number of crops is, for ``poisson``, u ~ N(ln(mean) - sigma^2/2, sigma), k = 1 + Poisson(exp(u)),
    clipped; for ``uniform``, any number up to ``max_crops`` alike. By default it is drawn once per step for
    the whole global batch, so every rank does the same work.
    """

    max_crops: Annotated[int, Field(ge=1, le=MOST_CROPS)] = MOST_CROPS  # [P]
    per: Literal["batch", "image"] = "batch"  # whose number of crops is drawn [N]
    # whether a leading global crop is one of max_crops; if not, such images see up to one crop more [N]
    count_global: bool = True
    count: Literal["poisson", "uniform"] = "poisson"  # [N]
    mean: Positive = 1.0  # of poisson: rbar of the scheme [N]
    sigma: NotNegative = 0.5  # of poisson [I: the cited work's value]
    # where local crops lie: anywhere, or on the cells of the inference grid, each at most once [N]
    places: Literal["uniform", "grid"] = "uniform"
    global_first: Share = 0.55  # probability that the first crop is the whole image [I],
    # among the images that are encoded, or among all, those decoded from the empty message included [N]
    global_first_among: Literal["encoded", "all"] = "encoded"
    # weight of the flow's loss where no crop has looked, against 1 where one has [N: 1]
    unseen_weight: Annotated[float, Field(gt=0, le=1)] = 1.0


class Phase(SpecModel):
    """Crops of the steps before ``until``, where they differ from those of ``crops``."""

    until: Count
    max_crops: Annotated[int, Field(ge=1, le=MOST_CROPS)] | None = None
    count_global: bool | None = None
    count: Literal["poisson", "uniform"] | None = None
    mean: Positive | None = None
    places: Literal["uniform", "grid"] | None = None
    global_first: Share | None = None
    global_first_among: Literal["encoded", "all"] | None = None
    unseen_weight: Annotated[float, Field(gt=0, le=1)] | None = None


class ObjectiveConfig(SpecModel):
    """Losses and their weights."""

    skip: Share = 0.18  # probability of the empty message [I]
    skipped_offset: Literal["last-crop", "zero"] = "last-crop"  # offset of skipped samples [N]
    srepa_on_skipped: bool = False  # [N]
    time_mu: float = -0.5  # t = sigmoid(mu + sigma n), mu < 0 is skewed to noise [P: sign, N: value]
    time_sigma: Positive = 1.0  # [N]
    backprop_updates: Count | Literal["all"] = 1  # message updates that get gradient, the last ones [P]
    repa_weight: NotNegative = 0.5  # [N]
    srepa_weight: NotNegative = 0.5  # [N]
    alignment_ramp: Annotated[int, Field(ge=0)] = 0  # steps over which both weights rise from 0 [N]
    projector_width: Count = 768  # [P]
    projector_layers: Annotated[int, Field(ge=2)] = 3  # [P]
    message_dropout: Share = 0.0  # share of images whose message skips quantization [N: code default 0]
    # what stands for an image in the SD-VAE's posterior; the released program samples when it encodes [N]
    posterior: Literal["mode", "sample"] = "mode"


class TeacherConfig(SpecModel):
    """Frozen features for the alignment losses; ``none`` needs both weights at 0."""

    name: Literal[
        "none", "dinov2-b", "dinov2-l", "efficientnet-lite0", "scenes-teacher", "drawings-teacher"
    ] = "none"
    path: UserPath | None = None
    cache: Literal["none", "disk"] = "none"  # disk: features of every image are computed once and kept
    cache_dtype: Literal["float32", "float16"] = "float32"  # float16 halves the disk, and rounds


class DataConfig(SpecModel):
    """Images to train on.

    ``source`` is, for class-folders, a directory of images in any tree; for hf, a directory of
    ``save_to_disk``, a local copy (Parquet, Arrow, image folders) or a hub id; for webdataset, a directory
    of ``.tar`` files, a glob, or a pattern like ``DIR/train-{000000..000146}.tar``. A source without
    validation images gives away ``val_count`` of its own, at most a tenth.
    """

    kind: Literal["scenes", "drawings", "class-folders", "hf", "webdataset"] = "scenes"
    source: str | None = None  # None for scenes and drawings
    val_source: str | None = None  # webdataset only: shards for validation
    subset: str | None = None  # hf only: configuration of a repository that has several
    revision: str | None = None  # hf only: commit or tag on the hub
    image_key: str | None = None  # hf: column; webdataset: suffixes, e.g. jpg;png; None: found
    id_key: str | None = None  # hf only: column of unique names; None: stored file names or row numbers
    title: str | None = None  # name of the data in tables; None: from kind and source
    split: str = "train"
    val_split: str = "val"  # hf: also finds validation and valid
    count: Count = 4000  # scenes and drawings only
    val_count: Annotated[int, Field(ge=2)] = 500
    flip: Share = 0.0  # probability that an image is mirrored left to right [N]
    max_broken: Share = 0.001
    workers: Annotated[int, Field(ge=0)] = 0
    # scenes and drawings: all images lie on the device, and noise is drawn there (it rounds otherwise)
    on_device: bool = False

    def contradiction(self) -> str | None:
        """What is wrong with the settings taken together, or None."""
        takes = {
            "source": ("class-folders", "hf", "webdataset"),
            "val_source": ("webdataset",),
            "subset": ("hf",),
            "revision": ("hf",),
            "image_key": ("hf", "webdataset"),
            "id_key": ("hf",),
        }
        if self.kind not in ("scenes", "drawings") and self.source is None:
            what = {"hf": "DIR or OWNER/NAME", "webdataset": "DIR or DIR/{000..146}.tar"}.get(
                self.kind, "DIR"
            )
            return f"data.kind {self.kind} needs data.source: give data.source={what}"
        if self.on_device and (self.kind not in ("scenes", "drawings") or self.workers):
            return (
                "data.on_device is for images that are painted into memory and made by no other process: it "
                f"needs data.kind scenes or drawings and data.workers 0, not {self.kind} and {self.workers}"
            )
        wrong = [key for key, kinds in takes.items() if getattr(self, key) and self.kind not in kinds]
        if wrong:
            kinds = " or ".join(takes[wrong[0]])
            return f"data.{wrong[0]} is for data.kind {kinds}, but data.kind is {self.kind}"
        return None


class OptimConfig(SpecModel):
    """Adam as printed in the paper, or Muon for the matrices inside the blocks and Adam for the rest.

    Both follow the same schedule: linear warm-up, then inverse square root [P], or a cosine down to
    5 % at ``cosine_steps``, constant afterwards.
    """

    name: Literal["adam", "muon"] = "adam"  # [P]
    learning_rate: Positive = 3e-4  # [P]
    muon_learning_rate: Positive = 0.02  # [N]
    muon_momentum: Share = 0.95  # [N]
    cosine_steps: Count | None = None  # [N]
    warmup_steps: Annotated[int, Field(ge=0)] = 5000  # [P]
    betas: tuple[float, float] = (0.9, 0.999)  # [P]
    eps: Positive = 1e-8  # [I]
    weight_decay: NotNegative = 0.0  # [P]
    clip: Positive = 1.0  # norm [P, I]
    ema: Share = 0.999  # [P]
    ema_warmup: bool = False  # min(ema, (1 + step) / (10 + step)) for short runs [N]


class ValidationConfig(SpecModel):
    """How reconstructions are made for the measures and the picture; nothing here is trained on."""

    steps: Count = 10  # solver steps of guided reconstructions, as in decoding
    guidance: NotNegative = 7.5  # their guidance weight, as in decoding; 0 and 1 switch it off
    pictures: Annotated[int, Field(ge=1, le=32)] = 8  # images in the picture
    picture_crops: Annotated[int, Field(ge=1, le=9)] = 4  # crops of each; never above crops.max_crops
    gather: Count = 500  # images whose messages are also made of local crops


class ExportConfig(SpecModel):
    """The exported folder."""

    dtype: Literal["float32", "float16"] = "float32"  # of the stored weights; both load


# What may differ between a checkpoint and the run that continues from it: nothing here changes a number.
FREE = frozenset(
    {
        "steps", "output", "device_batch", "log_every", "validate_every", "save_every",
        "keep_last", "max_bad_steps", "weights_licence", "group", "data.workers", "data.max_broken",
        "data.on_device", "on_device",  # they change rounding
        "data.title", "data.source", "data.val_source", "model.vae_path", "teacher.path", "model.image_size",
        "model.vocab_size", "val_count",
        "activation_checkpointing", "compile", "sharding",  # the last two change rounding, as ranks do
        "teacher.cache", "tensorboard", "push_to_hub", "push_private", "validation.steps",
        "validation.guidance", "validation.pictures", "validation.picture_crops", "validation.gather",
        "export.dtype",
    }
)  # fmt: skip


class RunConfig(SpecModel):
    """What the settings of every training have."""

    free: ClassVar[frozenset[str]] = FREE

    name: Name
    seed: Seed = 0
    steps: Count
    output: UserPath = Path("runs")
    log_every: Count = 50
    validate_every: Count = 1000
    save_every: Count = 1000
    keep_last: Count = 3
    max_bad_steps: Count = 5
    weights_licence: str = "unspecified"
    group: Name | None = None  # what trainings of this recipe with other seeds have in common, for tables
    tensorboard: bool = False  # also write event files; needs the extra `track`


class TrainConfig(RunConfig):
    """A whole run. ``global_batch`` is per optimizer step over all ranks; the rest is derived."""

    global_batch: Count
    device_batch: Count | None = None  # None: global_batch over ranks, in one piece
    precision: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False  # blocks are computed again in the backward pass
    # blocks and teacher, by Inductor: needs a C++ compiler (gcc) on a CPU, Triton on CUDA; rounds otherwise
    compile: bool = False
    # fsdp2: weights, gradients, averages and Adam's moments are spread over the processes
    sharding: Literal["none", "fsdp2"] = "none"
    push_to_hub: str | None = None  # USER/NAME: upload the exported folder there
    push_private: bool = False
    model: ModelConfig = ModelConfig()
    crops: CropsConfig = CropsConfig()
    curriculum: tuple[Phase, ...] = ()  # phases before that of `crops`, by rising `until` [N]
    objective: ObjectiveConfig = ObjectiveConfig()
    teacher: TeacherConfig = TeacherConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    validation: ValidationConfig = ValidationConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        weights = self.objective.repa_weight + self.objective.srepa_weight
        if self.teacher.name == "none" and weights > 0:
            raise ValueError(
                "teacher.name is none: set objective.repa_weight and srepa_weight to 0, or name one"
            )
        if self.sharding == "fsdp2" and self.optim.name == "muon":
            raise ValueError("sharding fsdp2 spreads the matrices that muon needs whole: use optim.name=adam")
        if wrong := self._wrong_crops():
            raise ValueError(wrong)
        if wrong := self.data.contradiction():
            raise ValueError(wrong)
        if self.objective.posterior == "sample" and not (vae := self.model.spec().vae).startswith("sd-"):
            raise ValueError(
                f"objective.posterior sample needs the SD-VAE, but the autoencoder of {self.model.preset} "
                f"({vae}) has no posterior: use mode"
            )
        if self.teacher.cache_dtype != "float32" and self.teacher.cache == "none":
            raise ValueError("teacher.cache_dtype without a cache: set teacher.cache=disk")
        if self.push_to_hub is not None:
            check_repository(self.push_to_hub, "push_to_hub")
        return self

    def crops_at(self, step: int) -> CropsConfig:
        """Crops of a zero-based step: of the first phase that it lies in, or ``crops``."""
        for phase in self.curriculum:
            if step < phase.until:
                return self.crops.model_copy(update=phase.model_dump(exclude={"until"}, exclude_none=True))
        return self.crops

    def _wrong_crops(self) -> str | None:
        """What is wrong with the crops of some phase, or None."""
        ends = [phase.until for phase in self.curriculum]
        if any(one >= other for one, other in pairwise(ends)):
            return f"curriculum: the phases must end one after another, but `until` is {ends}"
        phases = [self.crops_at(until - 1) for until in ends] + [self.crops]
        updates, encoded = self.objective.backprop_updates, 1 - self.objective.skip
        if updates != "all" and updates > max(crops.max_crops for crops in phases):
            return "objective.backprop_updates is larger than crops.max_crops"
        for crops in phases:
            if crops.global_first_among == "all" and crops.global_first > encoded + 1e-9:
                return (
                    f"crops.global_first {crops.global_first:g} of all images is more than the "
                    f"{encoded:g} that are encoded (1 - objective.skip)"
                )
        return None


class SmallRun(RunConfig):
    """A training that one CPU core does in minutes: one process, float32, scenes painted in memory."""

    precision: ClassVar[Literal["float32"]] = "float32"
    sharding: ClassVar[Literal["none"]] = "none"
    activation_checkpointing: ClassVar[bool] = False

    batch: Count = 64
    device_batch: Count | None = None  # None: the whole batch at once

    @property
    def global_batch(self) -> int:
        return self.batch


class FeaturesRun(SmallRun):
    """A run that trains a small network of features; Adam's rate falls along a cosine over all steps."""

    free: ClassVar[frozenset[str]] = FREE - {"steps"}  # the cosine ends there

    steps: Count = 2000
    learning_rate: Positive = 2e-3
    warmup_steps: Count = 100
    patch_weight: NotNegative = 0.5
    count: Annotated[int, Field(ge=100)] = 20000  # training scenes, of each layout where there are several
    val_count: Annotated[int, Field(ge=60)] = 1000
    save_every: Count = 250
    weights_licence: str = "Apache-2.0"

    @property
    def optim(self) -> OptimConfig:
        return OptimConfig(
            learning_rate=self.learning_rate, warmup_steps=self.warmup_steps, cosine_steps=self.steps
        )

    def sizes(self, spec: type[Any]) -> Any:
        """The network's sizes."""
        try:
            return spec(**self.model_dump(include={f.name for f in fields(spec)}))
        except ValueError as error:
            raise UsageError(f"{self.name}: {error}") from error


class TeacherRun(FeaturesRun):
    """A run that trains ``scenes-teacher``; sizes of the network are those of its spec."""

    kind: Literal["scenes-teacher"]
    name: Name = "scenes-teacher"
    image_size: int = 32
    patch: int = 4
    width: int = 48
    depth: int = 1
    dim: int = 128

    def spec(self) -> ScenesTeacherSpec:
        found: ScenesTeacherSpec = self.sizes(ScenesTeacherSpec)
        return found


class DistillationRun(FeaturesRun):
    """A run that trains ``drawings-teacher`` to give the features of a large network, ``teacher``."""

    kind: Literal["drawings-teacher"]
    name: Name = "drawings-teacher"
    teacher: TeacherConfig
    image_size: int = 64
    width: int = 24
    middle: int = 48
    last: int = 80
    depth: int = 1
    hidden: int = 256
    dim: int = 128

    @model_validator(mode="after")
    def _fits(self) -> DistillationRun:
        if self.teacher.name in ("none", "scenes-teacher", "drawings-teacher"):
            raise ValueError(
                f"teacher.name {self.teacher.name}: learn from efficientnet-lite0, dinov2-b or dinov2-l"
            )
        if self.teacher.cache != "disk":
            raise ValueError("teacher.cache: the large network sees every scene once, set it to disk")
        return self

    def spec(self) -> DrawingsTeacherSpec:
        found: DrawingsTeacherSpec = self.sizes(DrawingsTeacherSpec)
        return found


class AutoencoderRun(SmallRun):
    """A run that trains a small autoencoder on the scenes: one loss on pixels, one on the codebook."""

    kind: Literal["autoencoder"]
    model: Literal["vq-grid-nano", "titok-nano"]
    steps: Count = 3000
    batch: Annotated[int, Field(ge=2)] = 64
    # the images of data.kind, data.count, data.val_count and data.flip of the COMiT presets
    data: Literal["scenes", "drawings"] = "scenes"
    count: Count = 50000
    val_count: Annotated[int, Field(ge=2)] = 500
    flip: Share = 0.0
    on_device: bool = False  # all images lie there
    image_size: Count | None = None  # None: the preset's; else patches grow with the image
    codebook_weight: NotNegative = 1.0  # of the quantizer's losses, where it has any
    commitment: NotNegative = 0.25
    # rows of a codebook that nothing chose for that many steps become vectors of the batch; 0: never
    restart_every: Annotated[int, Field(ge=0)] = 0
    restart_until: Annotated[int, Field(ge=0)] = 0  # no restarts from this step on
    log_every: Count = 25
    validate_every: Count = 250
    save_every: Count = 250
    weights_licence: str = "Apache-2.0"
    optim: OptimConfig = OptimConfig()

    @model_validator(mode="after")
    def _fits(self) -> AutoencoderRun:
        if self.optim.ema or self.optim.ema_warmup:
            raise ValueError("optim.ema: an autoencoder exports its last weights, set optim.ema to 0")
        if self.restart_every and self.model == "vq-grid-nano":
            raise ValueError("restart_every: vq-grid-nano has no codebook to restart, set it to 0")
        return self


AnyRun = TrainConfig | TeacherRun | DistillationRun | AutoencoderRun


def presets() -> dict[str, Path]:
    """Shipped training presets by name."""
    folder = Path(str(files("comit_bench"))) / "train" / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _override(raw: dict[str, Any], text: str) -> None:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UsageError(
            f"override {shown(text)}: expected key=value, e.g. train.steps=50 or optim.learning_rate=1e-3"
        )
    parts = key.split(".")
    if parts[0] == "train":  # train.steps is the same as steps
        parts = parts[1:]
    place = raw
    for part in parts[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise UsageError(f"override {shown(text)}: {part!r} is no section")
    number = parse_yaml(value, f"override {shown(text)}")
    if isinstance(number, str) and _EXPONENT.fullmatch(number):  # YAML 1.1 reads 1e-3 as text
        number = float(number)
    place[parts[-1]] = number


def _read(name_or_file: str, overrides: tuple[str, ...]) -> tuple[dict[str, Any], Path]:
    """The mapping of a preset or file with its overrides, and where it lies."""
    known = presets()
    path = known.get(name_or_file.lower()) or user_path(name_or_file, "--config")
    if not path.exists():
        raise UsageError(
            f"--config {name_or_file}: neither a preset nor a file.{did_you_mean(name_or_file, known)}"
        )
    raw = parse_mapping(path)
    base = raw.pop("extends", None)
    if base is not None:
        if not isinstance(base, str) or base not in known:
            raise UsageError(f"{path}: extends unknown preset {shown(base)}.{did_you_mean(str(base), known)}")
        parent = parse_mapping(known[base])
        if "extends" in parent:
            raise UsageError(f"{path}: extends goes one level deep, but {base!r} extends another preset")
        for key, value in raw.items():
            parent[key] = {**parent.get(key, {}), **value} if isinstance(value, dict) else value
        raw = parent
    for text in overrides:
        _override(raw, text)
    return raw, path


def load_config(name_or_file: str, overrides: tuple[str, ...] = ()) -> AnyRun:
    """Read a preset or file, apply ``key=value`` overrides, validate everything.

    A file may start from a preset with ``extends: NAME`` (one level); sections are merged key by key.
    """
    raw, path = _read(name_or_file, overrides)
    kind = raw.get("kind", "comit")
    if kind == "scenes-teacher":
        teacher = validate_mapping(raw, path, TeacherRun)
        teacher.spec()
        return teacher
    if kind == "drawings-teacher":
        distillation = validate_mapping(raw, path, DistillationRun)
        distillation.spec()
        return distillation
    if kind == "autoencoder":
        return validate_mapping(raw, path, AutoencoderRun)
    if raw.pop("kind", "comit") != "comit":
        raise UsageError(
            f"{path}: kind {shown(kind)}: expected comit, scenes-teacher, drawings-teacher or autoencoder"
        )
    config = validate_mapping(raw, path, TrainConfig)
    config.model.spec()
    return config
