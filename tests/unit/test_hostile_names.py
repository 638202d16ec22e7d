"""Names from records are text in every format: no markup, no formula, no line break, no terminal command."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from comit_bench.results.notation import one_line
from comit_bench.results.records import Metric, Record, load_record, protocol_digest
from comit_bench.results.render.layout import heading
from comit_bench.results.render.terminal import print_terminal
from comit_bench.results.render.text import tex_escape, to_csv, to_latex, to_markdown
from comit_bench.results.table import Table, build_table

BASE = load_record(Path(__file__).parents[1] / "fixtures" / "records" / "measured-v1.json")
NAMES = (
    "a_b", "R&D 100%", "x|y", "<script>alert(1)</script>", "=HYPERLINK(1)", "+1", "-2+3", "@SUM(A1)",
    "$x$ #1 ~ ^ {z} \\cmd", "`code` *bold* [link](u) ![i](u)", "- item", "1. item", "caf\u00e9 \u6f22\u5b57",
    "---", "a\u202eb\u200b", '"quoted"', "[first", "*star", "a,b;c", "'apostrophe", "[bold]x[/bold]",
)  # fmt: skip
HOSTILE = st.text(alphabet="ab1 =+-@_&%|<>#$~^{}\\`*[]()!\"',;:\u00e9\u6f22\u202e", min_size=1, max_size=12)


def make(
    name: str,
    scores: dict[str, float],
    *,
    task: str = "recognition",
    tokenizer_side: dict[str, Any] | None = None,
    **protocol: Any,
) -> Record:
    data = BASE.model_dump(by_alias=True)
    data["tokenizer"] |= {"name": name, "family": name}
    data["task"] |= {"name": task}
    data["metrics"] = {key: Metric.from_seeds([value] * 3, n=9, chance=1.0) for key, value in scores.items()}
    limit = protocol.get("limit")
    data["protocol"] = {"limit": limit, "control": None, **protocol, "tokenizer": tokenizer_side or {}}
    data |= {"protocol_digest": protocol_digest(data["protocol"]), "seeds": (0, 1, 2)}
    return Record.model_validate(data | {"limit": limit, "complete": limit is None, "control": None})


def table_of(name: str, setting: str = "x") -> Table:
    """A table in which the name stands at every place that a record can fill."""
    mine = {"policy": setting, "note": name}
    records = [
        make(name, {name: 50.0, "other": 1.0}, task=name, tokenizer_side=mine),
        make(name, {name: 51.0}, task=name, tokenizer_side={"policy": f"{setting} 2", "note": name}),
        make("plain", {name: 40.0}, task=name, column=setting),
        make("plain", {name: 40.0}, task=name, column=f"{setting} 3", limit=3),
    ]
    return build_table(records)


def unescaped(text: str, sign: str) -> int:
    return len(re.findall(rf"(?<!\\)(?:\\\\)*{re.escape(sign)}", text))


def check_csv(table: Table, name: str) -> None:
    header, *rows = csv.reader(io.StringIO(to_csv(table)))
    assert len(rows) == len(table.rows) and all(len(row) == len(header) for row in rows)
    for cell in (*header, *(cell for row in rows for cell in row)):
        assert "\n" not in cell and "\r" not in cell
        if cell.startswith(("=", "+", "-", "@")):
            float(cell)  # a number is the only thing that may begin so
    position = header.index("name")
    shown = {row[position].removeprefix("'") for row in rows}
    assert {one_line(name).removeprefix("'"), "plain"} >= shown


def check_markdown(table: Table) -> None:
    text = to_markdown(table)
    lines = [line for line in text.split("\n") if line.startswith("| ")]
    assert len(lines) == 2 + len(table.rows) + 1  # head, rule, chance
    assert len({unescaped(line, "|") for line in lines}) == 1
    markup = text.replace("<br>", "").replace("<u>", "").replace("</u>", "")
    for sign in "<>[]`$#~":
        assert unescaped(markup, sign) == 0, (sign, text)
    assert not re.search(r"^\s*(?:[-+]|\d+[.)])\s", text, flags=re.MULTILINE)


def check_latex(table: Table) -> None:
    text = to_latex(table)
    inside = "\n".join(re.findall(r"\\toprule(.*?)\\bottomrule", text, flags=re.DOTALL))
    assert inside.isascii()
    for sign in "#%_":
        assert unescaped(inside, sign) == 0, sign
    assert unescaped(inside, "^") == len(re.findall(r"\$\^\{\\", inside))  # only our own marks
    plain = re.sub(r"\\[{}\\]", "", inside)
    assert plain.count("{") == plain.count("}")
    assert unescaped(inside, "$") % 2 == 0 and "---" not in inside


def check_terminal(table: Table) -> None:
    for encoding in ("utf-8", "ascii"):
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True, newline="\n")
        print_terminal(table, Console(file=stream, width=200))
        text = raw.getvalue().decode(encoding)
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u200b]", text)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text_everywhere(name: str) -> None:
    table = table_of(name, setting=name)
    check_csv(table, name)
    check_markdown(table)
    check_latex(table)
    check_terminal(table)


@pytest.mark.parametrize("setting", ["a\nb", "a\r\n| x |", "\x1b[31mred\x1b[0m", "a\x00b", "\u2028x\ty"])
def test_settings_stay_on_one_line(setting: str) -> None:
    """Protocols hold any JSON; line breaks and terminal commands do not get through."""
    table = table_of("name", setting=setting)
    assert all("\n" not in row.label and "\x1b" not in row.label for row in table.rows)
    check_csv(table, "name")
    check_markdown(table)
    check_latex(table)
    check_terminal(table)


@settings(max_examples=60, deadline=None)
@given(name=HOSTILE.filter(lambda text: one_line(text) != ""), setting=HOSTILE)
def test_any_name_is_text_everywhere(name: str, setting: str) -> None:
    table = table_of(name, setting)
    check_csv(table, name)
    check_markdown(table)
    check_latex(table)
    check_terminal(table)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_escaped_text_has_no_commands_of_its_own(text: str) -> None:
    escaped = tex_escape(text)
    assert escaped.isascii() and escaped.isprintable()
    known = r"\\(?:textbackslash|textasciicircum|textasciitilde|textless|textgreater|textbar)\{\}"
    known += r"|\\(?:textendash|textemdash)\{\}|\$\\(?:pm|times|uparrow|downarrow|mu)\$"
    known += r"|\$\^\{\\(?:dagger|ddagger|S|P)\}\$"
    rest = re.sub(known + r"|\\[{}$&%#_]|\{\[\}|\{\*\}|\{\}", "", escaped)
    assert not set(rest) & set("\\{}$&%#_^~"), (text, escaped)


def test_words_are_not_changed_without_need() -> None:
    table = build_table([make("comit-nano", {"top1": 50.0})])
    assert "comit-nano" in to_csv(table) and heading(table.columns[0]) == "top1 % ↑"
    assert tex_escape("--- -- -") == "-{}-{}- -{}- -" and one_line(" a  b ") == "a b"
