"""What a figure must say about itself: who made it, of what, with which settings, and what it is not.

Every ``compute`` puts an :class:`About` into what it returns; the decorator ``styled`` of every ``draw``
writes it on the page. So no figure of an untrained tokenizer looks like one of a trained one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from comit_bench.figures.inputs import Images
from comit_bench.results.schema import Record
from comit_bench.tokenizers.base import Tokenizer, TokenizerInfo

SCENES_DATA = "scenes-"  # the embedded data sets are called so, also in what weights say they were trained on


@dataclass(frozen=True, slots=True)
class About:
    """The words around a figure.

    Attributes:
        warnings: What nobody may miss; stands at the top in colour.
        lines: Tokenizer, settings and images; stands at the bottom.
        untrained: Names of tokenizers with random weights.
        file_parts: What tells the figure's file from those of other settings, e.g. a cropping policy.
    """

    warnings: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()
    file_parts: tuple[str, ...] = ()

    def plus(self, *lines: str, warnings: Sequence[str] = ()) -> About:
        """The same with further lines at the end."""
        return About((*self.warnings, *warnings), (*self.lines, *lines), self.untrained, self.file_parts)

    def label(self, name: str) -> str:
        """A tokenizer's name for a row or a legend, marked when its weights are random."""
        return f"{name} (untrained)" if name in self.untrained and "untrained" not in name else name


NOTHING = About()


def describe(
    tokenizer: Tokenizer,
    inputs: Images,
    *,
    policy: str | None = None,
    decodes: bool = False,
    default_policy: str | None = None,
) -> About:
    """Describe one tokenizer and the images it is given.

    Args:
        tokenizer: Who.
        inputs: What.
        policy: As asked for; None is the tokenizer's default. Not of tokenizers without policies.
        decodes: Whether images are decoded, so that steps and guidance matter.
        default_policy: What the figure takes when nobody says anything; None: the tokenizer's own. Any other
            policy becomes a part of the file name.
    """
    info = tokenizer.info
    told, parts = [f"{info.name}: {weights_state(info)}"], list[str]()
    parse: Any = getattr(tokenizer, "policy", None)
    if parse is not None:
        chosen = str(parse(policy))
        told.append(f"policy {chosen}")
        parts += [chosen] if chosen != str(parse(default_policy)) else []
    settings = getattr(tokenizer, "decode_options", None)
    if decodes and settings:
        told.append(decoder(settings))
    untrained = () if info.trained else (info.name,)
    warnings = [f"untrained: {info.name} has random weights, nothing here was learned"] if untrained else []
    if foreign(info, inputs):
        warnings.append(
            f"{info.name} was trained on {info.resolution} px embedded scenes; these are other images"
        )
    return About(tuple(warnings), (", ".join(told), images(inputs)), untrained, tuple(parts))


def describe_records(records: Sequence[Record], lines: Sequence[str], *, told: str = "") -> About:
    """Describe a figure of records: which rows have random weights, and whether all data were used.

    Args:
        records: All that is shown.
        lines: Stand at the bottom.
        told: Behind the warning that only part of the data was used.
    """
    names = {record.tokenizer.name for record in records}
    untrained = tuple(dict.fromkeys(r.tokenizer.name for r in records if not r.tokenizer.trained))
    incomplete = any(not record.complete for record in records)
    warnings = [f"untrained, random weights: {', '.join(untrained)}"] if untrained else []
    warnings += [f"incomplete: only part of the data was used{told}"] if incomplete else []
    parts = ("untrained",) * (len(untrained) == len(names)) + ("incomplete",) * incomplete
    return About(tuple(warnings), tuple(lines), untrained, parts)


def chance_lines(records: Sequence[Record], texts: Mapping[str, str]) -> list[str]:
    """What guessing, or a flat colour, reaches: ``texts`` are words by metric, with ``{}`` for values."""
    lines = []
    for metric, text in texts.items():
        chances = [r.metrics[metric].chance for r in records if metric in r.metrics]
        if levels := sorted({f"{chance:.4g}" for chance in chances if chance is not None}):
            lines.append(text.format(", ".join(levels)))
    return lines


def row_name(record: Record) -> str:
    """The tokenizer of a record, marked when its weights are random."""
    row = record.tokenizer
    return row.name if row.trained or "untrained" in row.name else f"{row.name} (untrained)"


def joined(several: Sequence[About]) -> About:
    """One description for several tokenizers; what they share is said once."""

    def each(field: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(text for one in several for text in getattr(one, field)))

    tokenizers = [one.lines[0] for one in several if one.lines]
    rest = [line for one in several for line in one.lines[1:]]
    lines = tuple(dict.fromkeys(tokenizers + rest))
    return About(each("warnings"), lines, each("untrained"), each("file_parts"))


FLAT = "flat: PSNR of the image painted in its own mean colour, which needs no tokenizer"


def weights_state(info: TokenizerInfo) -> str:
    """Where the weights come from, in a few words."""
    if not info.trained:
        return f"random weights (seed {info.weights.partition(':')[2]})"
    if info.weights == "none":
        return "no weights"
    kind, _, digest = info.weights.partition(":")
    verb = "fitted on" if kind == "fitted" else "trained on"
    data = info.training_data if info.training_data != "unknown" else "unknown data"
    return f"{verb} {data}, weights {digest[:8]}"


def decoder(settings: dict[str, Any]) -> str:
    """Settings of a decoder, e.g. ``steps 10, guidance 7.5``."""
    shown = {key: value for key, value in settings.items() if key != "default"}
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )


def images(inputs: Images) -> str:
    """How many images of what, and how many are missing."""
    text = f"{len(inputs)} image{'s' if len(inputs) != 1 else ''}"
    if inputs.available > len(inputs):
        text = f"{len(inputs)} of {inputs.available} images"
    if inputs.source:
        text += f" of {inputs.source}"
    if inputs.seed is not None:
        text += f", seed {inputs.seed}"
    if inputs.unreadable:
        text += f"; incomplete: {inputs.unreadable} could not be read"
    return text


def foreign(info: TokenizerInfo, inputs: Images) -> bool:
    """Whether a tokenizer that learned from embedded scenes is given something else."""
    return info.trained and info.training_data.startswith(SCENES_DATA) and inputs.of_reader
