"""Released weights in the cache: fetch, check against the first download, convert to safetensors once.

Below ``<cache>/weights`` every name has a folder with ``model.safetensors``, ``config.json`` where the
family knows one, and ``source.json`` (where the file came from, its checksum). ``checksums.json`` remembers
the checksum of every source that was ever fetched or converted, so that a file that changes behind its link
is noticed even after the folder was deleted.

Pickles: ``fetch`` and ``convert`` read the file that the command names, as tensors only, without further
questions. A pickle that is loaded as a tokenizer (``--weights FILE.pth``) needs ``allow_pickle=true``
(``weight_source``). The rule stands in ``checkpoints.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError
from comit_bench.files import cache_root, locked, require_folder, sha256_file, write_atomic
from comit_bench.nn.plain_files import is_safetensors
from comit_bench.recipes.download import Advance, download
from comit_bench.recipes.reading import read_json
from comit_bench.tokenizers import hub
from comit_bench.tokenizers.checkpoints import (
    PICKLES,
    WEIGHT_FILES,
    is_pickle,
    read_tensors,
    read_torch,
    require_allowed,
    write_tensors,
)
from comit_bench.tokenizers.family import Release, resolve
from comit_bench.tokenizers.registry import find_release

SOURCE, CHECKSUMS = "source.json", "checksums.json"


def weights_root() -> Path:
    """``<cache>/weights``."""
    return cache_root() / "weights"


def stored(name: str) -> Path | None:
    """The folder of fetched and converted weights, or None when they are not (wholly) there."""
    folder = weights_root() / name
    whole = (folder / WEIGHT_FILES[0]).is_file() and (folder / SOURCE).is_file()
    return folder if whole else None


def required(name: str, *, hint: str = "") -> Path:
    """The folder of fetched weights."""
    folder = stored(name)
    if folder is not None:
        return folder
    _, release = find_release(name)
    raise MissingError(
        f"the weights of {name} are not on this machine. Fetch them where there is a network: "
        f"`comit-bench weights fetch {name}` (from {release}), then copy "
        f"{weights_root() / name}; or convert a file that you have: "
        f"`comit-bench weights convert {name} FILE{Path(release.file).suffix}`{hint}."
    )


def _locked() -> AbstractContextManager[bool]:
    require_folder(weights_root())
    return locked(weights_root() / ".lock", "fetching or converting weights")


def _checksums() -> dict[str, str]:
    """Source -> checksum of all files that were ever fetched or converted."""
    path = weights_root() / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        known = read_json(path)
        if not isinstance(known, dict):
            raise CorruptFileError(f"{path}: not a JSON object")
        return {str(source): str(digest) for source, digest in known.items()}
    except CorruptFileError as error:
        raise CorruptFileError(f"{error}. Delete it.") from error


def _compare(source: str, digest: str) -> None:
    """Compare a file with what its source gave the first time."""
    known = _checksums()
    if known.get(source, digest) != digest:
        raise CorruptFileError(
            f"{source}: the file has the checksum {digest}, but the first download had {known[source]}. It "
            f"was changed or damaged. If the new file is right, delete the line in "
            f"{weights_root() / CHECKSUMS} and fetch again."
        )


def _remember(source: str, digest: str) -> None:
    """Record the checksum of a file that turned out to be what it should be; later ones must be equal."""
    known = _checksums() | {source: digest}
    write_atomic(weights_root() / CHECKSUMS, json.dumps(known, indent=1, sort_keys=True) + "\n")


def fetch(name: str, *, keep: bool = False, url: str | None = None, advance: Advance | None = None) -> Path:
    """Bring the released weights of ``name`` into the cache, as safetensors, unless they are there.

    Args:
        name: A name of ``comit-bench weights ls`` that stands for a released file.
        keep: Leave the downloaded file beside the converted one.
        url: Another address of the same file, e.g. a mirror. Its content must have the known checksum.
        advance: Called with the bytes so far and the total.

    Raises:
        UsageError: Unknown name.
        MissingError: The server cannot be reached.
        CorruptFileError: The file is not what it should be, or not what it was.
    """
    name, release = find_release(name)
    source = str(release)
    with _locked():
        there = stored(name)
        if there is not None:
            return there
        folder, ours = weights_root() / name, True
        if release.hub and not url:
            hint = f"or run `comit-bench weights convert {name} FILE`"
            file = hub.fetch(release.hub, (release.file,), offline=False, hint=hint) / release.file
            ours = False  # it belongs to the hub's own cache
        else:
            file = folder / release.file
            if not file.is_file():
                download(str(url or release.url), file, advance=advance, checked=source in _checksums())
        digest = sha256_file(file)
        try:
            _compare(source, digest)
            convert_file(name, release, file, folder, digest=digest)
            _remember(source, digest)  # not before: a wrong first file must not block the right one
        except BenchError:
            if ours:
                file.unlink(missing_ok=True)  # the next attempt must not find a wrong file
            raise
        if ours and not keep:
            file.unlink()
        return folder


def convert(name: str, file: Path, *, output: Path | None = None) -> Path:
    """Convert a file that was fetched by hand.

    Args:
        name: See :func:`fetch`: says what the file is.
        file: The released pickle.
        output: Directory; by default the cache, where ``--tokenizer NAME`` finds it.

    Raises:
        UsageError: Unknown name, or tensors that do not fit it.
        MissingError: No such file.
        CorruptFileError: The file cannot be read.
    """
    name, release = find_release(name)
    if not file.is_file():
        raise MissingError(f"{file}: no such file")
    folder = output or weights_root() / name
    require_folder(folder)
    with _locked():
        convert_file(name, release, file, folder, digest=sha256_file(file))
    return folder


def converted(name: str, file: Path) -> Path:
    """The converted form of a pickle that was named with ``--weights``; made once per content."""
    digest = sha256_file(file)
    folder = weights_root() / f"{name}-{digest.removeprefix('sha256:')[:16]}"
    with _locked():
        if not (folder / SOURCE).is_file():
            convert_file(*find_release(name), file, folder, digest=digest)
    return folder


def convert_file(name: str, release: Release, file: Path, folder: Path, *, digest: str) -> None:
    """Write ``model.safetensors``, ``config.json`` (if the family has one) and ``source.json``.

    Raises:
        CorruptFileError: The file cannot be read.
        UsageError: Its tensors do not fit the name.
    """
    classes: list[Any] = [resolve(target) for target in release.allow]
    safe = file.suffix == ".safetensors" or is_safetensors(file)
    content: Any = read_tensors(file) if safe else read_torch(file, allow=classes)
    tensors: dict[str, Tensor] = resolve(release.unpack)(content, file)
    if release.check is not None:
        resolve(release.check)(name, tensors, file)
    (folder / SOURCE).unlink(missing_ok=True)  # written last: until then the folder is not whole
    write_tensors(folder / WEIGHT_FILES[0], _unshared(tensors))
    if release.config is not None:
        config = resolve(release.config)(name)
        write_atomic(folder / "config.json", json.dumps(config, indent=1) + "\n")
    note = {"name": name, "source": str(release), "file": file.name, "checksum": digest}
    write_atomic(folder / SOURCE, json.dumps(note, indent=1) + "\n")


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share their memory, which safetensors does not store."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        out[key] = value.clone() if place in seen else value
        seen.add(place)
    return out


def state(name: str) -> str:
    """``yes``, ``part`` (a download begun) or ``no``: whether a released file is here, converted."""
    if stored(name) is not None:
        return "yes"
    folder = weights_root() / name
    return "part" if folder.is_dir() and any(folder.glob("*.part")) else "no"


def weight_source(name: str, weights: Path, *, allow_pickle: bool) -> Path:
    """What ``--weights PATH`` means: a directory or safetensors file as it is, a pickle converted."""
    if weights.is_dir():
        return weights
    if not weights.is_file():
        raise MissingError(
            f"--weights {weights}: no such file or directory. Give a directory with config.json and "
            f"{WEIGHT_FILES[0]}, a .safetensors or .pth file of {name}, or 'random'."
        )
    if weights.suffix not in (".safetensors", ".json", *PICKLES):
        raise UsageError(f"--weights {weights}: expected .safetensors or one of {', '.join(PICKLES)}")
    if is_pickle(weights):
        require_allowed(weights, allow_pickle)
        return converted(name, weights)
    return weights
