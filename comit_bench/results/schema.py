"""What a result record holds (schema 3).

Schemas 2 and 3 add optional keys to schema 1 and change none: files of each load, and each is written back
as the schema it came with. An optional key stands in a file only when it says something; a model names those
keys in ``OPTIONAL``.

A record holds everything a table prints and everything needed to judge whether two numbers may
stand in one column. Identity, from coarse to fine:

- the tokenizer: name, weights and revision (random and trained weights are two tokenizers);
- the task: name and version;
- the protocol: every value that can change a number, as plain JSON. What belongs to the tokenizer
  (preprocessing, cropping policy, options) sits under the key ``"tokenizer"``, everything else is
  the task's side. Tables give each task side its own columns and each tokenizer side its own row.
  ``control`` and ``limit`` must be in the protocol whenever they are set, so that neither a
  control nor a shortened run can ever take the place of a real one.
"""

from __future__ import annotations

import json
import math
import platform
import re
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from comit_bench import __version__
from comit_bench.files import digest_json
from comit_bench.recipes.kinds import Line
from comit_bench.results.checkout import git_state

if TYPE_CHECKING:
    from comit_bench.tokenizers.base import TokenizerInfo

SCHEMA_VERSION: Final = 3
TOKENIZER_KEY = "tokenizer"
_TOLERANCE = 1e-6


def _utc(value: datetime) -> datetime:
    return value.astimezone(UTC)


Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Origin = Literal["measured", "paper", "reference"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    OPTIONAL: ClassVar[frozenset[str]] = frozenset()  # left out of files where they have their defaults

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        for key in self.OPTIONAL:
            if getattr(self, key) == type(self).model_fields[key].get_default(call_default_factory=True):
                del values[key]
        return values


class Metric(_Model):
    """One number with its spread. Proportions are in percent.

    Two different uncertainties are kept apart:

    - ``std`` is the sample standard deviation (n - 1) over seeds: how much the fit varies. It is
      what tables print after the ±. None with a single seed.
    - ``stderr`` is the standard error of ``value``: how much it would vary with other images and other
      seeds, see :mod:`comit_bench.metrics.statistics`. None for metrics of a whole set (a Fréchet
      distance). Records made before version 3 of the schema count clusters of images as independent, and
      those before version 2 hold the part of the images alone.

    Attributes:
        value: Mean over seeds, in ``unit``.
        n: Samples each seed was evaluated on; None only in published records.
        per_seed: One value per seed in the order of ``Record.seeds``; may be empty when published.
        chance: Score of guessing, in ``unit``; None when there is no such thing.
        unit: ``%``, ``dB``, or empty for plain numbers.
        unranked: True where rows must not be ranked by it, because it favours some of them by how they
            were made.
    """

    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"unranked"})

    value: float
    std: Annotated[float, Field(ge=0)] | None = None
    stderr: Annotated[float, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1)] | None
    per_seed: tuple[float, ...] = ()
    higher_is_better: bool
    chance: float | None = None
    unit: Annotated[str, Field(max_length=12)] = "%"
    unranked: bool = False

    @classmethod
    def from_seeds(
        cls,
        per_seed: Sequence[float],
        *,
        n: int,
        higher_is_better: bool = True,
        chance: float | None = None,
        unit: str = "%",
        stderr: float | None = None,
        unranked: bool = False,
    ) -> Metric:
        """Summarise one value per seed, all of the same ``n`` samples.

        Args:
            per_seed: At least one value, in ``unit``.
            n: Samples behind each value.
            higher_is_better: Direction of the metric.
            chance: Score of guessing, in ``unit``.
            unit: See the class.
            stderr: Standard error of the mean.
            unranked: See the class.

        Raises:
            ValueError: No values, or one that is not finite.
        """
        values = [float(v) for v in per_seed]
        if not values:
            raise ValueError("a metric needs at least one value, one per seed")
        return cls(
            value=statistics.fmean(values),
            std=statistics.stdev(values) if len(values) > 1 else None,
            stderr=stderr,
            n=n,
            per_seed=tuple(values),
            higher_is_better=higher_is_better,
            chance=chance,
            unit=unit,
            unranked=unranked,
        )

    @model_validator(mode="after")
    def _adds_up(self) -> Metric:
        if not self.per_seed:
            return self
        mean = statistics.fmean(self.per_seed)
        if not math.isclose(self.value, mean, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
            raise ValueError(f"value {self.value} is not the mean {mean} of per_seed")
        if len(self.per_seed) == 1:
            if self.std is not None:
                raise ValueError("std must be null with a single seed")
            return self
        std = statistics.stdev(self.per_seed)
        if self.std is None or not math.isclose(self.std, std, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
            raise ValueError(f"std {self.std} is not the sample standard deviation {std} of per_seed")
        return self


class TokenizerRow(_Model):
    """Which tokenizer the number belongs to. None where a publication does not say.

    ``weights`` is ``sha256:<hex>``, ``random:<seed>``, ``fitted:<hex>``, ``none`` or, for
    published numbers, ``unknown``. The other fields are those of ``TokenizerInfo``; ``group`` is None for a
    training that stands alone.
    """

    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"group"})

    name: Line
    family: Line
    kind: Literal["learned", "baseline", "reference"]
    weights: Line
    revision: Line | None = None
    trained: bool = True
    parameters: Count | None = None
    message_length: Count | None = None
    vocab_size: Count | None = None
    code_dim: Count | None = None
    resolution: Count | None = None
    training_data: str = "unknown"
    code_licence: str = "unknown"
    weights_licence: str = "unknown"
    group: Line | None = None

    @classmethod
    def from_info(cls, info: TokenizerInfo) -> TokenizerRow:
        """Take over what a tokenizer says about itself."""
        values = {key: getattr(info, key) for key in cls.model_fields}
        return cls.model_validate({**values, "group": info.group or None})


class DatasetRow(_Model):
    """The data; ``fingerprint`` is None only where the exact files are not known (published).

    ``origin`` is where its recipe came from.
    """

    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"origin"})

    name: Line
    version: Annotated[int, Field(ge=1)]
    fingerprint: Line | None = None
    origin: Line = "builtin"


class TaskRow(_Model):
    """The task; ``recipe`` is the recipe's digest and ``origin`` where the recipe came from."""

    name: Line
    version: Annotated[int, Field(ge=1)]
    title: Line
    kind: Line
    suite: Line
    recipe: Line
    origin: Line = "builtin"
    dataset: DatasetRow


class Counts(_Model):
    """Samples per role, and files that could not be read.

    Attributes:
        expected: Images that the whole data set has, by split or annotation file; official data sets only.
        seen: The same as they were used.
    """

    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"expected", "seen"})

    train: Count
    early_stop: Count
    report: Count
    broken: Count = 0
    expected: dict[Line, Count] = {}
    seen: dict[Line, Count] = {}


class Environment(_Model):
    """Where a number was computed. Nothing in here may change it."""

    comit_bench: Line
    python: Line
    torch: Line | None = None
    platform: Line
    device: Line
    dtype: Line
    git_commit: Line | None = None
    argv: tuple[str, ...] = ()

    @classmethod
    def collect(cls, *, device: str, dtype: str, argv: Sequence[str] | None = None) -> Environment:
        """Describe this process; the home directory is written ``~``.

        Args:
            device: Name of the device in words, e.g. ``cpu`` or the name of the GPU.
            dtype: Type the tokenizer computed in.
            argv: Command line; default ``sys.argv``, the program without its folder.
        """
        return cls(
            comit_bench=__version__,
            python=platform.python_version(),
            torch=_version("torch"),
            platform=platform.platform(),
            device=device,
            dtype=dtype,
            git_commit=state.commit if (state := git_state()) else None,
            argv=tuple(_without_home(a) for a in (_own_argv() if argv is None else argv)),
        )


class Record(_Model):
    """One measured or published result; see the module text for its identity.

    Attributes:
        protocol_digest: ``protocol_digest(protocol)``; checked.
        complete: False when only part of the data was used: of ``limit`` images, or for the reasons that
            ``incomplete`` gives.
        control: Name of the control (e.g. ``permute-labels``), None for the real thing.
        origin: ``measured`` here, published in a ``paper``, or our committed ``reference`` run.
        timings: Seconds by stage.
        details: Break-downs that no table prints, e.g. scores by predicate.
        outcomes: Digest of the file of outcomes beside the record (``comit_bench.results.outcomes``).
        unconverged: Seeds whose best epoch was the last one allowed: their probes may not have finished.
    """

    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"details", "incomplete", "outcomes", "unconverged"})

    schema_version: Literal[1, 2, 3] = Field(default=SCHEMA_VERSION, alias="schema")
    tokenizer: TokenizerRow
    task: TaskRow
    metrics: Annotated[dict[Line, Metric], Field(min_length=1)]
    protocol: dict[str, JsonValue]
    protocol_digest: Digest
    seeds: tuple[int, ...]
    control: Line | None = None
    complete: bool = True
    limit: Annotated[int, Field(ge=1)] | None = None
    incomplete: tuple[Line, ...] = ()
    counts: Counts | None = None
    origin: Origin = "measured"
    created: Annotated[AwareDatetime, AfterValidator(_utc)] = Field(
        default_factory=lambda: datetime.now(UTC).replace(microsecond=0)
    )
    timings: dict[str, Annotated[float, Field(ge=0)]] = {}
    environment: Environment | None = None
    notes: tuple[str, ...] = ()
    details: dict[str, JsonValue] = {}
    outcomes: Digest | None = None
    unconverged: tuple[int, ...] = ()

    model_config = ConfigDict(populate_by_name=True)

    @field_validator("protocol", mode="before")
    @classmethod
    def _plain(cls, value: object) -> object:
        return plain_json(value)

    @model_validator(mode="after")
    def _consistent(self) -> Record:
        if self.protocol_digest != digest_json(self.protocol):
            raise ValueError(
                "protocol_digest does not belong to protocol: the file was edited by hand, or the "
                "digest was not made with comit_bench.results.records.protocol_digest"
            )
        for key, value in (("control", self.control), ("limit", self.limit)):
            if self.protocol.get(key) != value:
                raise ValueError(
                    f"{key} is {value!r} but protocol[{key!r}] is {self.protocol.get(key)!r}: "
                    "what changes a number must be part of the protocol"
                )
        if self.limit is not None and self.complete:
            raise ValueError("complete must be false when limit is set")
        if self.incomplete and self.complete:
            raise ValueError("complete must be false when incomplete says why it is not")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds repeat: {list(self.seeds)}")
        if self.origin != "paper":
            self._measured_in_full()
        return self

    def _measured_in_full(self) -> None:
        for key in ("counts", "environment"):
            if getattr(self, key) is None:
                raise ValueError(f"{key} is required unless origin is 'paper'")
        for name, metric in self.metrics.items():
            if metric.n is None:
                raise ValueError(f"metrics.{name}.n is required unless origin is 'paper'")
            if not self.seeds or len(metric.per_seed) != len(self.seeds):
                raise ValueError(
                    f"metrics.{name}.per_seed has {len(metric.per_seed)} values for {len(self.seeds)} seeds"
                )

    @property
    def task_protocol(self) -> dict[str, JsonValue]:
        """The task's side of the protocol: what numbers in one column have in common."""
        return {key: value for key, value in self.protocol.items() if key != TOKENIZER_KEY}

    @property
    def tokenizer_protocol(self) -> dict[str, JsonValue]:
        """The tokenizer's side of the protocol: policy, preprocessing, options."""
        side = self.protocol.get(TOKENIZER_KEY, {})
        return side if isinstance(side, dict) else {TOKENIZER_KEY: side}

    def decoder_setting(self, name: str) -> float | None:
        """A number among the decoder's settings, e.g. ``steps``; None when the protocol does not say.

        Settings of decoders that some tokenizers count among their options are found as well.
        """
        for part in ("decode", "options"):
            settings = self.tokenizer_protocol.get(part)
            value = settings.get(name) if isinstance(settings, dict) else None
            if isinstance(value, int | float | str):
                try:
                    return float(value)
                except ValueError:
                    return None
        return None

    def to_json(self) -> str:
        """The text of the record's file."""
        data = self.model_dump(mode="json", by_alias=True)
        return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def plain_json(value: object) -> Any:
    """Bring ``value`` into the form it has after a trip through a JSON file.

    Raises:
        ValueError: Something in it is no plain JSON value (or NaN, or infinite).
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"expected plain JSON values: {error}") from error


def protocol_digest(protocol: dict[str, Any]) -> str:
    """``sha256:<hex>`` of a protocol: equal for equal values, whatever the order of keys."""
    return digest_json(plain_json(protocol))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _own_argv() -> list[str]:
    """The command line with the bare name of the program, without the folder it is installed in."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _without_home(argument: str) -> str:
    try:
        home = str(Path.home()).rstrip("/\\")
    except RuntimeError:
        return argument
    if not home:
        return argument
    return re.sub(rf"(?<![\w.~-]){re.escape(home)}(?=$|[/\\:,])", "~", argument)
