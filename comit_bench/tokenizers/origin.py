"""Where the weights of a tokenizer lie, and what is known about them. One way for all families."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from comit_bench.errors import MissingError, UsageError, did_you_mean
from comit_bench.files import shipped_weights
from comit_bench.tokenizers.checkpoints import (
    checkpoint_path,
    described,
    on_meta,
    read_config,
    single_file_spec,
    weight_file,
    weights_digest,
)
from comit_bench.tokenizers.config_node import read_facts
from comit_bench.tokenizers.family import Family, Hub, Preset, Release, Shipped
from comit_bench.tokenizers.hub import fetch_checkpoint
from comit_bench.tokenizers.weights import required, weight_source

Spec = TypeVar("Spec")
HINT = "or pass --weights DIR or --weights FILE (a pickled .bin also needs --option allow_pickle=true)"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsOrigin:
    """What a :class:`~comit_bench.tokenizers.base.TokenizerInfo` says of its weights; see there."""

    name: str
    weights: str
    revision: str | None = None
    trained: bool = True
    training_data: str = "unknown"
    weights_licence: str = "unknown"
    group: str = ""


def untrained(name: str, seed: int) -> WeightsOrigin:
    """Of random weights."""
    return WeightsOrigin(
        name=name, weights=f"random:{seed}", trained=False, training_data="none", weights_licence="none"
    )


def spec_of(name: str, presets: Mapping[str, Spec]) -> Spec:
    """Sizes of the network that ``--weights random`` asks for."""
    if name.lower() not in presets:
        raise UsageError(f"--weights random needs a preset, not {name!r}.{did_you_mean(name, presets)}")
    return presets[name.lower()]


def random_network(
    network: Callable[[Spec], nn.Module], spec: Spec, device: torch.device, seed: int, **how: bool
) -> Any:
    """An untrained network on the CPU; one that is meant for the meta ``device`` stays without weights.

    Args:
        network: Its class, with a method ``init_weights(generator, ...)`` that sets every weight.
        spec: Its sizes.
        device: Where it is to run.
        seed: Of the weights.
        **how: Further arguments of ``init_weights``.
    """
    model: Any = on_meta(network, spec)
    if device.type != "meta":
        model.load_state_dict({k: torch.empty(v.shape) for k, v in model.state_dict().items()}, assign=True)
        model.init_weights(torch.Generator().manual_seed(seed), **how)
    return model


@dataclass(frozen=True, slots=True)
class Located:
    """A checkpoint directory or file of weights.

    Attributes:
        local: Where it lies.
        name: Of the tokenizer, as the user gave it.
        released: The preset whose released weights these are, or None.
    """

    local: Path
    name: str
    released: Preset | None

    def read(
        self, presets: Mapping[str, Spec], spec_from_config: Callable[[dict[str, Any], Path], Spec]
    ) -> tuple[Path, dict[str, Any], Spec]:
        """File of weights, content of ``config.json`` (nothing beside a single file) and sizes.

        Raises:
            MissingError, CorruptFileError, UsageError: Files are not here, or say too little.
        """
        if self.local.is_dir():
            path, config = weight_file(self.local), read_config(self.local)
            return path, config, spec_from_config(config, self.local / "config.json")
        return self.local, {}, single_file_spec(self.name, self.local, presets)

    def origin(self, weights: Path, config: Mapping[str, Any], names: Iterable[str]) -> WeightsOrigin:
        """What is known about them: what the config says, else what is known of the preset.

        Args:
            weights: The file of weights that was loaded.
            config: Content of ``config.json``, or nothing.
            names: What is called by its own name, however its weights were found.

        Raises:
            UsageError: The config's own facts have another type.
        """
        facts = read_facts(config, self.local / "config.json")
        known = self.released or Preset(name="")
        label, revision = described(self.name, self.local, tuple(names))
        return WeightsOrigin(
            name=label,
            weights=weights_digest(weights),
            revision=revision,
            trained=facts.trained,
            training_data=facts.training_data or known.training_data,
            weights_licence=facts.weights_licence or known.weights_licence,
            group=facts.group or "",
        )


def locate(
    family: Family,
    name: str,
    weights: str | None,
    *,
    offline: bool,
    allow_pickle: bool,
    release: str | None = None,
) -> Located:
    """Find what ``--tokenizer`` and ``--weights`` name: a path, what ships, the cache's or the hub's.

    Args:
        family: Of the tokenizer.
        name: A preset, a hub id or a directory.
        weights: A directory or file instead.
        offline: Never ask the hub.
        allow_pickle: Whether a torch file may be taken.
        release: The released file that is meant, when a preset has several.

    Raises:
        MissingError: It is not here, and cannot be had.
        UsageError: A file of another kind, or a pickle that was not allowed.
    """
    preset, local = family.preset(name), checkpoint_path(weights or name)
    converts = any(isinstance(known.source, Release) for known in family.presets)
    if weights:
        if converts:  # a released pickle is converted once
            return Located(weight_source(release or name, local, allow_pickle=allow_pickle), name, None)
        if not local.exists():
            raise MissingError(
                f"--weights {weights}: no such file or directory. Give a directory with config.json and "
                "model.safetensors, one file of weights, or 'random'."
            )
        return Located(local, name, None)
    if local.is_dir():
        return Located(local, name, None)
    source = preset.source if preset is not None else Hub(repository=name)
    if isinstance(source, Shipped) and preset is not None:
        return Located(shipped_weights(preset.name), name, None)
    if isinstance(source, Release) and preset is not None:
        return Located(required(release or preset.name, hint=" or pass --weights DIR"), name, preset)
    if not isinstance(source, Hub) or converts or "/" not in source.repository:
        names = [known.name for known in family.presets]
        how = f" Fetched with `comit-bench weights fetch {' | '.join(names)}`." if converts else ""
        raise MissingError(
            f"{name}: no such directory, and no name of {family.name}.{did_you_mean(name, names)}{how}"
        )
    folder = fetch_checkpoint(source.repository, offline=offline, hint=HINT, allow_pickle=allow_pickle)
    return Located(folder, name, preset)
