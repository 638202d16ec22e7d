"""The paper's Tables 1 to 4, and objectness, over records: ordinary tables in the paper's layout.

They are made by ``build_table`` and follow its rules: two protocols never share a column, so published
numbers have columns of their own beside the measured ones, and only complete measured rows of one protocol
are marked. What is special:

- which rows and columns there are, their order, and what stands between a label and its scores;
- a published number stands in the row of the measured tokenizer of the same name, policy and message length,
  when there is one such row; details that differ from the printed ones are followed by these;
- two decimals and no spread, as the paper prints.

The same layouts exist for the embedded suite, whose tasks stand for those of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from comit_bench.errors import UsageError, did_you_mean
from comit_bench.results.notation import PUBLISHED
from comit_bench.results.records import Record
from comit_bench.results.render.layout import DASH, is_reference, short_count
from comit_bench.results.render.text import to_latex
from comit_bench.results.rows import row_key
from comit_bench.results.table import Row, Table, build_table

SOURCE = "COMiT paper"  # ``protocol.source`` of its records; other publications are no part of its tables
RECOGNITION, PAIRS, RELATIONS, RECONSTRUCTION, OBJECTNESS = (
    *("recognition", "pairs", "relations"),
    *("reconstruction", "objectness"),
)
# What each suite has for a column: the task, and its metrics in the paper's order. Published relations are a
# ``top1`` of an unknown number of candidates; its weakest rows suggest 4, so ``top1@4`` stands beside it.
TASKS: Mapping[str, Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "paper": {
        RECONSTRUCTION: ("reconstruction-imagenet1k", ("rfid", "psnr")),
        RECOGNITION: ("imagenet100", ("top1",)),
        PAIRS: ("mscoco-pairs", ("top5",)),
        RELATIONS: ("visual-genome", ("top1@4", "top1")),
        OBJECTNESS: ("objectness-cssd", ("miou", "miou_top10", "miou_top20", "miou_top30", "miou_top40")),
    },
    "scenes": {
        RECONSTRUCTION: ("reconstruction-scenes", ("fd_scenes_teacher", "psnr")),
        RECOGNITION: ("recognition-scenes", ("top1",)),
        PAIRS: ("pairs-scenes", ("mAP",)),
        RELATIONS: ("relations-scenes", ("top1@16",)),
        OBJECTNESS: ("objectness-scenes", ("miou_top10", "miou_top20", "miou_top30", "miou_top40")),
    },
    "drawings": {
        RECONSTRUCTION: ("reconstruction-drawings", ("psnr",)),
        RECOGNITION: ("recognition-drawings", ("top1",)),
        PAIRS: ("pairs-drawings", ("mAP",)),
        RELATIONS: ("relations-drawings", ("top1@16",)),
        OBJECTNESS: ("objectness-drawings", ("miou_top10", "miou_top20", "miou_top30", "miou_top40")),
    },
}
PROBES = (RECOGNITION, PAIRS, RELATIONS)
NO_SREPA, NO_LOCAL_CROPS = "-no-srepa", "-no-local-crops"
ABLATIONS = (NO_SREPA, NO_LOCAL_CROPS)
POLICIES = (  # Table 3, in its order; the number counts the global crop
    *("global", "global+random:10", "random:9", "global+raster:10"),
    *("raster:9", "global+adaptive:3", "adaptive:3"),
)
COMPARED = (  # Table 4, in its order
    *("titok-l-32", "titok-b-64", "titok-s-128", "alit-base"),
    *("flextok-d12-d12", "flextok-d18-d18", "flextok-d18-d28"),
    *("selftok-512", "selftok-1024", "comit-b", "comit-l", "comit-xl"),
)
ORDERS = {"raster": "raster-scan"}  # what the paper calls an order, where our name is another
PAPER_FILE = "table-paper.tex"
TEX_WIDTH = 118  # characters; a page over two columns


@dataclass(frozen=True, slots=True)
class Detail:
    """A column between labels and scores: its head, and its text for a record."""

    head: str
    text: Callable[[Record], str]


@dataclass(frozen=True, slots=True)
class PaperLayout:
    """One table of the paper: its columns, and the records that have a place in it.

    Attributes:
        name: What the command line calls it.
        title: Above it.
        columns: Details, then keys of ``TASKS``, in order.
        choose: Picks records, of those with a value for a column.
        by_policy: Whether rows are named by their policy too.
    """

    name: str
    title: str
    columns: tuple[Detail | str, ...]
    choose: Callable[[Sequence[Record]], list[Record]]
    by_policy: bool = False

    @property
    def details(self) -> tuple[Detail, ...]:
        return tuple(column for column in self.columns if isinstance(column, Detail))


def policy_of(record: Record) -> str:
    """The cropping policy; a tokenizer without one sees the whole image, which is ``global``."""
    return str(record.tokenizer_protocol.get("policy") or POLICIES[0])


def policy_words(policy: str) -> tuple[str, str, str]:
    """Whether there is a global crop, how many crops, in which order: ``global+raster:10`` -> yes, 10, ..."""
    if policy == POLICIES[0]:
        return ("yes", "1", DASH)
    name, _, count = policy.removeprefix("global+").partition(":")
    crops = str(len(count.split(","))) if name == "order" else count
    return ("yes" if policy.startswith("global+") else "no", crops, ORDERS.get(name, name))


def _with_ablation(suffix: str) -> Callable[[Sequence[Record]], list[Record]]:
    """Ablated tokenizers and those that they are ablations of, at the paper's policy."""

    def choose(records: Sequence[Record]) -> list[Record]:
        names = {r.tokenizer.name for r in records if r.tokenizer.name.endswith(suffix)}
        names |= {name.removesuffix(suffix) for name in names}
        return [r for r in records if r.tokenizer.name in names and policy_of(r) == POLICIES[0]]

    return choose


def _with_policies(records: Sequence[Record]) -> list[Record]:
    """Every tokenizer that was run under another policy than the paper's default."""
    varied = {r.tokenizer.name for r in records if policy_of(r) != POLICIES[0]}
    return [r for r in records if r.tokenizer.name in varied]


def _whole(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if policy_of(r) == POLICIES[0] and not r.tokenizer.name.endswith(ABLATIONS)]


def _without(suffix: str, head: str) -> Detail:
    return Detail(head, lambda record: "no" if record.tokenizer.name.endswith(suffix) else "yes")


SIZE = (
    Detail("params", lambda record: short_count(record.tokenizer.parameters)),
    Detail("length", lambda record: str(record.tokenizer.message_length or DASH)),
    Detail("vocab", lambda record: str(record.tokenizer.vocab_size or DASH)),
)
CROPS = (
    Detail("global", lambda record: policy_words(policy_of(record))[0]),
    Detail("crops", lambda record: policy_words(policy_of(record))[1]),
    Detail("order", lambda record: policy_words(policy_of(record))[2]),
)
LAYOUTS: Mapping[str, PaperLayout] = {
    layout.name: layout
    for layout in (
        PaperLayout(
            "table-1",
            "Table 1: alignment of the message with a teacher (SREPA).",
            (_without(NO_SREPA, "SREPA"), RECOGNITION),
            _with_ablation(NO_SREPA),
        ),
        PaperLayout(
            "table-2",
            "Table 2: local crops in training; at test time the global crop alone.",
            (_without(NO_LOCAL_CROPS, "local crops"), RECOGNITION),
            _with_ablation(NO_LOCAL_CROPS),
        ),
        PaperLayout(
            "table-3",
            "Table 3: cropping policies at test time; crops count the global one.",
            (*CROPS, *PROBES),
            _with_policies,
            by_policy=True,
        ),
        PaperLayout(
            "table-4",
            "Table 4: reconstruction and semantic probes.",
            (*SIZE, RECONSTRUCTION, *PROBES),
            _whole,
        ),
        PaperLayout(
            "objectness",
            "Objectness of token attention (text, Figures 2 and 8).",
            (*SIZE, OBJECTNESS),
            list,
        ),
    )
}


def find_layouts(names: Sequence[str] | None) -> list[PaperLayout]:
    """Layouts by name; None is all.

    Raises:
        UsageError: Unknown name; suggests the nearest.
    """
    for name in names or ():
        if name not in LAYOUTS:
            raise UsageError(f"the paper has no {name!r} here.{did_you_mean(name, LAYOUTS)}")
    return [layout for name, layout in LAYOUTS.items() if names is None or name in names]


def paper_tables(
    records: Iterable[Record], *, suite: str = "paper", names: Sequence[str] | None = None, **marks: Any
) -> list[Table]:
    """The paper's tables as far as there are records for them.

    Args:
        records: Measured and published ones; controls and published numbers of other sources are left out.
        suite: Whose tasks are shown.
        names: Layouts by name; None is all.
        **marks: ``outcomes`` and ``marks`` of :func:`~comit_bench.results.table.build_table`.

    Raises:
        UsageError: Unknown name, or records that disagree on the direction of a metric.
    """
    chosen = [r for r in records if r.control is None]
    chosen = [r for r in chosen if r.origin != "paper" or r.protocol.get("source") == SOURCE]
    tables = [_table(layout, chosen, TASKS[suite], marks) for layout in find_layouts(names)]
    return [table for table in tables if table is not None]


def _table(
    layout: PaperLayout,
    records: Sequence[Record],
    tasks: Mapping[str, tuple[str, tuple[str, ...]]],
    marks: Mapping[str, Any],
) -> Table | None:
    metrics = dict(tasks[column] for column in layout.columns if isinstance(column, str))
    useful = [r for r in records if any(name in r.metrics for name in metrics.get(r.task.name, ()))]
    chosen = layout.choose(useful)
    if not chosen:
        return None
    present = [name for name in metrics if any(r.task.name == name for r in chosen)]
    home = _homes(chosen)
    table = build_table(
        chosen, metrics=metrics, tasks=present, row_of=lambda r: home[row_key(r)], decimals=2, **marks
    )
    rows = _in_order([_detailed(layout, row) for row in table.rows])
    notes = tuple(note for note in table.notes if not note.startswith("\N{PLUS-MINUS SIGN}"))
    heads = tuple(detail.head for detail in layout.details)
    return replace(table, rows=tuple(rows), notes=notes, details=heads, title=layout.title)


def _homes(records: Sequence[Record]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Key of a record -> key of its row: a published one joins the measured row that it is about."""
    measured = [r for r in records if r.origin != "paper" and r.tokenizer.trained]
    homes = {row_key(r): row_key(r) for r in records}
    for record in records:
        if record.origin != "paper":
            continue
        own = record.tokenizer
        about = {
            row_key(other)
            for other in measured
            if other.tokenizer.name == own.name
            and policy_of(other) == policy_of(record)
            and own.message_length in (None, other.tokenizer.message_length)
        }
        if len(about) == 1:
            homes[row_key(record)] = about.pop()
    return homes


def _detailed(layout: PaperLayout, row: Row) -> Row:
    """Details of a row: measured ones, and where the paper prints others these too; no spread."""
    cells = [cell for cell in row.cells if cell is not None]
    details = []
    for detail in layout.details:
        texts = {
            c.record.origin == "paper": text
            for c in reversed(cells)
            if (text := detail.text(c.record)) != DASH
        }
        own, printed = texts.get(False, ""), texts.get(True, "")
        both = own and printed and own != printed
        details.append(f"{own} ({printed}{PUBLISHED})" if both else own or printed or DASH)
    plain = tuple(c and replace(c, metric=c.metric.model_copy(update={"std": None})) for c in row.cells)
    label = row.label
    if layout.by_policy and label == row.tokenizer.name:  # has no namesake of its kind
        label = f"{label} ({policy_of(cells[0].record)})"
    return replace(row, label=label, details=tuple(details), cells=plain)


def _base(row: Row) -> str:
    """The tokenizer's name without that of an ablation."""
    return next((row.tokenizer.name.removesuffix(s) for s in ABLATIONS if row.tokenizer.name.endswith(s)),
                row.tokenizer.name)  # fmt: skip


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """References, the paper's tokenizers in its order, others; ablations and policies below their own."""
    bases = [_base(row) for row in rows]

    def place(row: Row) -> tuple[int, ...]:
        base = _base(row)
        policy = next(policy_of(cell.record) for cell in row.cells if cell is not None)
        return (
            not is_reference(row),
            COMPARED.index(base) if base in COMPARED else len(COMPARED),
            bases.index(base),
            base != row.tokenizer.name,
            POLICIES.index(policy) if policy in POLICIES else len(POLICIES),
        )

    return sorted(rows, key=place)


def to_paper_latex(
    records: Iterable[Record],
    *,
    label: str = "tab:comit-bench-paper",
    suite: str = "paper",
    names: Sequence[str] | None = None,
    **marks: Any,
) -> str | None:
    r"""The tables as LaTeX, one after the other; None when no record has a place in any.

    Args:
        records: Measured and published ones.
        label: For ``\ref``; the layout's name follows, e.g. ``-table-4``.
        suite: Whose tasks are shown.
        names: Layouts by name; None is all.
        **marks: As in :func:`paper_tables`.
    """
    texts = []
    for layout in find_layouts(names):
        for table in paper_tables(records := list(records), suite=suite, names=[layout.name], **marks):
            texts.append(to_latex(table, label=f"{label}-{layout.name}", width=TEX_WIDTH))
    return "\n".join(texts) or None
