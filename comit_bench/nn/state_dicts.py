"""Files of weights -> tensors by name -> a module. One way for all networks; nothing in a file is ever run.

Three steps:

- :func:`read` takes a file by its content, not its name: safetensors, an index of safetensors shards, or
  what ``torch.save`` wrote (as plain tensors only). Anything else is named for what it is.
- :func:`select` finds the network among what people store: under ``state_dict`` or ``model``, beside an
  optimizer, behind prefixes such as ``module.`` that all keys share, next to its average (EMA).
- :func:`compare` looks at names and shapes, :func:`check_types` at types and values; only then does
  :func:`fill` assign float32 tensors.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from comit_bench.errors import CorruptFileError, MissingError, UsageError, shown
from comit_bench.nn.plain_files import foreign, head_of, is_safetensors, read_json, some

INDEX = ".safetensors.index.json"
AVERAGES = re.compile(r"(.+_)?ema(_.+)?|(.+_)?averaged?(_.+)?|shadow(_.+)?")  # parts of names of averages
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WHOLES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
DEEPEST_PREFIX = 5
T = TypeVar("T")
_log = logging.getLogger(__name__)


# ---------------------------------------------------------------- reading


def is_pickle(path: Path) -> bool:
    """Whether :func:`read` takes a file for one that ``torch.save`` wrote.

    Raises:
        MissingError: Nothing there.
        CorruptFileError: A file of another kind; says which.
    """
    if path.name.endswith(".index.json") or path.suffix == ".safetensors" or is_safetensors(path):
        return False
    if (what := foreign(path)) is not None:
        raise CorruptFileError(f"{path}: not a readable weight file of plain tensors: it is {what}")
    return True


def read(path: Path, *, allow: Sequence[type] = ()) -> tuple[dict[str, Tensor], bool]:
    """All tensors of a file, by name; what stands in nested mappings is named ``outer.inner``.

    Args:
        path: safetensors, an index of shards, or written by ``torch.save``.
        allow: Further harmless classes that a torch file may name beside tensors.

    Returns:
        The tensors, and whether they lay in nested mappings.

    Raises:
        MissingError: The file, or a shard, is not there.
        CorruptFileError: Damaged or of another kind; says which.
    """
    if path.name.endswith(".index.json"):
        return read_shards(path), False
    if path.suffix == ".safetensors" or is_safetensors(path):
        return read_safetensors(path), False
    return flatten(read_torch(path, allow=allow), path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        MissingError: Nothing there.
        CorruptFileError: Truncated, empty or of another kind.
    """
    _refuse_foreign(path)
    return _guarded(path, lambda: load_file(path))


def read_metadata(path: Path) -> dict[str, str]:
    """The free texts in the header of a safetensors file.

    Raises:
        MissingError: Nothing there.
        CorruptFileError: See :func:`read_safetensors`.
    """

    def read() -> dict[str, str]:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})

    _refuse_foreign(path)
    return _guarded(path, read)


def _refuse_foreign(path: Path) -> None:
    what = foreign(path)
    if what is None and not is_safetensors(path) and head_of(path, 2).startswith((b"PK", b"\x80")):
        what = "a torch file (pickle) with the wrong name: call it .pth, or convert it"
    if what is not None:
        raise CorruptFileError(f"{path}: not a readable safetensors file: it is {what}")


def _guarded(path: Path, function: Callable[[], T]) -> T:
    try:
        return function()
    except Exception as error:  # which one depends on the damage and on the library's version
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptFileError(
            f"{path}: not a readable safetensors file ({reason}). It is truncated or of another format: "
            "download or export it again."
        ) from error


def read_torch(path: Path, *, allow: Sequence[type] = ()) -> Any:
    """What ``torch.save`` wrote, without running anything it names.

    Raises:
        MissingError: Nothing there.
        CorruptFileError: Damaged, of another kind, or it names a class that is not allowed.
    """
    if not is_pickle(path):
        raise CorruptFileError(
            f"{path}: not a readable weight file of plain tensors: it is a safetensors file"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *allow]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the reader raises whatever the bytes make of it
        named = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch's own text advises to run it: not repeated
        if named:
            raise CorruptFileError(
                f"{path}: not a readable weight file of plain tensors: it names {named[1]}, which is no "
                "tensor and will not be loaded. Where this is a whole network or a training state, save its "
                "state_dict() alone, best as safetensors."
            ) from error
        raise CorruptFileError(
            f"{path}: not a readable weight file of plain tensors ({type(error).__name__}). It is truncated "
            "or of another format: download it again."
        ) from error


def flatten(content: object, path: Path) -> tuple[dict[str, Tensor], bool]:
    """Tensors in nested mappings -> ``outer.inner`` names; anything else in it is left out."""
    found: dict[str, Tensor] = {}
    nested = False

    def walk(value: object, name: str, depth: int) -> None:
        nonlocal nested
        if isinstance(value, Tensor):
            if name in found:
                raise CorruptFileError(f"{path}: holds two tensors of the name {name}")
            found[name] = value.detach()
        elif isinstance(value, Mapping) and depth < DEEPEST_PREFIX:
            nested = nested or depth > 0
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else str(key), depth + 1)

    if isinstance(content, Mapping):
        walk(content, "", 0)
    if not found:
        keys = [str(key) for key in content] if isinstance(content, Mapping) else []
        what = f"{type(content).__name__} with the entries {some(keys)}" if keys else type(content).__name__
        empty = " with nothing in it" if isinstance(content, Mapping) and not keys else ""
        raise CorruptFileError(
            f"{path}: expected a state dict, a flat dictionary of tensors, alone or under an entry such as "
            f"state_dict, model or ema; found {what}{empty}"
        )
    return found, nested


def read_shards(index: Path) -> dict[str, Tensor]:
    """All tensors of a sharded checkpoint.

    Args:
        index: ``model.safetensors.index.json``: ``weight_map`` names the shard of every tensor, a file
            beside or below it.

    Raises:
        MissingError: A shard is not there.
        CorruptFileError: The index is damaged, points elsewhere, or does not agree with its shards.
    """
    listed: dict[str, set[str]] = {name: set() for name in shards(index)}
    for tensor, name in read_json(index)["weight_map"].items():
        listed[name].add(tensor)
    found: dict[str, Tensor] = {}
    for name, wanted in listed.items():
        held = read_safetensors(index.parent / name)
        for what, wrong in (
            ("lacks tensors that the index names", wanted - held.keys()),
            ("holds tensors that the index does not name there", held.keys() - wanted),
        ):
            if wrong:
                raise CorruptFileError(f"{index.parent / name}: this shard {what}: {some(sorted(wrong))}")
        found |= held
    return found


def shards(index: Path, *, present: bool = True) -> list[str]:
    """Names of the shards of an index, sorted.

    Args:
        index: See :func:`read_shards`.
        present: All of them must be there.
    """
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise CorruptFileError(
            f"{index}: no index of shards: expected 'weight_map' with a file for every tensor"
        )
    names = sorted(set(table.values()))
    for name in names:
        parts = PurePosixPath(name).parts
        plain = parts and len(name) < 256 and not set("\\\0") & set(name) and not PureWindowsPath(name).drive
        if not plain or name.startswith("/") or ".." in parts or not name.endswith(".safetensors"):
            raise CorruptFileError(
                f"{index}: names the shard {shown(name)}, expected a .safetensors file in the same folder"
            )
    missing = [name for name in names if not (index.parent / name).exists()]
    if present and missing:
        raise MissingError(
            f"{index.parent}: {len(missing)} of {len(names)} shards are not there: {some(missing)}. Download "
            "them again."
        )
    return names


def stored_types(path: Path) -> dict[str, str]:
    """Names and types (``F32``, ``I8``, …) in the header of a safetensors file; no tensor is read.

    Raises:
        MissingError: Nothing there.
        CorruptFileError: See :func:`read_safetensors`.
    """

    def read() -> dict[str, str]:
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        return {key: str(entry["dtype"]) for key, entry in header.items() if key != "__metadata__"}

    _refuse_foreign(path)
    return _guarded(path, read)


# ---------------------------------------------------------------- the network among the rest


def select(
    tensors: Mapping[str, Tensor],
    landmarks: Sequence[str],
    path: Path,
    *,
    nested: bool = False,
    average: bool = True,
) -> dict[str, Tensor]:
    """The tensors of one network, without the prefix that all of its keys share.

    Args:
        tensors: Of a file.
        landmarks: Beginnings of keys that tell the network, e.g. ``encoder.query_tokens``. Where most of
            them are found behind one prefix, there it is.
        path: Named in messages.
        nested: Whether the tensors lay in nested mappings.
        average: Where a file holds a network and its average, take the average (what papers evaluate).
            Which one was taken is logged.
    """
    plain = _unwrapped(tensors, path)
    prefixes = _prefixes(plain, landmarks)
    if not prefixes:
        if nested:
            entries = sorted({key.partition(".")[0] for key in plain})
            raise CorruptFileError(
                f"{path}: expected a state dict, a flat dictionary of tensors, alone or under an entry such "
                f"as state_dict, model or ema; its entries {some(entries)} hold no {' or '.join(landmarks)}"
            )
        return plain
    averages = [prefix for prefix in prefixes if any(map(AVERAGES.fullmatch, prefix.split(".")))]
    others = [prefix for prefix in prefixes if prefix not in averages]
    choice = (averages or others) if average else (others or averages)
    if len(choice) > 1:
        names = ", ".join(prefix.rstrip(".") or "(no prefix)" for prefix in choice)
        raise CorruptFileError(
            f"{path}: holds several such networks ({names}). Save the one that is meant alone."
        )
    chosen = _below(plain, choice[0], prefixes)
    if averages and others:
        if choice[0] in averages and len(others) == 1:  # an average of parameters has no buffers
            rest = _below(plain, others[0], prefixes)
            chosen = {**rest, **chosen} if chosen.keys() <= rest.keys() else chosen
        kind = "average (EMA)" if choice[0] in averages else "last weights"
        place = choice[0].rstrip(".") or "the file itself"
        _log.warning("%s: holds a network and its average; the %s are taken (%s)", path, kind, place)
    elif choice[0]:
        _log.info("%s: the weights are those behind %r", path, choice[0])
    return chosen


def _unwrapped(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Without the names that compiling, checkpointing and sharding put into keys."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = ".".join(part for part in key.split(".") if part not in WRAPPERS) or key
        if name in found:
            raise CorruptFileError(
                f"{path}: {key} and another tensor have the same name without their wrappers"
            )
        found[name] = value
    return found


def _prefixes(keys: Iterable[str], landmarks: Sequence[str]) -> list[str]:
    """Prefixes behind which most landmarks stand: ``""``, ``"module."``, ``"ema.module."``."""
    seen: dict[str, set[str]] = {}
    for key in keys:
        padded = f".{key}."
        for landmark in landmarks:
            place = padded.find(f".{landmark}.")
            while place >= 0:
                prefix = key[:place]
                if prefix.count(".") <= DEEPEST_PREFIX:
                    seen.setdefault(prefix, set()).add(landmark)
                place = padded.find(f".{landmark}.", place + 1)
    most = max(map(len, seen.values()), default=0)
    return sorted(prefix for prefix, found in seen.items() if len(found) == most)


def _below(tensors: Mapping[str, Tensor], prefix: str, prefixes: Sequence[str]) -> dict[str, Tensor]:
    """What stands behind a prefix and no longer one of the others, without it."""
    inner = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    return {
        key.removeprefix(prefix): value
        for key, value in tensors.items()
        if key.startswith(prefix) and not (inner and key.startswith(inner))
    }


# ---------------------------------------------------------------- into the network


def compare(
    expected: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    what: str,
    optional: tuple[str, ...] = (),
    settings: Sequence[tuple[str, str]] = (),
) -> None:
    """Compare names and shapes.

    Args:
        expected: State dict of the network, on any device.
        tensors: The checkpoint.
        path: Named in the error.
        what: What it should fit.
        optional: Prefixes of keys that may be absent.
        settings: Pattern of keys -> what in ``config.json`` decides about them; the first that matches
            the first difference is named.
    """
    missing = [k for k in expected if k not in tensors and not k.startswith(optional or ("\0",))]
    unexpected = [k for k in tensors if k not in expected]
    wrong = [k for k, v in expected.items() if k in tensors and tensors[k].shape != v.shape]
    shapes = [f"{k} {list(tensors[k].shape)} instead of {list(expected[k].shape)}" for k in wrong]
    if not (missing or unexpected or wrong):
        return
    lines = [f"{path}: this checkpoint does not fit {what}"]
    for title, items in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes)):
        if items:
            lines.append(f"  {title} ({len(items)}): {some(items)}")
    first = [*wrong, *missing, *unexpected][0]
    stack = re.match(r"(.+?)\.\d+\.", next(iter([*missing, *unexpected]), ""))
    if stack:
        pattern = re.escape(stack[1]) + r"\.(\d+)\."
        counts = [count_numbers(keys, pattern) for keys in (expected, tensors)]
        if counts[0] != counts[1]:
            first = [*missing, *unexpected][0]
            lines.append(f"  {stack[1]}: {counts[0]} blocks expected, {counts[1]} in the file")
    key = next((setting for keys, setting in settings if re.match(keys, first)), None)
    told = f" {first} is decided by {key}." if key else ""
    lines.append(f"Check that config.json and the weights belong together.{told}")
    raise UsageError("\n".join(lines))


def name_of(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``float32``."""
    return str(dtype).removeprefix("torch.")


def _problem(value: Tensor, wanted: Tensor) -> str | None:
    """What is wrong with the type or the values of a tensor that is to become ``wanted``."""
    kind = name_of(value.dtype)
    if value.device.type == "meta":
        return "has no values: it was saved from the meta device"
    if value.layout != torch.strided or value.is_quantized:
        return f"is {'quantized' if value.is_quantized else 'sparse'}, expected plain floating-point numbers"
    if not wanted.is_floating_point():
        return None if value.dtype in WHOLES else f"is {kind}, expected whole numbers"
    if value.dtype not in FLOATS:
        return f"is {kind}, expected floating-point numbers (float32, float16, bfloat16 or float64)"
    if bool(value.float().isfinite().all()):
        return None
    bad = int((~value.isfinite()).sum())
    if not bad:
        return f"is {kind} with values too large for float32"
    return f"holds {bad} of {value.numel()} values that are NaN or infinite"


def check_types(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors of another type, and values that are not finite, before they become weights.

    Args:
        expected: State dict of the network; other names are not looked at.
        tensors: The checkpoint.
        path: Named in the error.
    """
    problems = [
        f"{key} {problem}"
        for key, value in tensors.items()
        if key in expected and (problem := _problem(value, expected[key])) is not None
    ]
    if problems:
        raise CorruptFileError(f"{path}: {some(problems)}. Download or export it again.")


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Assign compared and checked ``tensors`` to ``module`` (which may be on the meta device), as float32.

    Buffers of whole numbers keep their type.
    """
    kinds = {k: torch.float32 if v.is_floating_point() else v.dtype for k, v in module.state_dict().items()}
    module.load_state_dict({k: v.to(kinds[k]) for k, v in tensors.items()}, strict=False, assign=True)


def count_numbers(keys: Iterable[str], pattern: str) -> int:
    """How many numbers the first group of ``pattern`` finds at the beginning of keys: blocks of a stack."""
    return len({int(match[1]) for key in keys if (match := re.match(pattern, key))})
