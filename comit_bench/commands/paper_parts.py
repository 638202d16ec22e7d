"""Everything the COMiT paper measures and draws, as commands: ``comit-bench paper`` plans and runs these.

A part is one table or figure of the paper (``docs/paper.md`` lists them), a step of it one command that could
be typed as well. There is one list of parts for both suites: who takes which role in it is the cast. On the
embedded suite the shipped nano tokenizers stand for the paper's, scenes for its data sets.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from comit_bench.errors import MissingError, UsageError, did_you_mean
from comit_bench.results.render.paper import (
    COMPARED,
    NO_LOCAL_CROPS,
    NO_SREPA,
    OBJECTNESS,
    POLICIES,
    PROBES,
    RECOGNITION,
    RECONSTRUCTION,
    TASKS,
)
from comit_bench.tokenizers.registry import tokenizers

RUNS = Path("runs")  # where `comit-bench train` leaves what it exports, unless told otherwise
DATA = "D"  # stands for the data root in printed commands
RETRIEVAL = {
    "paper": "retrieval-imagenet100",
    "scenes": "retrieval-scenes",
    "drawings": "retrieval-drawings",
}
BOTTLENECKS = ("-bottleneck-s", "-bottleneck-m")  # L is the tokenizer itself


@dataclass(frozen=True, kw_only=True, slots=True)
class Cast:
    """Who takes part.

    Attributes:
        suite: ``paper``, ``scenes`` or ``drawings``.
        base: Tokenizers of the ablations and policies (COMiT-B).
        no_srepa: Their ablations without alignment, names or directories.
        no_local_crops: Their ablations without local crops.
        rows: Tokenizers of Table 4.
        sizes: Tokenizers of the sweeps.
        bottleneck: Tokenizers with messages of several sizes.
        shown: Tokenizers of the other figures (COMiT-XL, where the paper names one).
        objects: ``--images`` of figures about objects, with masks.
        classes: The same with classes.
        photos: The same with any photographs.
        steps: Solver steps of the sweep (Figure 5 a).
        guidance: Guidance weights of the sweep (Figure 5 b).
    """

    suite: str
    base: tuple[str, ...]
    no_srepa: tuple[str, ...]
    no_local_crops: tuple[str, ...]
    rows: tuple[str, ...]
    sizes: tuple[str, ...]
    bottleneck: tuple[str, ...]
    shown: tuple[str, ...]
    objects: str = "scenes"
    classes: str = "scenes"
    photos: str = "scenes"
    steps: str = "1,2,5,10"
    guidance: str = "0,2,7.5"

    def task(self, role: str) -> str:
        """The suite's task for a column of the paper's tables."""
        return TASKS[self.suite][role][0]

    @property
    def probes(self) -> tuple[str, ...]:
        return tuple(self.task(role) for role in PROBES)


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperStep:
    """One command.

    Attributes:
        command: ``run``, ``sweep`` or ``figure`` and its name.
        tokenizers: Who is measured or shown; empty when the command only reads records.
        tasks: What is measured.
        policies: Cropping policies; empty is the tokenizers' own.
        options: ``FAMILY.KEY=VALUE``, given when a tokenizer of the family takes part.
        images: ``--images`` of a figure; ``D/`` at its start is the data root.
        counts: Numbers of images by option; ``--limit`` caps them.
        more: Further words.
        output: Below the output directory.
        follows: Needs what the step before it left.
    """

    command: tuple[str, ...]
    tokenizers: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    images: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    more: tuple[str, ...] = ()
    output: str = ""
    follows: bool = False

    def argv(self, *, output: str = "results", data: str = DATA, limit: int | None = None) -> list[str]:
        """The words after ``comit-bench``.

        Args:
            output: ``--output`` of everything.
            data: The data root, where a word of the command needs it.
            limit: Largest number of images of a figure.
        """
        words = [*self.command]
        for name in self.tokenizers:
            words += ["--tokenizer", name]
        if self.tasks:
            words += ["--task" if self.command == ("sweep",) else "--tasks", ",".join(self.tasks)]
        for policy in self.policies:
            words += ["--policy", policy]
        for option in self.options:
            if any(name.startswith(option.partition(".")[0]) for name in self.tokenizers):
                words += ["--option", option]
        if self.images:
            folder = self.images.removeprefix(f"{DATA}/")
            words += ["--images", self.images if folder == self.images else f"{data}/{folder}"]
        for option, count in self.counts.items():
            words += [f"--{option}", str(count if limit is None else min(count, max(limit, 8)))]
        words += [word.replace("OUTPUT", output) for word in self.more]
        place = f"{output}/{self.output}" if self.output else output
        return words if place == "results" else [*words, "--output", place]

    def text(self, *, output: str = "results", data: str = DATA) -> str:
        """The command as it would be typed."""
        return shlex.join(["comit-bench", *self.argv(output=output, data=data)])


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperPart:
    """One table or figure of the paper.

    Attributes:
        name: ``table-4``, ``figure-5a``, ...
        title: What it shows.
        steps: What makes it; may be empty.
        lacking: Why there are no steps.
    """

    name: str
    title: str
    steps: tuple[PaperStep, ...]
    lacking: str = ""


def trained_here(name: str, runs: Path = RUNS) -> str:
    """Where ``comit-bench train --config NAME`` leaves a tokenizer."""
    return str(runs / name / "export" / name)


def make_cast(suite: str, names: Sequence[str] = (), runs: Path = RUNS) -> Cast:
    """Who takes part in a suite.

    Args:
        suite: ``paper``, ``scenes`` or ``drawings``.
        names: Tokenizers that take all roles instead; their ablations and bottleneck sizes join when they
            ship, lie in ``runs`` or have a preset to train them with.
        runs: Where trained tokenizers lie.

    Raises:
        UsageError, MissingError: An unknown name, or a directory that is not there.
    """
    from comit_bench.tokenizers.load import entry_for
    from comit_bench.train.config import presets

    known = tokenizers()
    chosen = tuple(dict.fromkeys(names)) or (("comit-b",) if suite == "paper" else ("comit-nano",))
    for name in chosen:
        entry_for(name)

    def variants(suffix: str) -> tuple[str, ...]:
        named = [Path(name).name + suffix for name in chosen]
        return tuple(
            name if name in known else trained_here(name, runs)
            for name in named
            if name in known or name in presets() or Path(trained_here(name, runs)).is_dir()
        )

    roles = {
        "base": chosen,
        "no_srepa": variants(NO_SREPA),
        "no_local_crops": variants(NO_LOCAL_CROPS),
        "rows": chosen,
        "sizes": chosen,
        "bottleneck": (*(place for suffix in BOTTLENECKS for place in variants(suffix)), *chosen),
        "shown": chosen,
    }
    if not names and suite != "paper":
        roles["rows"] = ("vq-grid-nano", "titok-nano", *chosen)
        roles["bottleneck"] = ("titok-nano", *chosen)
    elif not names:
        roles |= {"rows": COMPARED, "sizes": ("comit-b", "comit-l", "comit-xl"), "shown": ("comit-xl",)}
    cast = Cast(suite=suite, **roles)  # type: ignore[arg-type]
    if suite != "paper":
        return cast
    return replace(
        cast,
        objects="cssd",
        classes="imagenet100",
        photos=f"{DATA}/photos",
        steps="1,2,5,10,25,50,100",
        guidance="1,2,3,4,5,6,7.5,9,12",
    )


def _measure(
    cast: Cast,
    names: Sequence[str],
    tasks: Sequence[str],
    *,
    policies: Sequence[str] = (),
    options: Sequence[str] = (),
) -> PaperStep:
    return PaperStep(
        command=("run",),
        tokenizers=tuple(names),
        tasks=tuple(tasks),
        policies=tuple(policies),
        options=tuple(options),
        more=("--suite", cast.suite, "--no-references"),
    )


def _figures(
    name: str,
    names: Sequence[str],
    images: str,
    part: str,
    *,
    more: Sequence[str] = (),
    **counts: int,
) -> list[PaperStep]:
    """A figure of each tokenizer."""
    return [
        PaperStep(
            command=("figure", name),
            tokenizers=(one,),
            images=images,
            counts={key.replace("_", "-"): count for key, count in counts.items()},
            more=tuple(more),
            output=f"figures/{part}",
        )
        for one in names
    ]


def _sweep(cast: Cast, part: str, axis: str, values: str) -> list[PaperStep]:
    measured = PaperStep(
        command=("sweep",),
        tokenizers=cast.sizes,
        tasks=(cast.task(RECONSTRUCTION),),
        more=(f"--{axis}", values),
        output="sweeps",
    )
    return [measured, _of_records("sweeps", part, "OUTPUT/sweeps")]


def _of_records(figure: str, part: str, results: str, names: Sequence[str] = ()) -> PaperStep:
    """A figure of the records that the step before it left, of all tokenizers or some."""
    some = [word for name in names for word in ("--tokenizer", Path(name).name)]
    return PaperStep(
        command=("figure", figure),
        more=("--results", results, *some),
        output=f"figures/{part}",
        follows=True,
    )


def make_parts(cast: Cast) -> list[PaperPart]:
    """All parts in the paper's order, tables first."""
    recognition, objectness = cast.task(RECOGNITION), cast.task(OBJECTNESS)
    reconstruction = cast.task(RECONSTRUCTION)
    crops = [name for name in cast.base if _crops(name)]
    shown = [name for name in cast.shown if _crops(name)]
    local, whole = ("--policy", "adaptive:6"), ("--policy", "global+adaptive:6")
    few = [word for policy in ("adaptive:3", "adaptive:4", POLICIES[5]) for word in ("--policy", policy)]
    no_crops = (*cast.base, *cast.no_local_crops)
    parts: list[tuple[str, str, list[PaperStep]]] = [
        ("table-1", "SREPA", [_measure(cast, (*cast.base, *cast.no_srepa), (recognition,))]),
        ("table-2", "local crops in training", [_measure(cast, no_crops, (recognition,))]),
        ("table-3", "cropping policies", [_measure(cast, crops, cast.probes, policies=POLICIES)]),
        (
            "table-4",
            "comparison: reconstruction and the three probes",
            [
                _measure(
                    cast,
                    cast.rows,
                    (reconstruction, *cast.probes),
                    options=("selftok.decoder=renderer",),
                )
            ],
        ),
        (
            "figure-2",
            "objects in attention, with and without local crops in training",
            [
                _measure(cast, no_crops, (objectness,)),
                *_figures("attention", no_crops, cast.objects, "figure-2", count=5, sweep_count=32),
            ],
        ),
        (
            "figure-3",
            "what a message knows after each crop, without and with the global one",
            [
                *_figures("evolution", shown, cast.photos, "figure-3", more=local, count=2),
                *_figures("evolution", shown, cast.photos, "figure-3", more=whole, count=2),
            ],
        ),
        (
            "figure-4",
            "objects enter the message as they are seen",
            _figures("evolution", shown, cast.photos, "figure-4", more=("--policy", "raster:9"), count=4),
        ),
        ("figure-5a", "solver steps", _sweep(cast, "figure-5a", "steps", cast.steps)),
        ("figure-5b", "guidance", _sweep(cast, "figure-5b", "guidance", cast.guidance)),
        (
            "figure-5c",
            "size of the bottleneck: probe accuracy and PSNR",
            [
                _measure(cast, cast.bottleneck, (recognition, reconstruction)),
                _of_records("bottleneck", "figure-5c", "OUTPUT", cast.bottleneck),
            ]
            if len(cast.bottleneck) > 1
            else [],
        ),
        (
            "figure-6",
            "attention of single tokens",
            _figures("maps", cast.shown, cast.photos, "figure-6", count=4),
        ),
        (
            "figure-7",
            "reconstruction of images from elsewhere",
            _figures("reconstruction", cast.shown, cast.photos, "figure-7", count=6),
        ),
        (
            "figure-8",
            "objectness at four shares, and the best tokens",
            [
                _measure(cast, cast.shown, (objectness,)),
                *_figures("attention", cast.shown, cast.objects, "figure-8", count=5, sweep_count=32),
            ],
        ),
        (
            "figure-9",
            "nearest messages",
            [
                _measure(cast, cast.shown, (RETRIEVAL[cast.suite],)),
                *_figures(
                    *("neighbours", cast.shown, cast.classes, "figure-9"),
                    more=("--neighbours", "4"),
                    count=7,
                    pool=5000,
                ),
            ],
        ),
        (
            "figure-10",
            "adaptive crops without and with the global one",
            _figures("policies", shown, cast.photos, "figure-10", more=few, count=6, curve_count=32),
        ),
    ]
    lacking = {"figure-5c": "messages of one size only: train others with comit-b-bottleneck-s, -m"}
    return [
        PaperPart(
            name=name,
            title=title,
            steps=tuple(step for step in steps if step.tokenizers or step.follows),
            lacking=lacking.get(name, "none of the tokenizers looks at crops"),
        )
        for name, title, steps in parts
    ]


def _crops(name: str) -> bool:
    """Whether a tokenizer looks at crops; a directory that is not there yet is one of COMiT's."""
    from comit_bench.tokenizers.load import entry_for

    try:
        return bool(entry_for(name).looks_at_crops())
    except MissingError:
        return True


def choose_parts(parts: Sequence[PaperPart], only: Sequence[str] | None) -> list[PaperPart]:
    """Parts by name, in the paper's order; None is all."""
    names = [part.name for part in parts]
    for name in only or ():
        if name not in names:
            raise UsageError(f"the paper has no part {name!r} here.{did_you_mean(name, names)}")
    return [part for part in parts if only is None or part.name in only]
