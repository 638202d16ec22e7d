"""One file with the messages of a folder of images, for users who only want tokens: ``docs/tokens.md``.

A safetensors file: ``ids`` [n, K] in the smallest unsigned type, or ``codes`` float32 [n, K, d] when there is
no finite vocabulary; ``offsets`` float32 [n, 2] where the tokenizer has them; ``names`` and ``broken``, the
UTF-8 bytes of a JSON list and a JSON mapping. The metadata say how the tokens were made.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from comit_bench.data.folders import SUFFIXES
from comit_bench.data.tokens.shards import Array, checksum, id_dtype, sorted_header
from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError, shown
from comit_bench.recipes.reading import parse_json

LONGEST_PART = 250  # bytes of a part of a name (with .png behind it)
LONGEST_NAME = 3000  # characters
FORMAT, FORMAT_VERSION = "comit-bench tokens", 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenOrigin:
    """How tokens were made: everything that can change one, and who made the file.

    Attributes:
        tokenizer: Name, as ``load_tokenizer`` takes it where it is not a directory.
        family: Adapter family.
        weights: ``sha256:<hex>``, ``random:<seed>``, ``fitted:<hex>`` or ``none``.
        message_length: K.
        vocab_size: Distinct ids, None for continuous codes.
        code_dim: d.
        resolution: Side of the images the tokenizer saw, in pixels.
        preprocessing: Declared string.
        policy: Cropping policy, None for tokenizers without crops.
        options: Options of the tokenizer.
        seed: Of the per-image generators.
        comit_bench: Version of the package that wrote the file.
        configuration: Digest of the network's configuration; empty in files that do not say it.
        version: Of the tokenizer's code; empty in files that do not say it.
    """

    tokenizer: str
    family: str
    weights: str
    message_length: int
    vocab_size: int | None
    code_dim: int
    resolution: int
    preprocessing: str
    policy: str | None
    options: Mapping[str, str]
    seed: int
    comit_bench: str
    configuration: str = ""
    version: str = ""

    def metadata(self) -> dict[str, str]:
        """As the header of the file holds it: all texts; an empty one stands for None."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["options"] = json.dumps(dict(self.options), sort_keys=True)
        return {name: "" if value is None else str(value) for name, value in values.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> TokenOrigin:
        """The inverse of :meth:`metadata`. Raises LookupError or ValueError."""
        defaults = {"configuration": "", "version": "", **metadata}  # older files have neither
        values: dict[str, Any] = {name: defaults[name] for name in cls.__dataclass_fields__}
        for name in ("message_length", "code_dim", "resolution", "seed"):
            values[name] = int(values[name])
        values["vocab_size"] = int(values["vocab_size"]) if values["vocab_size"] else None
        values["policy"] = values["policy"] or None
        values["options"] = parse_json(values["options"], "options")
        if not isinstance(values["options"], dict):
            raise ValueError("options is not a JSON mapping")
        return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenFile:
    """The content of a token file.

    Attributes:
        origin: How it was made.
        names: Relative name of every image, unique [n].
        ids: Integers [n, K], or None for continuous codes.
        codes: float32 [n, K, d], or None for a finite vocabulary.
        offsets: float32 [n, 2], or None.
        broken: Name -> why, for images that could not be read; they have no row.
    """

    origin: TokenOrigin
    names: tuple[str, ...]
    ids: Array | None = None
    codes: NDArray[np.float32] | None = None
    offsets: NDArray[np.float32] | None = None
    broken: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)


def token_file_bytes(content: TokenFile) -> bytes:
    """The file; equal tokens are equal bytes."""
    try:
        _check(content)
    except ValueError as error:
        raise UsageError(f"these tokens cannot be written: {error}") from error
    tensors: dict[str, Array] = {
        "names": _json_tensor(list(content.names)),
        "broken": _json_tensor(dict(sorted(content.broken.items()))),
    }
    if content.ids is not None:
        assert content.origin.vocab_size is not None
        tensors["ids"] = np.ascontiguousarray(content.ids, dtype=id_dtype(content.origin.vocab_size))
    if content.codes is not None:
        tensors["codes"] = np.ascontiguousarray(content.codes, dtype=np.float32)
    if content.offsets is not None:
        tensors["offsets"] = np.ascontiguousarray(content.offsets, dtype=np.float32)
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION), **content.origin.metadata()}
    metadata["sha256"] = checksum(metadata, tensors)
    return sorted_header(save(tensors, metadata))


def _json_tensor(value: object) -> Array:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)


def read_token_file(path: Path) -> TokenFile:
    """Read and verify a token file.

    Raises:
        MissingError: No such file.
        CorruptFileError: Truncated, changed, or no token file at all.
        UsageError: Written by a later version in a format this one does not know.
        BenchError: The system cannot read it.
    """
    if not path.exists():
        raise MissingError(f"{path}: no such file. `comit-bench tokenize DIR --out {path.name}` makes one.")
    if not path.is_file():
        raise CorruptFileError(f"{path}: a folder, a device or a pipe, not a token file")
    try:
        with safe_open(path, "np") as file:
            metadata: dict[str, str] = dict(file.metadata() or {})
            _check_format(path, metadata)
            tensors: dict[str, Array] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CorruptFileError(
            f"{path}: truncated, or not a safetensors file ({error}). Make it again: comit-bench tokenize."
        ) from error
    except OSError as error:
        raise BenchError(f"{path}: cannot read: {error.strerror or error}") from error
    try:
        if metadata.get("sha256", "") not in ("", checksum(metadata, tensors)):
            raise ValueError("its checksum differs, so it was changed after it was written")
        return _parse(metadata, tensors)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, LookupError) else str(error)
        raise CorruptFileError(
            f"{path}: not an intact token file ({what}). Make it again: comit-bench tokenize."
        ) from error


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise CorruptFileError(
            f"{path}: a safetensors file, but not one of tokens (its metadata lack format = {FORMAT!r}). "
            "`comit-bench tokenize` makes those; docs/tokens.md describes them."
        )
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise UsageError(
            f"{path}: token format {version or 'unknown'}, this version of comit_bench reads "
            f"{FORMAT_VERSION}. Use the version that wrote it: {metadata.get('comit_bench', 'unknown')}."
        )


def _parse(metadata: Mapping[str, str], tensors: Mapping[str, Array]) -> TokenFile:
    """Raises LookupError, ValueError, TypeError or AttributeError for anything that does not fit."""
    names = parse_json(tensors["names"].tobytes().decode("utf-8"), "names")
    broken = parse_json(tensors["broken"].tobytes().decode("utf-8"), "broken") if "broken" in tensors else {}
    if not isinstance(names, list) or not isinstance(broken, dict):
        raise ValueError("names is not a JSON list, or broken is not a JSON mapping")
    found = TokenFile(
        origin=TokenOrigin.from_metadata(metadata),
        names=tuple(names),
        ids=tensors.get("ids"),
        codes=tensors.get("codes"),
        offsets=tensors.get("offsets"),
        broken=broken,
    )
    _check(found)
    return found


def _check(content: TokenFile) -> None:
    """Raises ValueError when the parts do not fit together."""
    origin, count = content.origin, len(content.names)
    finite = origin.vocab_size is not None
    payload = content.ids if finite else content.codes
    if payload is None or (content.codes if finite else content.ids) is not None:
        raise ValueError(
            f"with vocabulary {origin.vocab_size} it must hold {'ids' if finite else 'codes'} only"
        )
    shape = (count, origin.message_length, *(() if finite else (origin.code_dim,)))
    if payload.shape != shape or payload.dtype.kind not in ("iu" if finite else "f"):
        raise ValueError(f"its tokens are {payload.dtype} {list(payload.shape)}, expected {list(shape)}")
    if origin.vocab_size is not None and payload.size:
        low, high = int(payload.min()), int(payload.max())
        if low < 0 or high >= origin.vocab_size:
            raise ValueError(f"its ids reach from {low} to {high}, outside 0..{origin.vocab_size - 1}")
    if content.offsets is not None and content.offsets.shape != (count, 2):
        raise ValueError(f"its offsets are {list(content.offsets.shape)}, expected {[count, 2]}")
    for values in (content.codes, content.offsets):
        if values is not None and not np.isfinite(values).all():
            raise ValueError("its codes or offsets are not finite")
    if len(set(content.names)) != count:
        raise ValueError("its names are not unique")
    for name in content.names:
        check_name(name)


def check_name(name: object, *, windows: bool = os.name == "nt") -> None:
    """Refuse a name that is no relative path inside a folder; on Windows also backslashes and colons."""
    if not isinstance(name, str) or not name or "\0" in name or (windows and set("\\:") & set(name)):
        raise ValueError(f"the name {name!r} is not a relative path with forward slashes")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name or path.as_posix() != name:
        raise ValueError(f"the name {name!r} does not lie inside the folder")
    longest = max(len(part.encode("utf-8", "surrogateescape")) for part in path.parts)
    if longest > LONGEST_PART or len(name) > LONGEST_NAME:
        raise ValueError(f"the name {shown(name)} is longer than file systems take")


def output_names(names: Sequence[str]) -> list[str]:
    """The PNG that each image becomes; no two share one, also where case does not matter.

    ``a.png`` keeps its name. ``a.jpg`` becomes ``a.png`` if no other image could, else ``a.jpg.png``; if even
    that is taken, a number is put in between. The mapping depends on the names alone.
    """
    short = {name: _as_png(PurePosixPath(name)) for name in names}
    wanted: dict[str, int] = {}
    for name in names:
        wanted[_key(short[name])] = wanted.get(_key(short[name]), 0) + 1
    taken = {_key(str(parent)) for name in names for parent in PurePosixPath(name).parents}
    chosen: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (not name.endswith(".png"), name)):
        options = [name] if name.endswith(".png") else [short[name]] if wanted[_key(short[name])] == 1 else []
        options += [f"{name}.png", *(f"{name}.{n}.png" for n in range(2, len(names) + 3))]
        chosen[name] = next(option for option in options if _key(option) not in taken)
        taken.add(_key(chosen[name]))
    return [chosen[name] for name in names]


def _as_png(name: PurePosixPath) -> str:
    image = name.suffix.lower() in SUFFIXES
    return name.with_suffix(".png").as_posix() if image else f"{name}.png"


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
