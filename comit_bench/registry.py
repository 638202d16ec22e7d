"""Names -> tokenizers: the built-in ones and those of installed plugins, without importing any of them.

A plugin is a wheel with an entry point in the group ``comit_bench.tokenizers``; the entry point's name
is the tokenizer's name and its object is ``load(name, *, weights, device, offline, seed, **options)``
returning something that satisfies :class:`comit_bench.tokenizers.base.Tokenizer`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from inspect import Parameter, signature
from typing import Any

from comit_bench.errors import UsageError, did_you_mean

LOADER = ("weights", "device", "offline", "seed", "dtype")  # what every loader gets, options apart


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
        crops: Whether it looks at crops under a cropping policy.
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
    crops: bool = False
    options: tuple[str, ...] | None = ()

    def loader(self) -> Callable[..., Any]:
        """Import and return the loader."""
        module, _, function = self.target.partition(":")
        loader: Callable[..., Any] = getattr(import_module(module), function)
        return loader

    def known_options(self) -> tuple[str, ...] | None:
        """Names that ``--option`` may set; None when anything may be one.

        A plugin is asked by looking at its loader: the keyword arguments that it names, or, with
        ``**options``, anything.
        """
        if self.options is not None:
            return self.options
        parameters = signature(self.loader()).parameters.values()
        if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
            return None
        return tuple(p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY and p.name not in LOADER)


_COMIT = "comit_bench.tokenizers.comit:load"
_TITOK = "comit_bench.tokenizers.titok:load"
_FLEXTOK = "comit_bench.tokenizers.flextok:load"
_GRID = "comit_bench.tokenizers.vq_grid:load"
_VQMODEL = "comit_bench.tokenizers.vqmodel:load"
_ALIT = "comit_bench.tokenizers.alit:load"
_SELFTOK = "comit_bench.tokenizers.selftok:load"
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
            crops=True,
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
