"""Sections of a task recipe that belong to one kind of task (``comit_bench.recipes.specs.KINDS``)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator


def _one_line(value: str) -> str:
    if not value.strip() or any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in value):
        raise ValueError("expected a non-empty text of one line without control characters")
    return value


Line = Annotated[str, AfterValidator(_one_line)]


class SpecModel(BaseModel):
    """What every part of a recipe has in common: unknown keys are errors, values never change.

    A number is no truth value and never NaN or infinite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, raw: Any) -> Any:
        for name, value in raw.items() if isinstance(raw, dict) else ():
            field = cls.model_fields.get(str(name))
            if isinstance(value, bool) and field is not None and not _takes(field.annotation, bool):
                raise ValueError(f"{name} is {str(value).lower()}, but a truth value means nothing to it")
        return raw


def _takes(annotation: Any, kind: type) -> bool:
    """Whether a type, or one of the types that it is made of, is ``kind``."""
    return annotation is kind or any(_takes(part, kind) for part in get_args(annotation))


class AttributesSpec(SpecModel):
    """What gets a score of its own beside the class.

    Parts of the class name, e.g. ``red_3`` -> colour, digit; kind ``retrieval`` also takes the names of
    attributes that the data set knows (``Split.attributes``).
    """

    separator: str = "_"
    fields: tuple[str, ...]


BLOCK = 4  # candidates of ``top1@4``


class NegativesSpec(SpecModel):
    """Which triplets a true one has to beat (kind ``relations``).

    Attributes:
        train: In-batch negatives per true triplet while training. Kinds of hard negatives that are reported
            are trained on as well, as many as are reported.
        report: Stored negatives per sample of the early-stop and report sets: 3, 7, 11, ... (groups of
            ``BLOCK`` with the true one). ``top1@4`` uses the first 3, ``top1@N`` all.
        predicate: Hard negatives with the same objects and another predicate; 0 leaves the metric out.
        swapped: Whether subject and object exchanged are a hard negative of their own.
        per_image: Samples per image in the early-stop and report sets; None is every true triplet.
    """

    train: Annotated[int, Field(ge=1)] = 15
    report: Annotated[int, Field(ge=BLOCK - 1)] = 15
    predicate: Annotated[int, Field(ge=0)] = 3
    swapped: bool = True
    per_image: Annotated[int, Field(ge=1)] | None = 1

    @field_validator("report")
    @classmethod
    def _whole_blocks(cls, value: int) -> int:
        if (value + 1) % BLOCK:
            raise ValueError(f"expected 3, 7, 11, 15, ...: with the true one, groups of {BLOCK}")
        return value


class TextSpec(SpecModel):
    """The frozen text encoder of kind ``relations``.

    ``encoder`` is ``random-t5`` (a small T5 encoder with weights drawn from ``seed`` and one vector per
    word), ``minilm-table`` (vectors of a sentence encoder for the concepts and predicates of the drawings),
    a hub id, or a local directory. Encoders average the vectors of a text's words.
    """

    encoder: str = "random-t5"
    seed: Annotated[int, Field(ge=0)] = 0
    revision: str | None = None


class ReconstructionSpec(SpecModel):
    """What is compared with the original images (kind ``reconstruction``).

    Attributes:
        features: Network whose features the Fréchet distance compares: ``inception`` gives ``rfid``,
            ``scenes-teacher`` gives ``fd_scenes_teacher``, None leaves it out.
        kid: Also the kernel distance on those features.
        precision_recall: Also improved precision and recall on those features.
        ssim: Also structural similarity.
        lpips: Backbone of LPIPS, which is measured when its weights are on this machine; None leaves it out.
        count: Compare this many images, the first in the order of a hash of their ids; None is all.
    """

    features: Literal["inception", "scenes-teacher"] | None = "inception"
    kid: bool = False
    precision_recall: bool = False
    ssim: bool = True
    lpips: Literal["alex", "vgg", "squeeze"] | None = "alex"
    count: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="after")
    def _features_for_sets(self) -> ReconstructionSpec:
        if self.features is None and (self.kid or self.precision_recall):
            raise ValueError("kid and precision_recall compare features: name a network for features")
        return self


class GatherSpec(SpecModel):
    """What a message gains with each crop (kind ``gather``).

    Attributes:
        full: Whether messages that are metrics are also decoded with the tokenizer's own settings.
        count: As for kind ``reconstruction``.
    """

    full: bool = False
    count: Annotated[int, Field(ge=2)] | None = None


class ObjectnessSpec(SpecModel):
    """Which attention maps are compared with the object's mask, and how (kind ``objectness``).

    The first layer at the first time gives the metrics; all others only go into the sweep of the record.

    Attributes:
        shares: Percent of the pixels with the largest attention that become the binary map; each is a metric.
        layers: Blocks whose maps are read. A fraction is a relative depth: 24/28 = 0.857 is the 24th of 28
            blocks, the 10th of 12, the 3rd of 4. Whole numbers count from 0, negative ones from the end;
            those that a tokenizer does not have are left out of its sweep.
        times: Flow times in [0, 1) at which maps are read while decoding; a decoder of one pass has no time.
        path: ``hard`` as in the released extraction, or ``model`` (see spec, attention maps).
        values: What is averaged over heads: ``logits`` as the released extraction gives them, or attention
            ``weights`` (after the softmax). Families whose queries are image places always give weights.
        resize: How maps are brought to the mask's size before the largest are taken.
        null_draws: Other images per image whose maps the null models take.
        null_seed: Of the null model.
    """

    shares: Annotated[tuple[Annotated[int, Field(gt=0, lt=100)], ...], Field(min_length=1)] = (10, 20, 30, 40)
    layers: Annotated[tuple[int | Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (0.857,)
    times: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=1)] = (0.5,)
    path: Literal["hard", "model"] = "hard"
    values: Literal["logits", "weights"] = "logits"
    resize: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    null_draws: Annotated[int, Field(ge=1)] = 4
    null_seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("shares", "layers", "times")
    @classmethod
    def _all_different(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"a value stands twice in {list(values)}")
        return values


class RetrievalSpec(SpecModel):
    """Nearest neighbours by message (kind ``retrieval``); ``k`` are the depths of recall@k."""

    k: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 5, 10)


class CodebookSpec(SpecModel):
    """How ids are used (kind ``codebook``).

    Attributes:
        pairs: Pairs of positions drawn for mutual information; all of them when there are not more.
        shuffles: Shuffles per pair behind its null.
        seed: Of pairs and shuffles.
    """

    pairs: Annotated[int, Field(ge=1)] = 64
    shuffles: Annotated[int, Field(ge=2)] = 16
    seed: Annotated[int, Field(ge=0)] = 0


class CounterfactualSpec(SpecModel):
    """Which tokens change when one thing in a scene changes (kind ``counterfactual``)."""

    null_draws: Annotated[int, Field(ge=1)] = 64
    seed: Annotated[int, Field(ge=0)] = 0
