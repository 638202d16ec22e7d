"""What the tokenizers of one paper have in common, and what is known of each of them. Imports no torch.

Every folder ``tokenizers/<family>`` has a ``family.py`` with a :class:`Family`: the only place that says
which presets there are, how large they were published, and where their weights come from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

Config = Mapping[str, Any]  # content of a config.json
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")  # of a diffusers autoencoder


@dataclass(frozen=True, kw_only=True, slots=True)
class Hub:
    """A repository of the Hugging Face hub.

    Attributes:
        repository: Hub id.
        files: Names that are needed.
        otherwise: For a name another one that does as well.
    """

    repository: str
    files: tuple[str, ...] = ("config.json", "model.safetensors")
    otherwise: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"hub {self.repository}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """A released file that is no hub checkpoint: fetched and converted once.

    Attributes:
        file: Name under which it is kept until it is converted.
        url: Direct link, or None.
        hub: Hub repository that holds ``file``, or None.
        unpack: ``module:function`` ``(content, path) -> tensors`` that picks the state dict out of what
            ``torch.load(weights_only=True)`` returned.
        config: ``module:function`` that returns ``config.json`` for a name, or None.
        check: ``module:function`` ``(name, tensors, path)`` that refuses tensors of another model, or None.
        allow: Harmless classes that the pickle names beside tensors, ``module:class``.
    """

    file: str
    url: str | None = None
    hub: str | None = None
    unpack: str
    config: str | None = None
    check: str | None = None
    allow: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"hub {self.hub}/{self.file}" if self.hub else str(self.url)


@dataclass(frozen=True, slots=True)
class Shipped:
    """Weights that come with the package."""

    def __str__(self) -> str:
        return "ships with the package"


@dataclass(frozen=True, slots=True)
class NoWeights:
    """There is nothing to have; ``why`` is shown."""

    why: str = ""

    def __str__(self) -> str:
        return self.why


Source = Hub | Release | Shipped | NoWeights


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A tokenizer that has a name.

    Attributes:
        name: Lower-case.
        source: Where its weights come from.
        parameters: Millions of parameters as published, or None.
        message_length: K, or None when it depends on options.
        vocab_size: Distinct ids, or None for continuous codes.
        training_data: Of the released weights.
        weights_licence: Of the released weights.
        sizes: Dotted keys of ``config.json`` -> values that tell its network from that of other presets.
    """

    name: str
    source: Source = NoWeights()
    parameters: float | None = None
    message_length: int | None = None
    vocab_size: int | None = None
    training_data: str = "unknown"
    weights_licence: str = "unknown"
    sizes: Mapping[str, object] = field(default_factory=dict)

    def fits(self, config: Config) -> bool:
        """Whether a config describes its network."""
        return all(value_at(config, key) == value for key, value in self.sizes.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Something that checkpoints of a family need beside themselves.

    Attributes:
        name: What ``comit-bench weights fetch`` calls it.
        source: Where it comes from.
        note: Who needs it, when the name does not say.
        always: Whether every released checkpoint needs it.
    """

    name: str
    source: Hub | Release
    note: str = ""
    always: bool = False


def value_at(config: Config, key: str) -> Any:
    """The value of a dotted key, None where there is none."""
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """The tokenizers of one paper, or of one plugin.

    Attributes:
        name: Also what a ``config.json`` of our own names as its ``family``.
        loader: ``module:attribute`` of a :class:`comit_bench.tokenizers.base.Loader`, imported when needed.
        presets: In the order of lists.
        parts: What they need beside their checkpoints.
        sign: Of a ``config.json`` that names no family: the mapping that ``sizes`` of presets are keys of, or
            None when it is of another family.
        crops: Whether it looks at crops under a cropping policy; None when the loader has to be asked.
        takes_weights: Whether ``--weights`` and ``--dtype`` mean anything to it.
        fitted: Whether it is fitted on the train split of each data set.
        paper_options: Options for tasks on full-size images, where the embedded defaults are too small.
        drawings_options: Options for tasks on drawings, likewise.
        origin: ``builtin``, ``plugin:<distribution>``, or ``code`` (named as ``module:attribute``).
    """

    name: str
    loader: str
    presets: tuple[Preset, ...]
    parts: tuple[Part, ...] = ()
    sign: Callable[[Config], Config | None] = lambda config: None
    crops: bool | None = False
    takes_weights: bool = True
    fitted: bool = False
    paper_options: tuple[tuple[str, int], ...] = ()
    drawings_options: tuple[tuple[str, int], ...] = ()
    origin: str = "builtin"

    def recognises(self, config: Config) -> Preset | None:
        """The preset that a ``config.json`` describes, None when it is of another family.

        The first one, where presets differ in their weights alone; one with the name of the family and
        nothing else, where the sizes are those of no preset.
        """
        stated = config.get("family")
        mine = self.sign(config) if not isinstance(stated, str) else config if stated == self.name else None
        if mine is None:
            return None
        return next((preset for preset in self.presets if preset.fits(mine)), Preset(name=self.name))

    def preset(self, name: str) -> Preset | None:
        """The preset of a name, in any case, or of the hub id that holds its weights."""
        wanted = name.lower()
        for preset in self.presets:
            repository = preset.source.repository if isinstance(preset.source, Hub) else preset.name
            if wanted in (preset.name, repository.lower()):
                return preset
        return None


def resolve(target: str) -> Any:
    """Import ``module:attribute``, or run ``file.py`` for its attribute; attributes may be dotted."""
    place, _, attributes = target.rpartition(":")
    found: Any = _import_file(Path(place)) if place.endswith(".py") else import_module(place)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found


def _import_file(path: Path) -> ModuleType:
    """A file as a module, once per process; its name tells files of one name apart."""
    path = path.resolve()
    name = f"{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python file")
        sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
