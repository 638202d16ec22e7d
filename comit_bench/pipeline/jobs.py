"""What can be asked for: settings, and jobs (one tokenizer on one task)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from comit_bench.data.split import Split
from comit_bench.errors import UsageError, did_you_mean, shown
from comit_bench.files import cache_root
from comit_bench.recipes.specs import (
    CONTROLS,
    DatasetSpec,
    Recipe,
    TaskKind,
    TaskSpec,
    dataset_of,
    find_datasets,
    find_tasks,
    pick,
)
from comit_bench.seeding import seed_for
from comit_bench.tasks.base import Inputs, Task
from comit_bench.tasks.result import Result
from comit_bench.tokenizers.base import Tokenizer, looks_at_crops
from comit_bench.tokenizers.contract import check_tokenizer
from comit_bench.tokenizers.load import entry_for
from comit_bench.tokenizers.registry import BLIND, MAJORITY, TokenizerEntry
from comit_bench.tokenizers.registry import tokenizers as known_tokenizers

OptionValue = str | int | float
Overwrite = Literal["always", "never", "only-missing"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to evaluate. Every option of the command line that concerns work, and nothing else.

    Attributes:
        output: Directory of ``records/`` and ``tables/``.
        data_root: Where real data sets lie.
        cache: Token stores, fits and embedded data; None is ``$COMIT_BENCH_CACHE`` or the platform's.
        policy: Cropping policy of tokenizers that have one, or several, which make a row each; None is
            theirs.
        weights: Directory of weights or ``random``, for learned tokenizers.
        options: Options of tokenizers, e.g. ``{"posterior": "sample"}``. Each goes to the tokenizers that
            know it; ``"flextok.steps"`` goes to one family, or one tokenizer, alone.
        limit: Use this many images of each split; marks records incomplete.
        seeds: Number of probe seeds; None is the recipe's.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        dtype: ``float32`` or ``bfloat16``.
        batch_size: Images per encoding call; no score depends on it.
        num_workers: Image-reading processes.
        overwrite: What to do about records that exist: keep them (``only-missing``), stop there (``never``),
            or measure again from the images on, with new tokens (``always``).
        probe_lr: Learning rates to try for every probe, the best on early-stop images counts; empty is the
            recipe's alone.
        control: None, ``permute-labels``, ``shuffle-tokens`` or ``bag-of-tokens``.
        offline: Never ask a hub.
        include: Further recipe directories.
        allow_override: Whether those may replace built-in recipes.
        progress: Progress bars on stderr.
    """

    output: Path = Path("results")
    data_root: Path | None = None
    cache: Path | None = None
    policy: str | Sequence[str] | None = None
    weights: str | None = None
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    limit: int | None = None
    seeds: int | None = None
    device: str = "auto"
    dtype: str = "float32"
    batch_size: int = 64
    num_workers: int = 0
    overwrite: Overwrite = "only-missing"
    probe_lr: tuple[float, ...] = ()
    control: str | None = None
    offline: bool = False
    include: tuple[Path, ...] = ()
    allow_override: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("limit", self.limit, 1, None),
            ("seeds", self.seeds, 1, 10_000),
            ("batch-size", self.batch_size, 1, None),
            ("num-workers", self.num_workers, 0, 1_000),
        ):
            if value is not None and (value < least or (most is not None and value > most)):
                bounds = f"at least {least}" if most is None else f"from {least} to {most}"
                raise UsageError(f"--{name} must be {bounds}, got {shown(value)}")
        for rate in self.probe_lr:
            if not 0 < rate < math.inf or self.probe_lr.count(rate) > 1:
                raise UsageError(
                    f"--probe-lr {shown(rate)}: expected different numbers above 0, e.g. 1e-4,3e-4,1e-3"
                )
        if self.control is not None and self.control not in CONTROLS:
            raise UsageError(
                f"--control {shown(self.control)}: unknown control; one of {', '.join(CONTROLS)}."
                f"{did_you_mean(self.control, CONTROLS)}"
            )
        if self.data_root is not None and self.output.absolute() == self.data_root.absolute():
            raise UsageError(
                f"--output {self.output} is the data root: records and tables would lie among the data. Name "
                "another folder."
            )
        if self.policy is not None and not self.policies:
            raise UsageError("--policy: an empty list of cropping policies")

    @property
    def cache_dir(self) -> Path:
        return self.cache or cache_root()

    @property
    def policies(self) -> tuple[str | None, ...]:
        """Cropping policies in the order asked for, each once; ``(None,)`` when none was asked for."""
        if self.policy is None:
            return (None,)
        return tuple(dict.fromkeys([self.policy] if isinstance(self.policy, str) else self.policy))

    @property
    def records(self) -> Path:
        return self.output / "records"

    @property
    def lock(self) -> Path:
        """Held for the moment in which a record or the tables are written."""
        return self.output / ".lock"

    @property
    def selection(self) -> str:
        """Which images of a split are used, for keys."""
        return "all" if self.limit is None else f"limit-by-name:{self.limit}"

    def images_of(self, split: Split) -> list[int]:
        """The images used: all, or the ``limit`` first in the order of a hash of their names.

        The name is the id without folders: variants of one scene, in folders of their own, stay together.
        """
        if self.limit is None or self.limit >= len(split):
            return list(range(len(split)))
        order = sorted(
            range(len(split)), key=lambda index: seed_for(0, "limit/" + split.ids[index].rpartition("/")[2])
        )
        return sorted(order[: self.limit])


@dataclass(frozen=True, slots=True)
class Reference:
    """A row without a tokenizer: it sees no image and is measured wherever probes are fitted.

    Attributes:
        name: Of the row, its family included.
        knows: What it answers from.
        measure: Its numbers on a task.
        fits: Whether it fits a probe, in kinds that are ``blind``; else it takes no time.
    """

    name: str
    knows: str
    measure: Callable[[Task, Inputs], Result]
    fits: bool = False

    def takes(self, kind: TaskKind) -> bool:
        """Whether it has something to say about tasks of a kind."""
        return kind.probed and (kind.blind or not self.fits)


Who = str | Tokenizer | Reference  # a name, directory or hub id; an object; a reference row
REFERENCES = {
    reference.name: reference
    for reference in (
        Reference(MAJORITY, "labels of the train split", lambda task, inputs: task.majority(inputs)),
        Reference(BLIND, "labels of the train split", lambda task, inputs: task.blind(inputs), fits=True),
    )
}


@dataclass(frozen=True, slots=True)
class Job:
    """One row on one task.

    Attributes:
        tokenizer: Who is measured.
        task: On what.
        dataset: Its data.
        policy: The cropping policy asked for; None is the tokenizer's own.
    """

    tokenizer: Who
    task: Recipe[TaskSpec]
    dataset: Recipe[DatasetSpec]
    policy: str | None = None

    @property
    def label(self) -> str:
        if isinstance(self.tokenizer, str):
            return self.tokenizer
        return self.tokenizer.name if isinstance(self.tokenizer, Reference) else self.tokenizer.info.name

    @property
    def instant(self) -> bool:
        """Whether it takes no time: a reference row that fits nothing."""
        return isinstance(self.tokenizer, Reference) and not self.tokenizer.fits


def make_jobs(tokenizers: Sequence[str | Tokenizer], tasks: Sequence[str], settings: Settings) -> list[Job]:
    """Resolve names into jobs, task by task.

    Reference rows are there where they have something to say, never where no probe is fitted; under a control
    of probes kinds without are left out.
    """
    who = each_once(tokenizers)
    recipes = find_tasks(settings.include, allow_override=settings.allow_override)
    datasets = find_datasets(settings.include, allow_override=settings.allow_override)
    chosen = [pick(name, recipes, "task") for name in dict.fromkeys(tasks)]
    if settings.control is not None:
        probed = [task for task in chosen if task.spec.task_kind.probed]
        if chosen and not probed:
            raise UsageError(
                f"--control {settings.control} is about probes, and {', '.join(tasks)} fits none: leave it "
                "out"
            )
        chosen = probed
    for one in who:
        if not isinstance(one, str | Reference):
            check_tokenizer(one, "the tokenizer that was handed over")
    check_options(who, settings.options)
    policies = {id(one): settings.policies if takes_policies(one) else (None,) for one in who}
    own_crops = dict.fromkeys(task.spec.name for task in chosen if task.spec.task_kind.own_crops)
    if own_crops and settings.policy is not None:
        _log.warning("%s says itself which crops it looks at: --policy is ignored", ", ".join(own_crops))
    data = [dataset_of(task, datasets) for task in chosen]
    jobs = [
        Job(one, task, d, policy)
        for task, d in zip(chosen, data, strict=True)
        for one in who
        for policy in ((None,) if task.spec.name in own_crops else policies[id(one)])
        if not isinstance(one, Reference) or one.takes(task.spec.task_kind)
    ]
    if not jobs:
        names = " and ".join(str(one.name) for one in who if isinstance(one, Reference))
        raise UsageError(f"nothing to do: {', '.join(tasks)} asks more than {names or 'nobody'} can answer")
    return jobs


def each_once(tokenizers: Iterable[str | Tokenizer]) -> list[Who]:
    """Who is measured, in order, each once; names of the registry in lower case, as it has them."""
    known = known_tokenizers()
    found: list[Who] = []
    for given in tokenizers:
        one: Who = given
        if isinstance(given, str):
            name = given.lower()
            one = REFERENCES.get(name, name if name in known else given)
        if not any(one is other or (isinstance(one, str) and one == other) for other in found):
            found.append(one)
    return found


def takes_policies(tokenizer: Who) -> bool:
    """Whether a tokenizer looks at crops, so that every policy is a row of its own; or may, as far as known.

    Raises:
        UsageError: Unknown tokenizer, with the nearest names.
    """
    if isinstance(tokenizer, str):
        return entry_for(tokenizer).looks_at_crops() is not False
    return looks_at_crops(tokenizer)


def is_fitted(job: Job) -> bool:
    """Whether the tokenizer is fitted on the task's data."""
    if not isinstance(job.tokenizer, str):
        return False
    return entry_for(job.tokenizer).family.fitted and not Path(job.tokenizer).is_dir()


def options_of(job: Job, settings: Settings) -> dict[str, Any]:
    """The options of a job's tokenizer, which is given by name."""
    entry = entry_for(str(job.tokenizer))
    family = entry.family
    by_suite = {"paper": family.paper_options, "drawings": family.drawings_options}
    options: dict[str, Any] = dict(by_suite.get(job.task.spec.suite, ()))
    return options | entry.typed(options_for(entry, settings.options))


def _entries(tokenizers: Iterable[Who]) -> dict[str, TokenizerEntry]:
    """Registry entries of all that are given by name, hub id or directory."""
    return {one: entry_for(one) for one in tokenizers if isinstance(one, str)}


def _own_name(key: str, entry: TokenizerEntry) -> str | None:
    """What an option is called for a tokenizer; None when it is meant for others or not known."""
    whose, _, name = key.rpartition(".")
    if whose not in ("", entry.family.name, entry.name):
        return None
    known = entry.known_options()
    return name if known is None or name in known else None


def options_for(entry: TokenizerEntry, options: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
    """The options that a tokenizer knows; one that names its family wins over one that does not."""
    keys = sorted(options, key=lambda key: "." in key)
    return {name: options[key] for key in keys if (name := _own_name(key, entry)) is not None}


def check_options(tokenizers: Iterable[Who], options: Mapping[str, OptionValue]) -> None:
    """Refuse an option that no tokenizer of the run knows, and a value that one of them cannot read."""
    entries = _entries(tokenizers).values() if options else ()
    for entry in entries:
        entry.typed(options_for(entry, options))
    for key in options:
        if any(_own_name(key, entry) is not None for entry in entries):
            continue
        known = {
            f"{entry.family.name}.{name}" if "." in key else name
            for entry in entries
            for name in entry.known_options() or ()
        }
        raise UsageError(f"--option {key}: no tokenizer of this run has it.{did_you_mean(key, known)}")


def left_out(tokenizers: Iterable[Who], options: Mapping[str, OptionValue]) -> dict[str, list[str]]:
    """For each option the tokenizers that run without it, when it was not meant for one family alone."""
    entries = _entries(tokenizers) if options else {}
    without = {
        key: [name for name, entry in entries.items() if _own_name(key, entry) is None]
        for key in options
        if "." not in key
    }
    return {key: names for key, names in without.items() if names}
