"""What a file is, told by its content, and JSON read strictly. Nothing in a file is ever run."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from comit_bench.errors import CorruptFileError, MissingError, shown

LARGEST_JSON, DEEPEST_JSON, DIGITS = 64 << 20, 64, 40
SHOWN = 8


def some(items: Sequence[str]) -> str:
    """The first few of them."""
    more = f" … and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


# ---------------------------------------------------------------- what lies there


def head_of(path: Path, size: int = 512) -> bytes:
    """The first bytes of a file."""
    if path.is_dir():
        raise CorruptFileError(f"{path}: this is a directory, where a file is expected")
    if path.is_symlink() and not path.exists():
        raise MissingError(f"{path}: a link to a file that is not there. Download it again.")
    if path.exists() and not path.is_file():  # a pipe would wait for ever
        raise CorruptFileError(f"{path}: this is a pipe or a device, where a file is expected")
    try:
        with path.open("rb") as stream:
            return stream.read(size)
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file") from None
    except OSError as error:
        raise CorruptFileError(f"{path}: cannot be read ({error.strerror or error})") from error


# first bytes -> what it is
_SIGNS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "a git-LFS pointer, not the file itself: run `git lfs pull` in its repository",
    ),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)"),
    (b"GGUF", "a GGUF file (llama.cpp)"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"\xfd7zXZ", "an xz archive: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it first"),
    (b"BZh", "a bzip2 archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
)


def _zip_kind(path: Path) -> str | None:
    """What a zip archive holds, or None when ``torch.save`` wrote it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "a zip archive that is truncated or of another format: download it again"
    ends = {PurePosixPath(name).name for name in names}
    if "constants.pkl" in ends:
        return "a TorchScript archive: save its state_dict() instead"
    if "data.pkl" in ends:
        return None
    if "model.weights.h5" in ends:
        return "a Keras archive"
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz)"
    return "a zip archive without a torch file in it: unpack it first"


def foreign(path: Path) -> str | None:
    """What a file is when it is neither safetensors nor written by ``torch.save``; None for these two.

    Raises:
        MissingError: Nothing there.
        CorruptFileError: A directory, a pipe or a device, or not readable.
    """
    head = head_of(path)
    if not head:
        return "an empty file: it is truncated, download it again"
    if is_safetensors(path):  # first: its length, which comes first, may look like any other sign
        return None
    for sign, what in _SIGNS:
        if head.startswith(sign):
            return what
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page, not the file behind the link: download it again"
    if head.startswith(b"PK"):
        return _zip_kind(path)
    if head.startswith((b"{", b"[")):
        return "a JSON text"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if head[4:8] == b"TFL3" or path.suffix in (".tflite", ".pb"):
        return "a TensorFlow file"
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and re.search(rb"onnx|pytorch", head[:64])):
        return "an ONNX file"
    return None


def is_safetensors(path: Path) -> bool:
    """Whether the header looks like that of a safetensors file: its length, then a JSON object."""
    head = head_of(path, 9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30


# ---------------------------------------------------------------- JSON


def parse_json(text: str, where: object, *, strict: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        text: The text.
        where: File or place, for the message.
        strict: Also refuse a key that occurs twice, numbers that are not finite or of more than 40 digits,
            and text that is not Unicode (half of a surrogate pair). Takes time for hundreds of megabytes.
    """
    hooks: dict[str, Any] = {
        "object_pairs_hook": _once,
        "parse_int": _whole,
        "parse_float": _finite,
        "parse_constant": _finite,
    }
    try:
        value = json.loads(text, **(hooks if strict else {}))
        if strict and "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise CorruptFileError(f"{where}: not valid JSON: nested too deeply") from error
    except UnicodeEncodeError as error:
        raise CorruptFileError(f"{where}: not valid JSON: text with half of a surrogate pair") from error
    except (ValueError, MemoryError) as error:
        reason = "a number of too many digits" if "integer string" in str(error) else str(error)
        raise CorruptFileError(f"{where}: not valid JSON: {reason}") from error
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, read strictly: UTF-8 without a mark, every key once, finite numbers of usual size.

    Raises:
        MissingError: Nothing there.
        CorruptFileError: Says what is wrong with it.
    """
    head = head_of(path)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in head[:4]:
        raise CorruptFileError(f"{path}: not valid JSON: it is UTF-16, or no text. Save it as UTF-8.")
    if head.startswith(b"\xef\xbb\xbf"):
        raise CorruptFileError(
            f"{path}: not valid JSON: it begins with a byte-order mark. Save it as UTF-8 without one."
        )
    if not head.lstrip().startswith((b"{", b"[")) and (what := foreign(path)) is not None:
        raise CorruptFileError(f"{path}: not valid JSON: it is {what}")
    if path.stat().st_size > LARGEST_JSON:
        raise CorruptFileError(
            f"{path}: {path.stat().st_size:,} bytes are too many for a JSON file of this kind"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (ValueError, OSError) as error:
        raise CorruptFileError(f"{path}: not valid JSON ({error}). Download it again.") from error
    content = parse_json(text, path)
    if not isinstance(content, dict):
        raise CorruptFileError(f"{path}: expected a JSON object, found {type(content).__name__}")
    if too_deep(content):
        raise CorruptFileError(f"{path}: nested more than {DEEPEST_JSON} levels deep, which no such file is")
    return content


def too_deep(value: object) -> bool:
    """Whether mappings and lists are nested more than any config is."""
    level: list[object] = [value]
    for _ in range(DEEPEST_JSON):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list | tuple)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"the key {shown(twice[0])} stands there twice")
    return dict(pairs)


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is not finite")
    return value
