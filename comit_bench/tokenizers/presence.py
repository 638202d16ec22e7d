"""What of the released weights is on this machine, and the command that fetches the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import constants

from comit_bench.tokenizers.family import Hub, Part, Preset, Release, Shipped
from comit_bench.tokenizers.hub import cached
from comit_bench.tokenizers.weights import state

FETCH = "comit-bench weights fetch"


def command(item: Preset | Part) -> str:
    """What fetches its weights."""
    return f"{FETCH} {item.name}"


def shown_source(preset: Preset) -> str:
    """Where weights come from, in a list."""
    return command(preset) if isinstance(preset.source, Release) else str(preset.source)


def hub_state(repository: str, names: Sequence[str], otherwise: Mapping[str, str] | None = None) -> str:
    """``yes``, ``no`` or ``part``: files of a hub repository in the hub's own cache.

    Args:
        repository: Hub id.
        names: Files that are needed.
        otherwise: For a name another one that does as well.
    """
    others = otherwise or {}
    found = [cached(repository, name) or cached(repository, others.get(name, name)) for name in names]
    if all(found):
        return "yes"
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    return "part" if any(found) or any((folder / "blobs").glob("*.incomplete")) else "no"


def weights_state(item: Preset | Part) -> str:
    """Whether weights are here: ``yes``, ``no``, ``part`` (a download begun) or ``-`` (nothing to have)."""
    source = item.source
    if isinstance(source, Hub):
        return hub_state(source.repository, source.files, source.otherwise)
    if isinstance(source, Release):
        return state(item.name)
    return "yes" if isinstance(source, Shipped) else "-"
