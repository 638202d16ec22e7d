"""Options of a tokenizer, read off its loader's signature.

What may be set with ``--option``, and of which type it is: keyword arguments annotated with ``int``,
``float``, ``bool``, ``str``, ``Literal[...]`` or a union of them, one by one or in
``**options: Unpack[SomeTypedDict]``.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from functools import partial
from inspect import Parameter, isclass, signature, unwrap
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, Unpack, get_args, get_origin

from comit_bench.errors import UsageError

LOADER = ("weights", "device", "offline", "seed", "dtype")  # what every loader gets, options apart
ON, OFF = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_KEYWORD = (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_WORDS = {bool: ("true", "false"), int: ("a whole number",), float: ("a number",)}


def taken_by(loader: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """Keyword arguments of a loader, the name apart, and whether it takes any other.

    Returns:
        Name -> type, ``Any`` where there is no annotation or its names cannot be found; and whether the
        loader is open-ended (``**options``).
    """
    try:
        parameters = list(signature(loader).parameters.values())
    except (TypeError, ValueError) as error:
        raise UsageError(f"loader {loader!r}: its signature cannot be read ({error})") from error
    if not parameters or parameters[0].kind in (Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD):
        raise UsageError(f"loader {loader!r}: its first argument must be the tokenizer's name")
    found = {p.name: resolved(p.annotation, loader) for p in parameters[1:] if p.kind in _KEYWORD}
    rest = [p for p in parameters if p.kind is Parameter.VAR_KEYWORD]
    listed = resolved(rest[0].annotation, loader) if rest else None
    if get_origin(listed) is Unpack:
        return found | typing.get_type_hints(get_args(listed)[0]), False
    return found, bool(rest)


def resolved(annotation: Any, loader: Any) -> Any:
    """An annotation, also one that is written as a text; ``Any`` when its names are not to be had."""
    if annotation is Parameter.empty:
        return Any
    function = loader.func if isinstance(loader, partial) else unwrap(loader)
    if not hasattr(function, "__globals__"):  # a class, or an object that is called
        function = function.__init__ if isclass(function) else type(function).__call__
    holder: Any = SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(holder, getattr(function, "__globals__", {}), {})["it"]
    except (NameError, TypeError, SyntaxError, AttributeError):
        return Any


def convert(value: Any, annotation: Any, what: str) -> Any:
    """A text or number as the type that a loader asks for; whatever else came is handed on.

    Args:
        value: Of the command line, or from Python.
        annotation: What it should be. Without one, texts that look like numbers become numbers.
        what: Named in the error.
    """
    if not isinstance(value, str | int | float):
        return value
    union = get_origin(annotation) in (typing.Union, UnionType)
    parts = get_args(annotation) if union else (annotation,)
    kinds = [part for part in parts if part not in (None, NoneType)] or [Any]
    kinds.sort(key=lambda kind: (kind is str, kind is float))  # those that take the most come last
    for kind in kinds:
        if (found := _read(value, kind)) is not None:
            return found
    words = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    words += [word for kind in kinds if kind in _WORDS for word in _WORDS[kind]]
    words = ["on or off", *words] if kinds == [bool] else words
    before = ", ".join(words[:-1]) + " or " if len(words) > 1 else ""
    raise UsageError(f"{what} must be {before}{words[-1]}, got {value!r}")


def _read(value: str | int | float, kind: Any) -> Any:
    """The value as one type; None when it is none of it."""
    text = str(value).strip()
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if str(choice) == text), None)
    if kind is bool:
        return text.lower() in ON if text.lower() in ON + OFF else None
    if kind in (int, float):
        return None if isinstance(value, bool) else _number(text, kind)
    if kind in (Any, object):
        numbers = (_number(text, number) for number in (int, float)) if isinstance(value, str) else ()
        return next((number for number in numbers if number is not None), value)
    return value if isinstance(value, str) else text


def _number(text: str, kind: type[int] | type[float]) -> int | float | None:
    try:
        number = kind(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
