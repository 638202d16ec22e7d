"""Recipes: find, read and validate the YAML under ``probes/`` and ``datasets/``.

Recipes are data, never code. Three places are searched, later ones only add: the ones that ship
with the package, those of installed plugins (entry-point group ``comit_bench.recipes``, each a
directory), and ``--include-path DIR``. Taking an existing name twice is an error unless
``allow_override`` is set; every recipe remembers where it came from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    BaseModel,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from comit_bench.errors import SHOWN, MissingError, UsageError, did_you_mean, shown
from comit_bench.files import check_relative, check_url
from comit_bench.recipes.kinds import (
    AttributesSpec,
    CodebookSpec,
    CounterfactualSpec,
    GatherSpec,
    Line,
    NegativesSpec,
    ObjectnessSpec,
    ReconstructionSpec,
    RetrievalSpec,
    SpecModel,
    TextSpec,
)
from comit_bench.recipes.reading import read_yaml

Version = Annotated[int, Field(ge=1, le=1_000_000)]
Kind = Literal["probes", "datasets", "results"]
RECIPE_FILE = {"probes": "task.yaml", "datasets": "dataset.yaml"}


class ProbeSpec(SpecModel):
    """The probe network and its fit (paper, Appendix B.2).

    ``batch_size`` is global. One epoch is one pass over the training messages.
    """

    width: Annotated[int, Field(gt=0)] = 768
    depth: Annotated[int, Field(gt=0)] = 2
    heads: Annotated[int, Field(gt=0)] = 8
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    batch_size: Annotated[int, Field(gt=0)] = 256
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_epochs: Annotated[int, Field(gt=0)] = 100
    patience: Annotated[int, Field(gt=0)] = 10

    @model_validator(mode="after")
    def _heads_divide(self) -> ProbeSpec:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class EarlyStopSpec(SpecModel):
    """Where early stopping looks: a share held out of ``source``, or ``source`` itself when 1.0.

    The share is taken by a hash of the sample id, so it depends on nothing else.
    """

    source: str = "train"
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.1


class SplitSpec(SpecModel):
    """Which split plays which role.

    ``folds`` above 1 (kind ``multilabel``): the sets of categories are divided into that many parts, and
    the report images of each part are answered by probes that were trained on the other parts.
    """

    train: str = "train"
    report: str = "val"
    early_stop: EarlyStopSpec = EarlyStopSpec()
    folds: Annotated[int, Field(ge=1, le=100)] = 1


@dataclass(frozen=True, slots=True)
class TaskKind:
    """How one kind of task is done: everything about a kind stands here and in its module.

    Other packages name theirs as an entry point of the group ``comit_bench.tasks``.

    A kind that is not ``probed`` fits nothing: it reads the images of ``split.report`` only, once per
    seed of the recipe, has no majority row, and controls of probes mean nothing to it.

    Attributes:
        task: ``module:Class`` of its :class:`comit_bench.tasks.base.Task`.
        data: Kinds of data set it can use, see ``comit_bench.data.split``; empty is any.
        main_metric: What a recipe reports first when it does not say.
        sections: Sections of a recipe that only this kind has.
        probed: Whether a probe is fitted on messages.
        decodes: Whether images are decoded, so that the decoder's settings are part of the protocol.
        blind: Whether the probe reads a question beside the message, so that one without a message can
            answer: it is the row ``blind``.
        own_crops: Whether the task says which crops are looked at, so that ``--policy`` means nothing to it.
    """

    task: str
    data: tuple[str, ...]
    main_metric: str
    sections: frozenset[str] = frozenset({"options"})
    probed: bool = True
    decodes: bool = False
    blind: bool = False
    own_crops: bool = False

    def takes(self, data: str) -> bool:
        """Whether a data set of this kind can be used."""
        return not self.data or data in self.data


def _probed(task: str, data: str, main_metric: str, *sections: str, blind: bool = False) -> TaskKind:
    return TaskKind(f"comit_bench.tasks.{task}", (data,), main_metric, frozenset(sections), blind=blind)


def _unprobed(task: str, data: str, main_metric: str, *sections: str, decodes: bool = False) -> TaskKind:
    takes = (data,) if data else ()
    return TaskKind(
        f"comit_bench.tasks.{task}", takes, main_metric, frozenset(sections), probed=False, decodes=decodes
    )


KINDS = {
    "classification": _probed("classification:Classification", "classes", "top1", "attributes"),
    "multilabel": _probed("multilabel:Multilabel", "multilabel", "top5"),
    "relations": _probed("relations:Relations", "relations", "top1@4", "negatives", "text", blind=True),
    "reconstruction": _unprobed("reconstruction:Reconstruction", "", "psnr", "reconstruction", decodes=True),
    "gather": TaskKind(
        "comit_bench.tasks.gather:Gather",
        (),
        "gather_gain",
        frozenset({"gather"}),
        probed=False,
        decodes=True,
        own_crops=True,
    ),
    "objectness": _unprobed("objectness:Objectness", "masks", "miou_top20", "objectness", decodes=True),
    "retrieval": _unprobed("retrieval:Retrieval", "classes", "recall@1", "retrieval", "attributes"),
    "codebook": _unprobed("codebook:Codebook", "", "perplexity", "codebook"),
    "counterfactual": _unprobed(
        "counterfactual:Counterfactual", "classes", "disentanglement", "counterfactual"
    ),
}
# What kind of data set a reader makes, see ``comit_bench.data.split``.
READS = {"class-folders": "classes", "coco": "multilabel", "visual-genome": "relations", "saliency": "masks"}


def _of_others(group: str, known: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Name and object of every entry point of a group."""
    for point in entry_points(group=group):
        if point.name in known:
            raise UsageError(f"{group}: {point.value!r} takes the name {point.name!r}, which exists already")
        try:
            yield point.name, point.load()
        except Exception as error:  # somebody else's module may raise anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UsageError(
                f"{group}: {point.name!r} cannot be loaded from {point.value!r} ({reason}). Mend it, or "
                "uninstall its package."
            ) from error


@cache
def kinds() -> dict[str, TaskKind]:
    """Kinds of tasks: the built-in ones, and those of other packages (entry points ``comit_bench.tasks``)."""
    found = dict(KINDS)
    for name, kind in _of_others("comit_bench.tasks", KINDS):
        if not isinstance(kind, TaskKind):
            raise UsageError(
                f"comit_bench.tasks: {name!r} names a {type(kind).__name__}, expected a "
                "comit_bench.recipes.specs.TaskKind"
            )
        found[name] = kind
    return found


@cache
def readers() -> dict[str, str]:
    """Reader -> kind of data it makes; those of other packages (``comit_bench.readers``) say theirs."""
    return READS | {name: reader.kind for name, reader in _of_others("comit_bench.readers", READS)}


@cache
def reader_of_others(name: str) -> Any:
    """The reader of another package, see ``comit_bench.data.readers.common.Reader``."""
    return dict(_of_others("comit_bench.readers", READS))[name]


CONTROLS = ("permute-labels", "shuffle-tokens", "bag-of-tokens")


class TaskSpec(SpecModel):
    """One ``probes/<name>/task.yaml``. Bump ``version`` whenever a score may change.

    Tasks with ``by_default: false`` are done only when they are named, or with
    ``--tasks all``. ``seeds`` are probe seeds, or where nothing is fitted seeds of the decoder's noise.
    ``options`` are settings of kinds from other packages.
    """

    name: Line
    version: Version
    title: Line
    kind: Line
    suite: Literal["scenes", "drawings", "paper", "extra"]
    dataset: Line
    split: SplitSpec = SplitSpec()
    probe: ProbeSpec = ProbeSpec()
    seeds: Annotated[int, Field(ge=1, le=10_000)] = 3
    main_metric: str = ""
    by_default: bool = True
    attributes: AttributesSpec | None = None
    negatives: NegativesSpec = NegativesSpec()
    text: TextSpec = TextSpec()
    reconstruction: ReconstructionSpec = ReconstructionSpec()
    gather: GatherSpec = GatherSpec()
    objectness: ObjectnessSpec = ObjectnessSpec()
    retrieval: RetrievalSpec = RetrievalSpec()
    codebook: CodebookSpec = CodebookSpec()
    counterfactual: CounterfactualSpec = CounterfactualSpec()
    options: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, value: str) -> str:
        if value not in kinds():
            raise ValueError(
                f"no such kind of task; known are {', '.join(kinds())}.{did_you_mean(value, kinds())}"
            )
        return value

    @model_validator(mode="after")
    def _sections_of_the_kind(self) -> TaskSpec:
        for section in sorted(self._foreign_sections()):
            if section in self.model_fields_set and getattr(self, section) is not None:
                raise ValueError(f"section {section!r} means nothing to kind {self.kind!r}: remove it")
        if not self.main_metric:
            object.__setattr__(self, "main_metric", self.task_kind.main_metric)
        return self

    def _foreign_sections(self) -> set[str]:
        """Sections that only other kinds have."""
        known = {"probe", "options"}.union(*(kind.sections for kind in KINDS.values()))
        return known - self.task_kind.sections - ({"probe"} if self.task_kind.probed else set())

    @property
    def task_kind(self) -> TaskKind:
        return kinds()[self.kind]

    @property
    def split_names(self) -> tuple[str, ...]:
        """Splits that the task reads, each once."""
        names = (self.split.train, self.split.report, self.split.early_stop.source)
        return tuple(dict.fromkeys(names if self.task_kind.probed else (self.split.report,)))

    @model_serializer(mode="wrap")
    def _own_sections(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the sections of other kinds: their defaults must not enter this recipe's digest."""
        values: dict[str, Any] = handler(self)
        foreign = self._foreign_sections() | {"by_default"}  # no number depends on the last one
        return {key: value for key, value in values.items() if key not in foreign}


class GeneratorSpec(SpecModel):
    """How an embedded dataset is made (``comit_bench.data.scenes.generate``).

    ``name``: ``scenes`` are digits, ``drawings`` drawings of things. ``objects``: how many at most, of the
    layout ``mixture`` (drawings to train on, in memory only).
    """

    name: Literal["scenes", "drawings"] = "scenes"
    layout: Literal["recognition", "pairs", "relations", "objectness", "counterfactual", "mixture"]
    variant: Literal["default", "hard"] = "default"
    seed: int = 0
    image_size: Annotated[int, Field(ge=16)] = 32
    train: Annotated[int, Field(ge=0)] = 4000
    val: Annotated[int, Field(ge=1)] = 1000
    objects: int | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Settings of sets that were made before ``objects`` existed stay as they are."""
        values: dict[str, Any] = handler(self)
        return {key: value for key, value in values.items() if value is not None}


class PairsSpec(SpecModel):
    """Which images of a COCO file are samples, and how they are split (reader ``coco``).

    Samples are the images with exactly two categories. ``pair-disjoint`` pools the files of ``splits`` and
    divides *pairs of categories* between train and val (``comit_bench.data.splitting``); ``given`` keeps each
    file's images where they are, and so does ``given-disjoint``, for which a pair in both files is an error.
    Without ``pool`` an image is kept only if its file is on its pair's side.
    ``crowd``: whether a region marked ``iscrowd`` makes its category present.
    ``columns``: length of the target vector, column = category id - 1; null ends it at the largest id.
    """

    policy: Literal["pair-disjoint", "given", "given-disjoint"] = "pair-disjoint"
    pool: bool = True
    val_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: int = 0
    crowd: Literal["count", "ignore"] = "count"
    columns: Annotated[int, Field(ge=2)] | None = None


class RelationsSpec(SpecModel):
    """Which relations are samples, and how images are split (reader ``visual-genome``).

    ``min_area`` is a share of the image's area, asked of ``both`` objects or of at least one (``either``).
    ``words`` is the size of the one vocabulary of subjects and objects, ``predicates`` of the other; both
    are counted on train images. ``val_share`` of the images is chosen by a hash of their id when ``splits``
    names no lists of ids. ``synsets``: whether words of one synset count as synonyms, which are no negatives
    of each other.
    """

    min_area: Annotated[float, Field(ge=0, le=1)] = 0.05
    area_of: Literal["both", "either"] = "both"
    words: Annotated[int, Field(ge=1)] = 150
    predicates: Annotated[int, Field(ge=1)] = 150
    val_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: int = 0
    aliases: bool = True
    synsets: bool = True
    exclude_coco: bool = False


class DownloadSpec(SpecModel):
    """One file that may be downloaded freely, and where its content goes (relative to the folder).

    ``checksum`` is ``<algorithm>:<hex>``; ``creates`` names what is there once it is unpacked.
    """

    url: str
    file: str
    size: Annotated[int, Field(gt=0)] | None = None
    checksum: Annotated[str, Field(pattern=r"^(md5|sha1|sha256):[0-9a-f]+$")] | None = None
    unpack: str | None = None
    creates: str


class DatasetSpec(SpecModel):
    """One ``datasets/<name>/dataset.yaml``.

    ``folder`` names the directory under the data root (or, with a generator, under the cache). ``splits``
    maps a split name to candidate sub-directories (class-folders, saliency) or label files (the others),
    ``images`` and ``labels`` name further candidates, ``shards`` and ``hub_copies`` tar shards and copies of
    Hugging Face sets to be read where no folder is; the first one found wins. ``expected`` says how
    many images the official data set has: by split; for coco how many each annotation file lists; for
    visual-genome under ``images`` how many ``image_data.json`` lists. Other counts are noted and warned
    about, and what differs by more than the share ``max_broken`` makes records incomplete. ``exif``: whether
    photographs are turned upright as their EXIF orientation says; when it is not said, only those with
    masks are, since ImageNet and MSCOCO are read as they are stored.
    """

    name: Line
    version: Version
    title: Line
    reader: str
    folder: Line
    splits: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    class_list: str | None = None
    labelled: bool = True
    shards: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    hub_copies: tuple[str, ...] = ()
    images: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    labels: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    pairs: PairsSpec = PairsSpec()
    relations: RelationsSpec = RelationsSpec()
    expected: dict[str, int] = Field(default_factory=dict)
    generator: GeneratorSpec | None = None
    checksum: str | None = None
    downloads: tuple[DownloadSpec, ...] = ()
    licence: str
    homepage: str | None = None
    obtain: str | None = None
    max_broken: Annotated[float, Field(ge=0, le=1)] = 0.01
    exif: bool | None = None

    @field_validator("reader")
    @classmethod
    def _known_reader(cls, value: str) -> str:
        if value not in readers():
            raise ValueError(
                f"no such reader; known are {', '.join(readers())}.{did_you_mean(value, readers())}"
            )
        return value

    @model_validator(mode="after")
    def _expected_is_counted(self) -> DatasetSpec:
        known = ("images",) if self.reader == "visual-genome" else tuple(self.splits)
        for name in self.expected:
            if name not in known:
                raise ValueError(f"expected: nothing is counted as {name!r}.{did_you_mean(name, known)}")
        return self

    @property
    def upright(self) -> bool:
        """Whether photographs are turned upright as their EXIF orientation says."""
        if self.exif is not None:
            return self.exif
        return self.reader == "saliency" and self.generator is None

    def made_in(self, cache: Path) -> Path:
        """With a generator: where the images of this version are made. Those of older versions stay."""
        return cache / "datasets" / f"{self.folder}-v{self.version}"


def check_paths(spec: DatasetSpec, *, strict: bool = False) -> None:
    """Refuse a recipe that names files outside of the data set's folder.

    Args:
        spec: A data set's recipe.
        strict: Also a list of classes that does not lie beside the recipe.

    Raises:
        UsageError: Names the key and the value.
    """
    found: list[tuple[str, str, bool]] = [("name", spec.name, False), ("folder", spec.folder, False)]
    for key in ("splits", "images", "labels", "shards"):
        places = getattr(spec, key)
        found += [(f"{key}.{what}", place, True) for what, several in places.items() for place in several]
    found += [("hub_copies", place, True) for place in spec.hub_copies]
    if strict and spec.class_list is not None:
        found.append(("class_list", spec.class_list, False))
    for item in spec.downloads:
        found += [("downloads.file", item.file, False), ("downloads.creates", item.creates, False)]
        found += [("downloads.unpack", item.unpack, True)] if item.unpack is not None else []
    for key, value, here in found:
        try:
            check_relative(value, here=here)
        except ValueError as error:
            raise UsageError(f"dataset {spec.name}: {key}: {error}. Expected a path below it.") from error


S = TypeVar("S", bound=SpecModel)
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Recipe(Generic[S]):
    """A validated recipe and where it came from."""

    spec: S
    path: Path
    origin: str

    @property
    def digest(self) -> str:
        """sha256 over the resolved values: comments and key order do not matter."""
        text = json.dumps(self.spec.model_dump(mode="json"), sort_keys=True)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def sibling(self, name: str) -> Path:
        """A file beside the recipe, e.g. its class list."""
        return self.path.parent / name


def recipe_root(kind: Kind) -> Path:
    """Where the built-in recipes lie: inside a wheel, or beside the package in a checkout."""
    package = Path(str(files("comit_bench")))
    for root in (package / "_recipes" / kind, package.parent / kind):
        if root.is_dir():
            return root
    raise MissingError(f"{kind} recipes are missing from this installation of comit_bench: reinstall it")


def _plugin_roots() -> list[tuple[str, Path]]:
    roots = []
    for point in entry_points(group="comit_bench.recipes"):
        value = point.load()
        roots.append((f"plugin:{point.name}", Path(value() if callable(value) else value)))
    return roots


def _search_roots(kind: Kind, include: tuple[Path, ...]) -> list[tuple[str, Path]]:
    roots = [("builtin", recipe_root(kind))]
    roots += [(origin, root / kind) for origin, root in _plugin_roots()]
    for directory in include:
        if not directory.is_dir():
            raise UsageError(f"--include-path {directory}: not a directory")
        nested = directory / kind
        roots.append((str(directory), nested if nested.is_dir() else directory))
    return roots


def _nearest_key(error: dict[str, Any], model: type[BaseModel]) -> str:
    """For an unknown key, walk to the model it sits in and suggest a known key."""
    fields: dict[str, Any] = dict(model.model_fields)
    for part in error["loc"][:-1]:
        annotation = getattr(fields.get(str(part)), "annotation", None)
        for candidate in (annotation, *getattr(annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                fields = dict(candidate.model_fields)
    return did_you_mean(str(error["loc"][-1]), fields)


def parse_mapping(path: Path) -> dict[str, Any]:
    """Read one YAML file as a mapping; errors as for :func:`read_yaml`."""
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: expected a mapping of keys to values, found {type(raw).__name__}")
    return raw


def validate_mapping(raw: dict[str, Any], path: Path, model: type[M]) -> M:
    """Turn a mapping into ``model``.

    Raises:
        UsageError: Names the file, the key, the value and the nearest valid key.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as failure:
        lines = []
        for problem in failure.errors():
            where = ".".join(str(part)[:SHOWN] for part in problem["loc"]) or "(top level)"
            if problem["type"] == "extra_forbidden":
                lines.append(f"  {where}: unknown key.{_nearest_key(dict(problem), model)}")
            elif problem["type"] == "missing":
                lines.append(f"  {where}: required key is missing")
            elif isinstance(problem["input"], dict):  # a rule about several keys
                lines.append(f"  {where}: {problem['msg'].removeprefix('Value error, ')}")
            else:
                lines.append(f"  {where} = {shown(problem['input'])}: {problem['msg']}")
        raise UsageError(f"{path}: not a valid {model.__name__}\n" + "\n".join(lines)) from failure


def parse_recipe(path: Path, model: type[M]) -> M:
    """Read one YAML file into ``model``; errors as for :func:`validate_mapping`."""
    kinds(), readers()  # what is wrong with a package is not the recipe's fault
    spec = validate_mapping(parse_mapping(path), path, model)
    if isinstance(spec, DatasetSpec):
        try:
            check_paths(spec, strict=True)
            for item in spec.downloads:
                check_url(item.url, checked=item.checksum is not None)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
    return spec


def _discover(
    kind: Kind, model: type[S], include: tuple[Path, ...], allow_override: bool
) -> dict[str, Recipe[S]]:
    found: dict[str, Recipe[S]] = {}
    for origin, root in _search_roots(kind, include):
        for path in sorted(folder / RECIPE_FILE[kind] for folder in root.iterdir() if folder.is_dir()):
            if not path.exists() and not path.is_symlink():
                continue
            spec = parse_recipe(path, model)
            name = str(getattr(spec, "name", ""))
            if name != path.parent.name:
                raise UsageError(f"{path}: name is {shown(name)} but its folder is {path.parent.name!r}")
            if name in found and not allow_override:
                raise UsageError(
                    f"{path}: {name!r} is already defined by {found[name].path}. "
                    "Rename it, or pass --allow-override to replace the other."
                )
            found[name] = Recipe(spec, path, origin)
    return found


def find_tasks(
    include: tuple[Path, ...] = (), *, allow_override: bool = False
) -> dict[str, Recipe[TaskSpec]]:
    """All task recipes by name."""
    return _discover("probes", TaskSpec, include, allow_override)


def find_datasets(
    include: tuple[Path, ...] = (), *, allow_override: bool = False
) -> dict[str, Recipe[DatasetSpec]]:
    """All dataset recipes by name."""
    return _discover("datasets", DatasetSpec, include, allow_override)


def check_fit(task: Recipe[TaskSpec], dataset: Recipe[DatasetSpec]) -> None:
    """Refuse a task whose data set is of another kind, or lacks a split that the task names."""
    spec, data = task.spec, dataset.spec
    kind, found = spec.task_kind, readers()[data.reader]
    if not kind.takes(found):
        raise UsageError(
            f"{task.path}: kind {spec.kind!r} needs data of kind {' or '.join(kind.data)}, but {data.name} "
            f"is of kind {found!r}"
        )
    for name in spec.split_names:
        if name not in data.splits:
            raise UsageError(
                f"{task.path}: split {shown(name)} does not exist in {data.name} (it has "
                f"{', '.join(data.splits)})"
            )


def dataset_of(task: Recipe[TaskSpec], datasets: dict[str, Recipe[DatasetSpec]]) -> Recipe[DatasetSpec]:
    """The data set of a task, after making sure that they fit each other."""
    if task.spec.dataset not in datasets:
        raise UsageError(
            f"{task.path}: unknown dataset {shown(task.spec.dataset)}."
            f"{did_you_mean(task.spec.dataset, datasets)}"
        )
    check_fit(task, datasets[task.spec.dataset])
    return datasets[task.spec.dataset]


def pick(name: str, known: dict[str, Recipe[S]], what: str) -> Recipe[S]:
    """Look a name up; UsageError suggests the nearest."""
    if name not in known:
        raise UsageError(f"unknown {what} {shown(name)}.{did_you_mean(name, known)}")
    return known[name]
