"""What people and other programs wrote: paths, text, JSON and YAML.

Whatever bytes a file holds, reading it ends in a value or in one of our errors that names the file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from comit_bench.errors import SHOWN, BenchError, CorruptFileError, MissingError, UsageError, shown
from comit_bench.nn.plain_files import parse_json as parse_json

SMALL_TEXT = 1_000_000  # bytes of a file that a person writes
LARGE_TEXT = 64_000_000  # bytes of a file that a program writes
DEEPEST = 64  # levels of a YAML file


def read_text(path: Path, *, most: int = LARGE_TEXT) -> str:
    """The text of a UTF-8 file of at most ``most`` bytes, without a byte order mark."""
    try:
        if not path.is_file():
            if path.exists() or path.is_symlink():
                raise CorruptFileError(
                    f"{path}: cannot be read: not a file, but a folder, a device or a link that leads nowhere"
                )
            raise MissingError(f"{path}: no such file")
        size = path.stat().st_size
        if size > most:
            raise CorruptFileError(
                f"{path}: too large to be what it should be: {size:,} bytes, at most {most:,}"
            )
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start:,})") from error
    except BenchError:
        raise
    except (OSError, ValueError) as error:
        raise BenchError(
            f"{shown(str(path))}: cannot be read: {getattr(error, 'strerror', error)}"
        ) from error


def read_json(path: Path, *, most: int = LARGE_TEXT, strict: bool = True) -> Any:
    """The value of a JSON file; errors are those of :func:`read_text` and :func:`parse_json`."""
    return parse_json(read_text(path, most=most), path, strict=strict)


_KINDS = ("null", "bool", "int", "float", "str", "seq", "map")
_TAGS = {None, *(f"tag:yaml.org,2002:{kind}" for kind in _KINDS)}


class _PlainLoader(yaml.SafeLoader):
    """A loader of plain values: no anchors, no dates, no tags of other types, no key twice, nothing deep."""

    level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            problem = "anchors and aliases (&, *) are not taken: write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        if self.level >= DEEPEST:
            problem = f"nested more than {DEEPEST} levels deep"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                problem = f"the key {shown(name)} is no text: put it in quotes"
            elif name in seen:
                problem = f"key {shown(name)} occurs twice"
            else:
                seen.add(name)
                continue
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


_PlainLoader.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in _TAGS
}
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag in _TAGS]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: object) -> Any:
    """The value of a YAML text, made of what JSON has: null, truth, numbers, text, lists and mappings.

    Keys and dates are text. Anchors are refused: they can make a small file endless. Messages name ``where``.
    """
    try:
        value = _PlainLoader(text).get_single_data()
        _check_plain(value)
    except RecursionError as error:
        raise UsageError(f"{where}: not valid YAML: nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise UsageError(f"{where}: not valid YAML: {error.problem or error.context}{place}") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = "a number of too many digits" if "integer string" in reason else reason
        raise UsageError(f"{where}: not valid YAML: {reason[:SHOWN]}") from error
    return value


def _check_plain(value: Any) -> None:
    """Raises ValueError for what JSON does not have, and for numbers that no setting can mean."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_plain(key)
            _check_plain(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_plain(inner)
    elif isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("text with half of a surrogate pair") from None
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no finite number")
    elif isinstance(value, int) and value.bit_length() > 64:
        raise ValueError("a whole number of more than 64 bits")


def read_yaml(path: Path) -> Any:
    """The value of a YAML file that a person wrote, see :func:`parse_yaml`; UsageError for any other."""
    try:
        return parse_yaml(read_text(path, most=SMALL_TEXT), path)
    except CorruptFileError as error:
        raise UsageError(str(error)) from error
