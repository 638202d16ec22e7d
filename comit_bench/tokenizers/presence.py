"""What of the released weights is on this machine, and the command that fetches the rest.

Light on purpose: names and paths. The modules that know where VAEs lie are imported when they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comit_bench.tokenizers import releases
from comit_bench.tokenizers.registry import TokenizerEntry
from comit_bench.tokenizers.weights import state

HUB, SHIPS, FETCH = "hub ", "ships", "comit-bench weights fetch"
CHECKPOINT = ("config.json", "model.safetensors")
OTHERWISE = {"titok": {"model.safetensors": "pytorch_model.bin"}}  # the older form of a file, by family


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Something that is fetched by one command.

    Attributes:
        name: What ``comit-bench weights fetch`` calls it.
        source: Where it comes from.
        state: ``yes``, ``no`` or ``part`` (a download begun).
        note: What it is, when the name does not say.
    """

    name: str
    source: str
    state: str
    note: str = ""

    @property
    def command(self) -> str:
        """Fetches it."""
        return f"{FETCH} {self.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Vae:
    """A network that a checkpoint needs beside itself.

    Attributes:
        name: What ``comit-bench weights fetch`` calls it.
        repository: Hub id.
        files: Names in that repository.
        note: Who needs it.
    """

    name: str
    repository: str
    files: tuple[str, ...]
    note: str


def vaes() -> tuple[Vae, ...]:
    """VAEs of all families that do not come with the checkpoints."""
    from comit_bench.tokenizers.comit import checkpoint as comit_files
    from comit_bench.tokenizers.flextok import checkpoint as flextok_files
    from comit_bench.tokenizers.selftok import checkpoint as selftok_files

    files = tuple(f"vae/{name}" for name in selftok_files.VAE_FILES)
    return (
        *(
            Vae(name=f"{kind}-vae", repository=place, files=comit_files.VAE_FILES, note="VAE of COMiT")
            for kind, place in comit_files.VAE_HUB.items()
        ),
        Vae(
            name="flextok-vae",
            repository=flextok_files.VAE_HUB.format(channels=16),
            files=flextok_files.VAE_FILES,
            note="VAE of FlexTok, for checkpoints that hold none",
        ),
        Vae(name="sd3-vae", repository=selftok_files.VAE_HUB, files=files, note="VAE of SelfTok"),
    )


def hub_state(repository: str, names: Sequence[str], otherwise: dict[str, str] | None = None) -> str:
    """``yes``, ``no`` or ``part``: files of a hub repository in the hub's own cache.

    Args:
        repository: Hub id.
        names: Files that are needed.
        otherwise: For a name another one that does as well.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    def there(name: str) -> bool:
        return isinstance(try_to_load_from_cache(repository, name), str)

    found = [there(name) or there((otherwise or {}).get(name, name)) for name in names]
    if all(found):
        return "yes"
    begun = (Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "blobs").glob("*.incomplete")
    return "part" if any(found) or any(begun) else "no"


def weights_state(entry: TokenizerEntry) -> str:
    """Whether weights are here: ``yes``, ``no``, ``part`` (a download begun) or ``-`` (nothing to have)."""
    if entry.source.startswith(SHIPS):
        return "yes"
    if entry.source.startswith(HUB):
        repository = entry.source.removeprefix(HUB).split()[0]
        return hub_state(repository, CHECKPOINT, OTHERWISE.get(entry.family))
    return release_state(entry.name) if entry.source.startswith(FETCH) else "-"


def release_state(name: str) -> str:
    """The same of a file of ``releases.RELEASES``."""
    return {"here": "yes", "downloading": "part", "missing": "no"}[state(name)]


def _release_part(release: releases.Release) -> Part:
    return Part(name=release.name, source=release.source, state=release_state(release.name))


def parts(entries: Sequence[TokenizerEntry]) -> list[Part]:
    """Everything that can be had for these tokenizers: checkpoints in their order, further files, VAEs."""
    files = {release.name: release for release in releases.RELEASES}
    found = []
    for entry in entries:
        if entry.name in files:
            found.append(_release_part(files.pop(entry.name)))
        elif (there := weights_state(entry)) != "-":
            found.append(Part(name=entry.name, source=entry.source, state=there))
    found += [_release_part(release) for release in files.values()]
    for vae in vaes():
        there, source = hub_state(vae.repository, vae.files), HUB + vae.repository
        found.append(Part(name=vae.name, source=source, state=there, note=vae.note))
    return found
