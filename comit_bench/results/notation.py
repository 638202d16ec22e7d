"""How results are written everywhere: decimals, names on one line, marks at rows and cells."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

UNTRAINED, INCOMPLETE, PUBLISHED, UNCONVERGED = "†", "‡", "§", "¶"
MARKS = {
    UNTRAINED: "untrained: random weights",
    INCOMPLETE: "incomplete: only part of the data was used (--limit, or images are missing); not ranked",
    PUBLISHED: "published number, not measured here",
    UNCONVERGED: "the best epoch of a probe was the last one allowed: it may not have finished learning",
}


def decimals_for(unit: str, values: Sequence[float]) -> int:
    """Printed precision of numbers of a unit."""
    known = {"%": 1, "dB": 2}
    if unit in known:
        return known[unit]
    largest = max(abs(value) for value in values)
    return 3 if largest < 10 else 2 if largest < 100 else 1


def format_number(value: float, decimals: int) -> str:
    """Fixed decimals; huge values in scientific notation; never ``-0.0``."""
    if abs(value) >= 1e7:
        return f"{value:.2e}"
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if not text.strip("-0.") else text


def one_line(text: str) -> str:
    """Text without line breaks, control characters and invisible signs, which tear tables and terminals."""
    kinds = {"Cc": " ", "Zl": " ", "Zp": " ", "Cf": "", "Cs": "?"}
    return " ".join("".join(kinds.get(unicodedata.category(c), c) for c in text).split())
