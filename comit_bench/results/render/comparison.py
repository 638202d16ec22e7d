"""A comparison on the terminal, within 80 columns, and as sentences."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from textwrap import wrap

from rich.console import Console
from rich.text import Text

from comit_bench.results.compare import Comparison, PairedTest, Untested
from comit_bench.results.notation import decimals_for, format_number, one_line
from comit_bench.results.render.layout import DASH
from comit_bench.results.render.terminal import in_encoding, stdout_console

WIDTH = 80
METRIC = 20  # characters of a metric's name
COLUMNS = (7, 7, 8, 17, 7, 7, 7)  # widths of A, B, A - B, interval, p, McNemar, detects
SHORT = 34  # characters of a row's name over a table


def print_comparison(found: Comparison, console: Console | None = None, *, every: bool = False) -> None:
    """Print on ``console`` (default: stdout); sentences of main metrics only, or of ``every`` one."""
    console = console or stdout_console(WIDTH)
    for line in comparison_lines(found, min(console.width, 100), every=every):
        line.plain = in_encoding(line.plain, console.encoding)
        console.print(line, no_wrap=True, overflow="ignore", crop=False, highlight=False)


def comparison_lines(found: Comparison, width: int = WIDTH, *, every: bool = False) -> list[Text]:
    """Tables, one for each pair of rows; what they mean; what was not tested."""
    lines: list[Text] = []
    for pair, tests in groupby(sorted(found.tests, key=lambda t: _place(found, t)), key=lambda t: (t.a, t.b)):
        lines += [*_table(*pair, list(tests)), Text()]
    for test in found.tests:
        if every or test.main:
            text = one_line(test.sentence)
            style = "bold" if test.significant else ""
            lines += [Text(part, style) for part in wrap(text, max(20, width), subsequent_indent="  ")]
    lines.append(Text())
    for note in _notes(found):
        lines += [Text(part, "dim") for part in wrap(one_line(note), max(20, width), subsequent_indent="  ")]
    return lines


def _place(found: Comparison, test: PairedTest) -> tuple[int, int]:
    return found.rows.index(test.a), found.rows.index(test.b)


def _short(label: str) -> str:
    label = one_line(label)
    return label if len(label) <= SHORT else f"{label[: SHORT // 2 - 1]}…{label[-SHORT // 2 :]}"


def _table(a: str, b: str, tests: list[PairedTest]) -> Iterator[Text]:
    yield Text(f"A {_short(a)}, B {_short(b)}", "bold")
    yield Text("─" * (METRIC + sum(COLUMNS)))
    heads = ("A", "B", "A \N{MINUS SIGN} B", "95 % interval", "p Holm", "McNem.", "finds")
    yield Text(" " * METRIC + _cells(heads))
    for task, same in groupby(tests, key=lambda test: (test.task, test.version)):
        first, *rest = same
        yield Text(f"{one_line(task[0])} v{task[1]}, {_what(first)}", "dim")
        for test in (first, *rest):
            yield _line(test)
    yield Text("─" * (METRIC + sum(COLUMNS)))


def _cells(texts: tuple[str, ...]) -> str:
    return "".join(text.rjust(width) for text, width in zip(texts, COLUMNS, strict=True))


def _what(test: PairedTest) -> str:
    """How many images, and what else was drawn."""
    groups = "" if test.clusters is None else f" in {test.clusters} clusters"
    units = test.units_a if test.units_a == test.units_b else f"{test.units_a} and {test.units_b}"
    each = " each" if test.units_a == test.units_b != "no probe" else ""
    return f"{test.images} images{groups}, {units}{each}"


def _line(test: PairedTest) -> Text:
    decimals = decimals_for(test.unit, [test.value_a, test.value_b])

    def number(value: float, sign: bool = False) -> str:
        text = format_number(value, decimals)
        return f"+{text}" if sign and value > 0 else text.replace("-", "\N{MINUS SIGN}")

    name = f"  {one_line(test.metric)} {test.unit}".rstrip()
    arrow = "↑" if test.higher_is_better else "↓"
    name = f"{name if len(name) <= METRIC - 2 else name[: METRIC - 3] + '…'} {arrow}"
    texts = (
        number(test.value_a),
        number(test.value_b),
        number(test.difference, sign=True),
        f"{number(test.low)} to {number(test.high)}",
        _p(test.corrected),
        DASH if test.mcnemar is None else _p(test.mcnemar),
        DASH if test.identical else number(test.smallest),
    )
    line = Text(name.ljust(METRIC) + _cells(texts))
    if test.significant:
        line.stylize("bold", METRIC + sum(COLUMNS[:2]))
    return line


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def _notes(found: Comparison) -> Iterator[str]:
    count = len(found.tests)
    yield (
        f"Paired t test of the differences image by image, units drawn as well; p corrected after Holm for "
        f"{count} comparison{'s' * (count != 1)}, bold at .05. Intervals, McNemar's exact p and what a test "
        "finds (that true difference in 80 of 100 cases) are those of one comparison alone."
    )
    if any("training" in units for test in found.tests for units in (test.units_a, test.units_b)):
        yield "Trainings are the outer level: each counts once, as the mean over its probe seeds."
    alone = {t.a for t in found.tests if t.units_a == "1 probe seed"}
    alone |= {t.b for t in found.tests if t.units_b == "1 probe seed"}
    for row in sorted(alone):
        yield f"{row} was probed with a single seed where it says so: nothing is known of others."
    for test in found.tests:
        if test.left_out:
            yield f"{test.task} {test.metric}: without {test.left_out} images of which one row has no value."
    whole: dict[str, list[str]] = {}
    for one in found.untested:
        whole.setdefault(one.why, []).append(_named(one))
    for why, names in whole.items():
        yield f"Not tested: {', '.join(dict.fromkeys(names))}: {why}."


def _named(one: Untested) -> str:
    return f"{one.task} {one.metric}".strip()
