"""What tells two tokenizers of equal weights apart: their configuration, and the version of their code.

Both stand in every key of the cache and in every protocol. An adapter of this package states both: the
digest of its resolved specification, and a number that is raised when the same weights and specification
may give other ids. Of code that is not ours and states no version, the source itself is digested.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from inspect import unwrap
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import Any

from comit_bench.files import digest_json
from comit_bench.tokenizers.base import Tokenizer

OURS = "comit_bench"


def configuration_digest(specification: Any) -> str:
    """``sha256:<hex>`` of everything that config files and defaults have decided about a network.

    Args:
        specification: A dataclass, nested ones included, or a mapping of plain values. Names that begin
            with an underscore are notes of the program that wrote a file and are left out.
    """
    values = specification if isinstance(specification, Mapping) else asdict(specification)
    return digest_json(_plain(values))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items() if not str(key).startswith("_")}
    if isinstance(value, list | tuple | set | frozenset):
        parts = [_plain(part) for part in value]
        return sorted(parts, key=str) if isinstance(value, set | frozenset) else parts
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def code_version(tokenizer: Tokenizer) -> str:
    """Version of the code that computes the tokens.

    ``info.version`` where it is given. Else, and for somebody else's class that inherits from an adapter of
    this package, :func:`source_digest` of the class.
    """
    stated, kind = tokenizer.info.version, type(tokenizer)
    if (stated and _states_its_own(kind)) or _is_ours(kind):
        return stated
    return "+".join(part for part in (stated, source_digest(kind)) if part)


def plugin_version(tokenizer: Tokenizer, loader: Callable[..., Any], origin: str) -> str:
    """The same for what a plugin's loader made; without ``info.version``, its distribution's version as well.

    Args:
        tokenizer: What it made. The version of an adapter of this package is not the loader's own.
        loader: Function, class or another object that is called.
        origin: ``plugin:<distribution>``.
    """
    stated, kind = tokenizer.info.version, type(tokenizer)
    if stated and _states_its_own(kind):
        return stated
    function = loader.func if isinstance(loader, partial) else loader
    made_by = function if isinstance(function, FunctionType | type) else type(function)
    try:
        released = version(origin.partition(":")[2])
    except (PackageNotFoundError, ValueError):
        released = ""
    return "+".join(part for part in (stated, released, source_digest(kind, made_by)) if part)


def _states_its_own(kind: type) -> bool:
    """Whether ``info.version`` is that of the class itself, and not of an adapter that it inherits from."""
    return not any(map(_is_ours, kind.__mro__))


@lru_cache(maxsize=64)
def source_digest(*things: Any) -> str:
    """The first 16 hex digits of a digest of the source behind classes and functions.

    It covers every ``.py`` file of the top-level packages (or modules) that they are defined in, the files
    of a class's parents, and for each class its name, its plain attributes and the local values of its
    methods. Methods that come from no such file (a notebook, ``exec``, a patched class) are taken with the
    functions and plain values that they name. It is taken once per process: what runs is what was there
    when it was first asked for.

    Args:
        things: Classes and functions.
    """
    files = {path for thing in things if _is_foreign(thing) for path in _package_files(thing.__module__)}
    parts = [part for thing in things for part in (thing.__mro__ if isinstance(thing, type) else (thing,))]
    theirs = [part for part in parts if _is_foreign(part)]
    files |= {path for part in theirs if (path := _file(part.__module__)) is not None}
    contents = sorted((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files)
    described = [f"{part.__qualname__} {_described(part, files, set())}" for part in theirs]
    return digest_json([contents, described]).removeprefix("sha256:")[:16]


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == OURS


def _is_foreign(thing: Any) -> bool:
    """Neither ours nor of Python or torch, whose versions stand in the record's environment."""
    top = (thing.__module__ or "").partition(".")[0]
    return top == "__main__" or top not in (OURS, "torch", *sys.stdlib_module_names)


def _file(module: str) -> Path | None:
    name = getattr(sys.modules.get(module), "__file__", None)
    path = Path(name).resolve() if name else None
    return path if path is not None and path.suffix == ".py" and path.is_file() else None


def _package_files(module: str) -> list[Path]:
    """All ``.py`` files of the top-level package of a module, or the one file that it is."""
    folders = getattr(sys.modules.get(module.partition(".")[0]), "__path__", ())
    if folders:
        return [path.resolve() for folder in folders for path in Path(folder).rglob("*.py")]
    path = _file(module)
    return [] if path is None else [path]


def _described(thing: Any, files: set[Path], seen: set[object]) -> str:
    """What a class or function adds to the files: plain attributes, local values, code from elsewhere."""
    body = vars(thing) if isinstance(thing, type) else {"": thing}
    lines = []
    for name, member in sorted(body.items()):
        inner = getattr(member, "fget", None) or getattr(member, "__func__", None) or member
        function = unwrap(inner) if callable(inner) else inner
        if isinstance(function, FunctionType):
            lines.append(f"{name} {_function_text(function, files, seen)}")
        elif not name.startswith("__") and _is_plain(member):
            lines.append(f"{name} {member!r}")
    return "\n".join(lines)


def _function_text(function: FunctionType, files: set[Path], seen: set[object]) -> str:
    """Defaults and local values of a function; and what it computes, when the files do not say it."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *cells]
    text = repr([value for value in values if _is_plain(value)])
    code = function.__code__
    if Path(code.co_filename).resolve() in files:
        return f"{code.co_firstlineno} {text}"
    text += _code_text(code)
    for name in sorted(_names(code)):
        value = function.__globals__.get(name)
        if name in function.__globals__ and _is_plain(value):
            text += f" {name}={value!r}"
        elif isinstance(value, FunctionType | type) and value not in seen and _is_foreign(value):
            seen.add(value)
            text += f" {name}=({_described(value, files, seen)})"
    return text


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | bytes | None)


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that was never bound
        return False


def _inner(code: CodeType) -> list[CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(inner) for inner in _inner(code)))


def _code_text(code: CodeType) -> str:
    """What a piece of code computes, without where it stands."""
    plain = [sorted(map(repr, c)) if isinstance(c, frozenset) else repr(c)
             for c in code.co_consts if not isinstance(c, CodeType)]  # fmt: skip
    inner = [_code_text(part) for part in _inner(code)]
    return f"{code.co_code.hex()} {plain} {inner} {code.co_names} {code.co_varnames}"
