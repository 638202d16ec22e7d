"""The list of families, and names -> tokenizers; nothing of a family but its ``family.py`` is imported here.

A plugin is a wheel with an entry point in the group ``comit_bench.tokenizers``; the entry point's name is the
tokenizer's name and its object is a :class:`comit_bench.tokenizers.base.Loader`. The same object without a
wheel is named ``module:attribute``, or ``FILE.py:attribute``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from inspect import isclass, signature
from typing import Any

from comit_bench.errors import UsageError, did_you_mean
from comit_bench.tokenizers.alit.family import FAMILY as ALIT
from comit_bench.tokenizers.comit.family import FAMILY as COMIT
from comit_bench.tokenizers.family import Family, NoWeights, Part, Preset, Release, resolve
from comit_bench.tokenizers.flextok.family import FAMILY as FLEXTOK
from comit_bench.tokenizers.options import LOADER, convert, resolved, taken_by
from comit_bench.tokenizers.selftok.family import FAMILY as SELFTOK
from comit_bench.tokenizers.titok.family import FAMILY as TITOK
from comit_bench.tokenizers.vq_grid.family import FAMILY as VQ_GRID

VQMODEL = Family(
    name="vqmodel",
    loader="comit_bench.tokenizers.vqmodel:load",
    sign=lambda config: config if config.get("_class_name") == "VQModel" else None,
    presets=(Preset(name="vqmodel", source=NoWeights("any diffusers VQModel: --weights DIR")),),
)
KMEANS = Family(
    name="kmeans-patch",
    loader="comit_bench.tokenizers.kmeans:load",
    fitted=True,
    takes_weights=False,
    paper_options=(("resolution", 256), ("patch", 16)),
    drawings_options=(("resolution", 64), ("patch", 8)),
    presets=(
        Preset(
            name="kmeans-patch",
            source=NoWeights("fitted on the train split"),
            message_length=16,
            vocab_size=1024,
        ),
    ),
)
PIXELS = Family(
    name="pixel-oracle",
    loader="comit_bench.tokenizers.pixels:load",
    takes_weights=False,
    paper_options=(("resolution", 256), ("patch", 16)),
    drawings_options=(("resolution", 64), ("patch", 8)),
    presets=(
        Preset(name="pixel-oracle", source=NoWeights("none needed"), parameters=0.0, message_length=16),
        Preset(
            name="supervised-cnn",
            source=NoWeights("trained with every task's labels"),
            parameters=0.0,
            message_length=16,
        ),
    ),
)
FAMILIES = (COMIT, TITOK, VQ_GRID, FLEXTOK, VQMODEL, ALIT, SELFTOK, KMEANS, PIXELS)
# Not tokenizers: the row that knows the label frequencies and nothing of the image, and the row of a probe
# that is fitted without images.
MAJORITY, BLIND = "majority", "blind"


@dataclass(frozen=True, slots=True)
class TokenizerEntry:
    """One line of ``comit-bench ls tokenizers``: a preset and its family."""

    preset: Preset
    family: Family

    @property
    def name(self) -> str:
        return self.preset.name

    def loader(self) -> Callable[..., Any]:
        """Import and return the loader."""
        who = f"tokenizer {self.name} of {self.family.origin}"
        try:
            loader = resolve(self.family.loader)
        except Exception as error:  # somebody else's code
            reason = error if isinstance(error, ImportError | AttributeError) else repr(error)
            raise UsageError(
                f"{who}: its loader {self.family.loader} cannot be imported ({reason})"
            ) from error
        if not callable(loader):
            raise UsageError(f"{who}: {self.family.loader} cannot be called")
        return loader  # type: ignore[no-any-return]

    def takes(self, keyword: str) -> bool:
        """Whether ``weights`` or another of ``LOADER`` means anything to it."""
        if not self.family.takes_weights:
            return False
        names, anything = taken_by(self.loader())
        return anything or keyword in names

    def known_options(self) -> tuple[str, ...] | None:
        """Names that ``--option`` may set: what the loader names; None when anything may be one."""
        parameters, anything = taken_by(self.loader())
        return None if anything else tuple(name for name in parameters if name not in LOADER)

    def typed(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a command line with the types that the loader asks for.

        Raises:
            UsageError: A value of another type; names the option, the value and what is expected.
        """
        if not options:
            return {}
        hints, _ = taken_by(self.loader())
        return {
            name: convert(value, hints.get(name, Any), f"{self.name}: {name}")
            for name, value in options.items()
        }

    def looks_at_crops(self) -> bool | None:
        """Whether the tokenizer looks at crops; None when only the loaded tokenizer can say.

        A plugin is asked without loading weights: the loader's attribute ``looks_at_crops``, or the class
        that the loader is or is annotated to return has a method ``policy``.
        """
        if self.family.crops is not None:
            return self.family.crops
        loader = self.loader()
        stated = getattr(loader, "looks_at_crops", None)
        if isinstance(stated, bool):
            return stated
        kind = loader if isclass(loader) else resolved(signature(loader).return_annotation, loader)
        if not isclass(kind) or kind in (Any, object) or getattr(kind, "_is_protocol", False):
            return None
        return callable(getattr(kind, "policy", None))


def _entries(*families: Family) -> dict[str, TokenizerEntry]:
    return {preset.name: TokenizerEntry(preset, family) for family in families for preset in family.presets}


def code(name: str, loader: str, origin: str, source: str) -> TokenizerEntry:
    """A tokenizer that somebody else's loader makes."""
    preset = Preset(name=name, source=NoWeights(source))
    return TokenizerEntry(
        preset, Family(name=name, loader=loader, presets=(preset,), crops=None, origin=origin)
    )


def builtin() -> dict[str, TokenizerEntry]:
    """The tokenizers of this package by lower-case name."""
    return _entries(*FAMILIES)


def tokenizers() -> dict[str, TokenizerEntry]:
    """All known tokenizers by lower-case name; built-in names cannot be taken by plugins."""
    found = builtin()
    for point in entry_points(group="comit_bench.tokenizers"):
        name = point.name.lower()
        if name in found or name in (MAJORITY, BLIND):
            raise UsageError(
                f"plugin {point.value!r} takes the name {name!r}, which exists already. Rename it."
            )
        origin = f"plugin:{point.dist.name}" if point.dist else "plugin"
        found[name] = code(name, point.value, origin, "plugin")
    return found


def find_tokenizer(name: str) -> TokenizerEntry:
    """Look a name up, case-insensitively."""
    known = tokenizers()
    if name.lower() not in known:
        raise UsageError(
            f"unknown tokenizer {name!r}.{did_you_mean(name, [*known, MAJORITY, BLIND])} A directory with "
            "config.json and model.safetensors, or a hub id such as cvg-unibe/comit-l, works as well."
        )
    return known[name.lower()]


def downloads() -> list[Preset | Part]:
    """Everything that has a source: presets in their order, then what they need beside them."""
    return [*(p for f in FAMILIES for p in f.presets), *(p for f in FAMILIES for p in f.parts)]


def find_release(name: str) -> tuple[str, Release]:
    """Name and released file of a preset or part, in any case."""
    known = {item.name: item.source for item in downloads() if isinstance(item.source, Release)}
    if name.lower() not in known:
        raise UsageError(f"no released file is known for {name!r}.{did_you_mean(name, known)}")
    return name.lower(), known[name.lower()]
