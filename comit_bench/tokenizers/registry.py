"""Names -> tokenizers: the built-in ones and those of installed plugins, without importing any of them.

A plugin is a wheel with an entry point in the group ``comit_bench.tokenizers``; the entry point's name
is the tokenizer's name and its object is a :class:`comit_bench.tokenizers.base.Loader`. What may be set
with ``--option``, and of which type it is, is read off the loader's signature: keyword arguments annotated
with ``int``, ``float``, ``bool``, ``str``, ``Literal[...]`` or a union of them, one by one or in
``**options: Unpack[SomeTypedDict]``.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from inspect import Parameter, isclass, signature, unwrap
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, Unpack, get_args, get_origin

from comit_bench.errors import UsageError, did_you_mean

LOADER = ("weights", "device", "offline", "seed", "dtype")  # what every loader gets, options apart
ON, OFF = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_KEYWORD = (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_WORDS = {bool: ("true", "false"), int: ("a whole number",), float: ("a number",)}


def taken_by(loader: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """Keyword arguments of a loader, the name apart, and whether it takes any other.

    Returns:
        Name -> type, ``Any`` where there is no annotation or its names cannot be found; and whether the
        loader is open-ended (``**options``).

    Raises:
        UsageError: It has no signature, or cannot be called with a name.
    """
    try:
        parameters = list(signature(loader).parameters.values())
    except (TypeError, ValueError) as error:
        raise UsageError(f"loader {loader!r}: its signature cannot be read ({error})") from error
    if not parameters or parameters[0].kind in (Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD):
        raise UsageError(f"loader {loader!r}: its first argument must be the tokenizer's name")
    found = {p.name: _resolved(p.annotation, loader) for p in parameters[1:] if p.kind in _KEYWORD}
    rest = [p for p in parameters if p.kind is Parameter.VAR_KEYWORD]
    listed = _resolved(rest[0].annotation, loader) if rest else None
    if get_origin(listed) is Unpack:
        return found | typing.get_type_hints(get_args(listed)[0]), False
    return found, bool(rest)


def _resolved(annotation: Any, loader: Any) -> Any:
    """An annotation, also one that is written as a text; ``Any`` when its names are not to be had."""
    if annotation is Parameter.empty:
        return Any
    function = loader.func if isinstance(loader, partial) else unwrap(loader)
    if not hasattr(function, "__globals__"):  # a class, or an object that is called
        function = function.__init__ if isclass(function) else type(function).__call__
    holder: Any = SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(holder, getattr(function, "__globals__", {}), {})["it"]
    except (NameError, TypeError, SyntaxError, AttributeError):
        return Any


def convert(value: Any, annotation: Any, what: str) -> Any:
    """A text or number as the type that a loader asks for; whatever else came is handed on.

    Args:
        value: Of the command line, or from Python.
        annotation: What it should be. Without one, texts that look like numbers become numbers.
        what: Named in the error.

    Raises:
        UsageError: It cannot be that.
    """
    if not isinstance(value, str | int | float):
        return value
    union = get_origin(annotation) in (typing.Union, UnionType)
    parts = get_args(annotation) if union else (annotation,)
    kinds = [part for part in parts if part not in (None, NoneType)] or [Any]
    kinds.sort(key=lambda kind: (kind is str, kind is float))  # those that take the most come last
    for kind in kinds:
        if (found := _read(value, kind)) is not None:
            return found
    words = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    words += [word for kind in kinds if kind in _WORDS for word in _WORDS[kind]]
    words = ["on or off", *words] if kinds == [bool] else words
    before = ", ".join(words[:-1]) + " or " if len(words) > 1 else ""
    raise UsageError(f"{what} must be {before}{words[-1]}, got {value!r}")


def _read(value: str | int | float, kind: Any) -> Any:
    """The value as one type; None when it is none of it."""
    text = str(value).strip()
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if str(choice) == text), None)
    if kind is bool:
        return text.lower() in ON if text.lower() in ON + OFF else None
    if kind in (int, float):
        return None if isinstance(value, bool) else _number(text, kind)
    if kind in (Any, object):
        numbers = (_number(text, number) for number in (int, float)) if isinstance(value, str) else ()
        return next((number for number in numbers if number is not None), value)
    return value if isinstance(value, str) else text


def _number(text: str, kind: type[int] | type[float]) -> int | float | None:
    try:
        number = kind(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerEntry:
    """One line of ``comit-bench ls tokenizers``.

    Attributes:
        name: Lower-case name.
        family: Adapter family.
        target: ``module:function`` of the loader.
        parameters: Millions of parameters as published, or None.
        message_length: K, or None when it depends on options.
        vocab_size: Distinct ids, or None for continuous codes.
        source: Where weights come from.
        fitted: Whether it is fitted on the train split of each data set.
        origin: ``builtin`` or ``plugin:<distribution>``.
        takes_weights: Whether ``--weights`` and ``--dtype`` mean anything to it.
        crops: Whether it looks at crops under a cropping policy; None when the loader has to be asked, see
            :meth:`looks_at_crops`.
        paper_options: Options for tasks on full-size images, where the embedded defaults are too small.
        options: Names that ``--option`` may set (``--dtype`` is an option of its own); None when the loader
            has to be asked, see :meth:`known_options`.
    """

    name: str
    family: str
    target: str
    parameters: float | None = None
    message_length: int | None = None
    vocab_size: int | None = None
    source: str = ""
    fitted: bool = False
    origin: str = "builtin"
    paper_options: tuple[tuple[str, int], ...] = ()
    takes_weights: bool = True
    crops: bool | None = False
    options: tuple[str, ...] | None = ()

    def loader(self) -> Callable[..., Any]:
        """Import and return the loader.

        Raises:
            UsageError: A plugin's is not there, or is nothing that can be called.
        """
        module, _, attributes = self.target.partition(":")
        try:
            loader: Any = import_module(module)
            for attribute in attributes.split("."):
                loader = getattr(loader, attribute)
        except (ImportError, AttributeError) as error:
            raise UsageError(
                f"tokenizer {self.name} of {self.origin}: its loader {self.target} cannot be imported "
                f"({error})"
            ) from error
        if not callable(loader):
            raise UsageError(f"tokenizer {self.name} of {self.origin}: {self.target} cannot be called")
        return loader  # type: ignore[no-any-return]

    def takes(self, keyword: str) -> bool:
        """Whether ``weights`` or another of ``LOADER`` means anything to it; a plugin's loader is asked."""
        if self.origin == "builtin":
            return self.takes_weights
        names, anything = taken_by(self.loader())
        return anything or keyword in names

    def known_options(self) -> tuple[str, ...] | None:
        """Names that ``--option`` may set; None when anything may be one.

        A plugin is asked by looking at its loader: the keyword arguments that it names, or, with
        ``**options``, anything.
        """
        if self.options is not None:
            return self.options
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
        if self.crops is not None:
            return self.crops
        loader = self.loader()
        stated = getattr(loader, "looks_at_crops", None)
        if isinstance(stated, bool):
            return stated
        kind = loader if isclass(loader) else _resolved(signature(loader).return_annotation, loader)
        if not isclass(kind) or kind in (Any, object) or getattr(kind, "_is_protocol", False):
            return None
        return callable(getattr(kind, "policy", None))


_COMIT = "comit_bench.tokenizers.comit.adapter:load"
_TITOK = "comit_bench.tokenizers.titok.adapter:load"
_FLEXTOK = "comit_bench.tokenizers.flextok.adapter:load"
_GRID = "comit_bench.tokenizers.vq_grid.adapter:load"
_VQMODEL = "comit_bench.tokenizers.vqmodel:load"
_ALIT = "comit_bench.tokenizers.alit.adapter:load"
_SELFTOK = "comit_bench.tokenizers.selftok.adapter:load"
_KMEANS = "comit_bench.tokenizers.kmeans:load"
_PIXELS = "comit_bench.tokenizers.pixels:load"
# What --option may set beside each; a test compares with what the loaders take.
_COMIT_OPTIONS = ("posterior", "steps", "solver", "guidance", "momentum", "allow_pickle")
_TITOK_OPTIONS = ("compile", "allow_pickle")
_FLEXTOK_OPTIONS = (
    *("tokens", "posterior", "steps", "guidance", "guidance_mode", "scaling_factor", "allow_pickle"),
    "compile",
)
_VQMODEL_OPTIONS = ("resolution", "allow_pickle")
_GRID_OPTIONS = ("allow_pickle",)
_ALIT_OPTIONS = ("base", "latent", "allow_pickle", "iterations", "halting", "posterior", "latents", "compile")
_SELFTOK_OPTIONS = (
    *("decoder", "vae", "allow_pickle", "latents", "steps"),
    *("stages", "k_per_stage", "vae_dtype", "compile"),
)
_KMEANS_OPTIONS = ("patch", "resolution", "vocab")
_PIXELS_OPTIONS = ("patch", "resolution")
BUILTIN = (
    TokenizerEntry(
        name="comit-b",
        family="comit",
        target=_COMIT,
        options=_COMIT_OPTIONS,
        crops=True,
        parameters=173.84,
        message_length=256,
        vocab_size=64000,
        source="hub cvg-unibe/comit-b",
    ),
    TokenizerEntry(
        name="comit-l",
        family="comit",
        target=_COMIT,
        options=_COMIT_OPTIONS,
        crops=True,
        parameters=610.85,
        message_length=256,
        vocab_size=64000,
        source="hub cvg-unibe/comit-l",
    ),
    TokenizerEntry(
        name="comit-xl",
        family="comit",
        target=_COMIT,
        options=_COMIT_OPTIONS,
        crops=True,
        parameters=900.38,
        message_length=256,
        vocab_size=64000,
        source="hub cvg-unibe/comit-xl",
    ),
    *(
        TokenizerEntry(
            name=name,
            family="comit",
            target=_COMIT,
            options=_COMIT_OPTIONS,
            crops=True,
            parameters=0.45,
            message_length=16,
            vocab_size=1000,
            source="ships with the package" if name != "comit-nano-untrained" else "random weights, always",
        )
        for name in (
            "comit-nano",
            "comit-nano-no-srepa",
            "comit-nano-no-local-crops",
            "comit-nano-untrained",
        )
    ),
    TokenizerEntry(
        name="titok-l-32",
        family="titok",
        target=_TITOK,
        options=_TITOK_OPTIONS,
        parameters=641.05,
        message_length=32,
        vocab_size=4096,
        source="hub yucornetto/tokenizer_titok_l32_imagenet",
    ),
    TokenizerEntry(
        name="titok-b-64",
        family="titok",
        target=_TITOK,
        options=_TITOK_OPTIONS,
        parameters=204.81,
        message_length=64,
        vocab_size=4096,
        source="hub yucornetto/tokenizer_titok_b64_imagenet",
    ),
    TokenizerEntry(
        name="titok-s-128",
        family="titok",
        target=_TITOK,
        options=_TITOK_OPTIONS,
        parameters=83.67,
        message_length=128,
        vocab_size=4096,
        source="hub yucornetto/tokenizer_titok_s128_imagenet",
    ),
    TokenizerEntry(
        name="titok-bl-64",
        family="titok",
        target=_TITOK,
        options=_TITOK_OPTIONS,
        parameters=390.02,
        message_length=64,
        vocab_size=8192,
        source="hub yucornetto/tokenizer_titok_bl64_vq8k_imagenet",
    ),
    TokenizerEntry(
        name="titok-bl-128",
        family="titok",
        target=_TITOK,
        options=_TITOK_OPTIONS,
        parameters=390.18,
        message_length=128,
        vocab_size=8192,
        source="hub yucornetto/tokenizer_titok_bl128_vq8k_imagenet",
    ),
    TokenizerEntry(
        name="titok-sl-256",
        family="titok",
        target=_TITOK,
        options=_TITOK_OPTIONS,
        parameters=330.26,
        message_length=256,
        vocab_size=8192,
        source="hub yucornetto/tokenizer_titok_sl256_vq8k_imagenet",
    ),
    TokenizerEntry(
        name="titok-nano",
        family="titok",
        target=_TITOK,
        options=_TITOK_OPTIONS,
        parameters=0.28,
        message_length=16,
        vocab_size=1024,
        source="ships with the package",
    ),
    TokenizerEntry(
        name="vq-grid-nano",
        family="vq-grid",
        target=_GRID,
        options=_GRID_OPTIONS,
        parameters=0.49,
        message_length=16,
        vocab_size=1000,
        source="ships with the package",
    ),
    TokenizerEntry(
        name="flextok-d12-d12",
        family="flextok",
        target=_FLEXTOK,
        options=_FLEXTOK_OPTIONS,
        parameters=257.83,
        message_length=256,
        vocab_size=64000,
        source="hub EPFL-VILAB/flextok_d12_d12_in1k",
    ),
    TokenizerEntry(
        name="flextok-d18-d18",
        family="flextok",
        target=_FLEXTOK,
        options=_FLEXTOK_OPTIONS,
        parameters=865.91,
        message_length=256,
        vocab_size=64000,
        source="hub EPFL-VILAB/flextok_d18_d18_in1k",
    ),
    TokenizerEntry(
        name="flextok-d18-d28",
        family="flextok",
        target=_FLEXTOK,
        options=_FLEXTOK_OPTIONS,
        parameters=2457.06,
        message_length=256,
        vocab_size=64000,
        source="hub EPFL-VILAB/flextok_d18_d28_in1k",
    ),
    TokenizerEntry(
        name="flextok-d18-d28-dfn",
        family="flextok",
        target=_FLEXTOK,
        options=_FLEXTOK_OPTIONS,
        parameters=2457.06,
        message_length=256,
        vocab_size=64000,
        source="hub EPFL-VILAB/flextok_d18_d28_dfn",
    ),
    TokenizerEntry(
        name="vqmodel",
        family="vqmodel",
        target=_VQMODEL,
        options=_VQMODEL_OPTIONS,
        source="any diffusers VQModel: --weights DIR",
    ),
    TokenizerEntry(
        name="alit-small",
        family="alit",
        target=_ALIT,
        options=_ALIT_OPTIONS,
        parameters=262.05,
        message_length=256,
        vocab_size=4096,
        source="comit-bench weights fetch alit-small",
    ),
    TokenizerEntry(
        name="alit-small-in100",
        family="alit",
        target=_ALIT,
        options=_ALIT_OPTIONS,
        parameters=262.05,
        message_length=256,
        vocab_size=4096,
        source="comit-bench weights fetch alit-small-in100",
    ),
    TokenizerEntry(
        name="alit-base",
        family="alit",
        target=_ALIT,
        options=_ALIT_OPTIONS,
        parameters=228.69,
        message_length=256,
        vocab_size=4096,
        source="comit-bench weights fetch alit-base",
    ),
    TokenizerEntry(
        name="alit-semilarge",
        family="alit",
        target=_ALIT,
        options=_ALIT_OPTIONS,
        parameters=463.59,
        message_length=256,
        vocab_size=4096,
        source="comit-bench weights fetch alit-semilarge",
    ),
    TokenizerEntry(
        name="alit-small-continuous",
        family="alit",
        target=_ALIT,
        options=_ALIT_OPTIONS,
        parameters=262.0,
        message_length=256,
        source="comit-bench weights fetch alit-small-continuous",
    ),
    TokenizerEntry(
        name="alit-small-vae",
        family="alit",
        target=_ALIT,
        options=_ALIT_OPTIONS,
        parameters=272.11,
        message_length=256,
        vocab_size=4096,
        source="comit-bench weights fetch alit-small-vae",
    ),
    TokenizerEntry(
        name="alit-small-vae-continuous",
        family="alit",
        target=_ALIT,
        options=_ALIT_OPTIONS,
        parameters=272.06,
        message_length=256,
        source="comit-bench weights fetch alit-small-vae-continuous",
    ),
    TokenizerEntry(
        name="selftok-512",
        family="selftok",
        target=_SELFTOK,
        options=_SELFTOK_OPTIONS,
        parameters=2169.4,
        message_length=512,
        vocab_size=32768,
        source="comit-bench weights fetch selftok-512",
    ),
    TokenizerEntry(
        name="selftok-1024",
        family="selftok",
        target=_SELFTOK,
        options=_SELFTOK_OPTIONS,
        parameters=2169.66,
        message_length=1024,
        vocab_size=32768,
        source="comit-bench weights fetch selftok-1024",
    ),
    TokenizerEntry(
        name="kmeans-patch",
        family="kmeans-patch",
        target=_KMEANS,
        options=_KMEANS_OPTIONS,
        message_length=16,
        vocab_size=1024,
        source="fitted on the train split",
        fitted=True,
        takes_weights=False,
        paper_options=(("resolution", 256), ("patch", 16)),
    ),
    TokenizerEntry(
        name="pixel-oracle",
        family="pixel-oracle",
        target=_PIXELS,
        options=_PIXELS_OPTIONS,
        parameters=0.0,
        message_length=16,
        source="none needed",
        takes_weights=False,
        paper_options=(("resolution", 256), ("patch", 16)),
    ),
)
# Not a tokenizer: the row that knows the label frequencies and nothing of the image.
MAJORITY = "majority"


def tokenizers() -> dict[str, TokenizerEntry]:
    """All known tokenizers by lower-case name; built-in names cannot be taken by plugins."""
    found = {entry.name: entry for entry in BUILTIN}
    for point in entry_points(group="comit_bench.tokenizers"):
        name = point.name.lower()
        if name in found or name == MAJORITY:
            raise UsageError(
                f"plugin {point.value!r} takes the name {name!r}, which exists already. Rename it."
            )
        origin = f"plugin:{point.dist.name}" if point.dist else "plugin"
        found[name] = TokenizerEntry(
            name=name,
            family=name,
            target=point.value,
            source="plugin",
            origin=origin,
            crops=None,
            options=None,
        )
    return found


def find_tokenizer(name: str) -> TokenizerEntry:
    """Look a name up, case-insensitively.

    Raises:
        UsageError: Unknown; suggests the nearest names.
    """
    known = tokenizers()
    if name.lower() not in known:
        raise UsageError(
            f"unknown tokenizer {name!r}.{did_you_mean(name, [*known, MAJORITY])} A directory with "
            "config.json and model.safetensors, or a hub id such as cvg-unibe/comit-l, works as well."
        )
    return known[name.lower()]
