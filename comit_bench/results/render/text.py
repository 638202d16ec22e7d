"""A table as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from typing import TYPE_CHECKING, Any

from comit_bench.results.notation import INCOMPLETE, PUBLISHED, UNCONVERGED, UNTRAINED, one_line
from comit_bench.results.render.layout import (
    CHANCE,
    DASH,
    LABEL,
    Block,
    chance_texts,
    detail_texts,
    heading,
    is_reference,
    measure,
    number_text,
)

if TYPE_CHECKING:
    from comit_bench.results.table import Column, Group, Table


def _csv_names(table: Table) -> dict[Group, str]:
    """``task-v1``, with the control, a foreign recipe and, where two protocols meet, the group's digest."""
    names: dict[Group, str] = {}
    for group in table.groups:
        name = f"{group.task}-v{group.version}"
        if group.control:
            name += f"~{group.control}"
        if group.recipe:
            name += f"~recipe of {group.recipe}"
        names[group] = name + (f"@{group.digest[7:15]}" if group.variant else "")
    return names


def to_csv(table: Table) -> str:
    """One line per row, raw numbers, five columns per metric and the full protocol digest per task.

    Columns of a metric are named ``<task>-v<version>:<metric>_{mean,std,stderr,n,seeds}``, those of
    a task ``<task>-v<version>_{protocol,complete}`` and its chance levels ``..._chance``.
    """
    fields = ["name", "family", "kind", "weights", "revision", "trained", "parameters", "message_length"]
    fields += ["vocab_size", "code_dim", "resolution"]
    names = _csv_names(table)
    lines: list[dict[str, Any]] = []
    header = ["row", "origin", *fields]
    for group in table.groups:
        header += [f"{names[group]}_protocol", f"{names[group]}_complete"]
        for column in (c for c in table.columns if c.group == group):
            stem = f"{names[group]}:{column.metric}"
            header += [f"{stem}_{part}" for part in ("mean", "std", "stderr", "n", "seeds", "chance")]
    for row in table.rows:
        line: dict[str, Any] = {"row": row.label, "origin": row.origin}
        line |= {field: getattr(row.tokenizer, field) for field in fields}
        for column, cell in zip(table.columns, row.cells, strict=True):
            if cell is not None:
                metric, name = cell.metric, names[column.group]
                line[f"{name}_protocol"] = cell.record.protocol_digest
                line[f"{name}_complete"] = cell.record.complete
                values = (metric.value, metric.std, metric.stderr, metric.n, len(metric.per_seed) or None)
                for part, value in zip(("mean", "std", "stderr", "n", "seeds"), values, strict=True):
                    line[f"{name}:{column.metric}_{part}"] = value
                line[f"{name}:{column.metric}_chance"] = metric.chance
        lines.append(line)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_csv_text, header))
    for line in lines:
        cells = [line.get(name) for name in header]
        writer.writerow([_csv_text(cell) if isinstance(cell, str) else cell for cell in cells])
    return out.getvalue()


def _csv_text(text: str) -> str:
    """Text on one line, with an apostrophe before signs that make a spreadsheet take it for a formula."""
    text = one_line(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


# ---------------------------------------------------------------------------------------- Markdown


def _md(text: str) -> str:
    """Text as Markdown in which nothing is markup, HTML, mathematics or the end of a cell."""
    escaped = re.sub(r"([\\`*_\[\]<>|~#$!])", r"\\\1", one_line(text).replace("&", "&amp;"))
    return re.sub(r"^([-+]|\d+[.)])(?=\s|$)", r"\\\1", escaped)  # no list either


def to_markdown(table: Table) -> str:
    """A pipe table, the marks explained below it."""
    heads = [f"{_md(c.group.task)} {_md(c.group.subtitle)}<br>{_md(heading(c))}" for c in table.columns]
    lines = [[LABEL, *map(_md, table.details), *heads]]
    lines.append([":--", *["--:"] * (len(table.details) + len(heads))])
    chances = chance_texts(table)
    if chances is not None:
        lines.append([f"_{CHANCE}_", *[""] * len(table.details), *chances])
    for row in table.rows:
        label = _md(row.label) + row.marks
        cells = [f"_{label}_" if is_reference(row) else label, *map(_md, detail_texts(row))]
        for column, cell in zip(table.columns, row.cells, strict=True):
            if cell is None:
                cells.append(DASH)
                continue
            start, end = {"best": ("**", "**"), "second": ("<u>", "</u>")}.get(cell.rank or "", ("", ""))
            cells.append(f"{start}{number_text(cell, column)}{end}{cell.marks}")
        lines.append(cells)
    text = f"{_md(table.title)}\n\n" if table.title else ""
    text += "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    notes = [_md(note) for note in (*table.legend, *table.notes)]
    notes += [f"{mark} {text}" for mark, text in table.footnotes]
    return text + "\n\n" + "  \n".join(notes) + "\n"


_TEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "[": "{[}",  # as the first character of a row, [ and * would be read as arguments of \\
    "*": "{*}",
    "±": r"$\pm$",
    DASH: r"\textendash{}",
    "—": r"\textemdash{}",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "µ": r"$\mu$",
    UNTRAINED: r"$^{\dagger}$",
    INCOMPLETE: r"$^{\ddagger}$",
    PUBLISHED: r"$^{\S}$",
    UNCONVERGED: r"$^{\P}$",
}
_TEX_WIDTH = 82


def tex_escape(text: str) -> str:
    """Text as LaTeX that compiles with nothing but booktabs; exotic letters lose their accents."""
    out = []
    for character in one_line(text):
        if character in _TEX:
            out.append(_TEX[character])
        elif 32 <= ord(character) < 127:
            out.append(character)
        else:
            plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
            out.append("".join(_TEX.get(c, c) for c in plain) or "?")
    return re.sub("-(?=-)", "-{}", "".join(out))


def to_latex(
    table: Table, *, caption: str | None = None, label: str = "tab:comit-bench", width: int = _TEX_WIDTH
) -> str:
    r"""``table`` environments with booktabs rules: one, or several when the table is too wide.

    Args:
        table: What to write.
        caption: Plain text, escaped here.
        label: For ``\ref``; letters, digits and ``:.-`` only. Further environments add ``-2``, ...
        width: Characters that fit a line; a wider table is continued in a further environment.
    """
    if not re.fullmatch(r"[A-Za-z0-9:.-]+", label):
        raise ValueError(f"label {label!r}: use letters, digits, colon, dot and hyphen only")
    if caption is None:
        caption = table.title or "Probe scores by tokenizer and task."
    notes = [tex_escape(note) for note in (*table.legend, *table.notes)]
    notes += [f"{tex_escape(mark)}\\,{tex_escape(text)}" for mark, text in table.footnotes]
    lines = ["% needs \\usepackage{booktabs}"]
    for number, block in enumerate(measure(table).blocks(width), start=1):
        lines += [
            "\\begin{table}[t]",
            "\\centering",
            "\\setlength{\\belowcaptionskip}{6pt}",
            f"\\caption{{{tex_escape(caption)}{' (Continued.)' if number > 1 else ''}}}",
            f"\\label{{{label}{f'-{number}' if number > 1 else ''}}}",
            "\\small",
            "\\setlength{\\tabcolsep}{2.5pt}",
            _latex_block(table, block),
            "",
            "\\smallskip",
            "{\\footnotesize " + " \\\\\n".join(notes) + "\\par}",
            "\\end{table}",
        ]
    return "\n".join(lines) + "\n"


def _latex_block(table: Table, block: Block) -> str:
    import pandas

    columns = [table.columns[index] for index in block.columns]
    detail_count = len(table.details) if block.details else 0
    heads = [("", "", name) for name in (LABEL, *table.details[:detail_count])]
    heads += [(c.group.task, c.group.subtitle, heading(c)) for c in columns]
    body: list[list[str]] = []
    styles: list[list[str]] = []
    chances = chance_texts(table)
    if chances is not None:
        body.append([CHANCE, *[""] * detail_count, *(chances[index] for index in block.columns)])
        styles.append([""] * len(heads))
    rows = [table.rows[number] for number in block.rows]
    for row in rows:
        cells = [row.cells[index] for index in block.columns]
        texts = [
            DASH if cell is None else number_text(cell, column) + cell.marks
            for cell, column in zip(cells, columns, strict=True)
        ]
        body.append([row.label + row.marks, *detail_texts(row)[:detail_count], *texts])
        commands = {"best": "textbf:--rwrap;", "second": "underline:--rwrap;"}
        ranked = [commands.get((cell.rank if cell else None) or "", "") for cell in cells]
        styles.append([""] * (1 + detail_count) + ranked)
    index = pandas.MultiIndex.from_tuples(heads)
    frame = pandas.DataFrame(
        [[tex_escape(text) for text in line] for line in body], columns=index, dtype=object
    )
    styler = frame.style.hide(axis="index").format_index(lambda text: tex_escape(str(text)), axis="columns")
    styler = styler.apply(lambda _: pandas.DataFrame(styles, columns=index), axis=None)
    column_format = "l" + "r" * (len(heads) - 1)
    text = styler.to_latex(hrules=True, column_format=column_format, multicol_align="c")
    separator = sum(is_reference(row) for row in rows) + (chances is not None)
    return _with_rules(text, detail_count, columns, separator, len(body))


def _with_rules(text: str, details: int, columns: list[Column], separator: int, rows: int) -> str:
    """Add a rule under every group's title, and one between references and the rest."""
    lines = text.rstrip("\n").split("\n")
    first = 2 + details
    spans = []
    for group in dict.fromkeys(column.group for column in columns):
        size = sum(column.group == group for column in columns)
        spans.append(f"\\cmidrule(lr){{{first}-{first + size - 1}}}")
        first += size
    if 0 < separator < rows:
        lines.insert(lines.index("\\midrule") + 1 + separator, "\\midrule")
    if spans:
        lines.insert(lines.index("\\toprule") + 3, " ".join(spans))
    return "\n".join(lines)
