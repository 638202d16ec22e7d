"""From records to one HTML file that needs nothing else: no network, no other file, no framework.

Whatever a record says is text: the template escapes it, data for the program stand in blocks of JSON without
``<``, and the program writes text only. The Content-Security-Policy allows the one style sheet and the one
program, by their digests, and pictures within the file; nothing else can be loaded or run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from comit_bench import __version__
from comit_bench.errors import MissingError, UsageError
from comit_bench.files import write_atomic
from comit_bench.results.compare import PairedTest
from comit_bench.results.notation import one_line
from comit_bench.results.outcomes import OutcomeFiles
from comit_bench.results.records import load_records, published_records
from comit_bench.results.render.report.charts import breakdowns, charts
from comit_bench.results.render.report.citations import citations, cited
from comit_bench.results.render.report.pictures import Pictures
from comit_bench.results.render.report.samples import TEXTS, Shown, viewer
from comit_bench.results.render.report.views import (
    command_of,
    distinct,
    numbers,
    overview,
    record_data,
    sections,
)
from comit_bench.results.render.report.words import facts, pairwise, verdict
from comit_bench.results.rows import flat
from comit_bench.results.schema import Record
from comit_bench.results.table import Table, build_table
from comit_bench.results.trainings import ReadOutcomes

HERE = Path(__file__).parent
SAMPLES = 100  # images per task
MEGABYTES = 15.0
MEGA = 1_000_000
FOR_WORDS = 2_000  # bytes kept free for what is said about things left out


@dataclass(frozen=True, slots=True)
class Report:
    """A page and what was left out of it.

    Attributes:
        html: The whole file.
        left_out: Sentences; empty when everything is there.
    """

    html: str
    left_out: tuple[str, ...]


def write_report(
    folders: Sequence[Path],
    output: Path,
    *,
    published: bool = True,
    samples: int = SAMPLES,
    megabytes: float = MEGABYTES,
    pictures: Pictures | None = None,
    title: str = "",
) -> Report:
    """Write the report of all records below some folders, whole or not at all.

    Args:
        folders: With records, at any depth, and their outcomes beside them.
        output: The file.
        published: Also show published numbers of the same tasks, apart from the measured ones.
        samples: Images per task at most; 0 leaves the viewer out.
        megabytes: Size of the file at most; fewer images are shown where they do not fit.
        pictures: Where images are from; default the data sets on this machine.
        title: Of the page.

    Raises:
        MissingError: There are no records.
        UsageError: A number that means nothing.
        BenchError: Disk full or not writable.
    """
    if samples < 0:
        raise UsageError(f"--samples {samples}: expected 0 or more images per task")
    if not megabytes > 0:
        raise UsageError(f"--max-mb {megabytes:g}: expected more than 0 megabytes")
    records = [record for folder in folders for record in load_records(folder)]
    records = list({(r.to_json()): r for r in records}.values())
    if not records:
        raise MissingError(
            f"no records under {', '.join(str(folder) for folder in folders)}. `comit-bench run` makes them; "
            "name their directory if they lie elsewhere."
        )
    if published:
        records += published_records(records)
    read = OutcomeFiles(*folders, also=TEXTS)
    found = build_report(
        records,
        read,
        pictures=pictures or Pictures(),
        samples=samples,
        megabytes=megabytes,
        title=title or "Benchmark report",
    )
    write_atomic(output, found.html)
    return found


def build_report(
    records: Sequence[Record],
    read: ReadOutcomes,
    *,
    pictures: Pictures,
    samples: int = SAMPLES,
    megabytes: float = MEGABYTES,
    title: str = "Benchmark report",
) -> Report:
    """The page of some records; arguments as for :func:`write_report`, ``read`` gives their outcomes."""
    table = build_table(records, outcomes=read)
    known = numbers(table, read)
    found = sections(table, known)
    tests = pairwise(records, read)
    beside = overview(table, found, known)
    cards = [verdict(s, tests.get(s.task, ())) for s in found if not s.published and not s.control]
    viewers = [
        one
        for section in found
        if not section.published and (one := viewer(section, known, read, pictures, samples))
    ]
    bibtex, strangers = citations(records)
    used = list(known.records)
    values: dict[str, Any] = {
        "title": one_line(title),
        "version": __version__,
        "facts": facts(used, found, beside.lines),
        "cards": cards,
        "overview": beside,
        "sections": [section for section in found if not section.published],
        "published": [section for section in found if section.published],
        "legend": table.legend,
        "notes": table.notes,
        "footnotes": table.footnotes,
        "charts": charts(used),
        "breakdowns": breakdowns(used),
        "tokenizers": _tokenizers(table),
        "environments": _environments(used),
        "commands": _commands(used),
        "bibtex": bibtex,
        "strangers": cited(strangers),
    }
    blocks = {
        "records": _json([record_data(record, i, known) for i, record in enumerate(known.records)]),
        "tests": _json({task: _tests(several) for task, several in tests.items()}),
    }
    viewers = [replace(one, samples=[_safe(text) for text in one.samples]) for one in viewers]
    return _fitted(values, blocks, viewers, int(megabytes * MEGA))


def _fitted(
    values: Mapping[str, Any], blocks: Mapping[str, str], viewers: Sequence[Shown], most: int
) -> Report:
    """Render with as many samples as fit, the same share of the room for every task."""
    bare = len(_render(values, blocks, viewers, [[] for _ in viewers], ()).encode())
    room = max(most - bare - FOR_WORDS, 0)
    kept: list[list[str]] = []
    left = [sum(len(text.encode()) + 1 for text in one.samples) for one in viewers]
    for number, one in enumerate(viewers):
        share = room - sum(left[number + 1 :])  # what the later ones leave, or else an equal part
        share = max(share, room // (len(viewers) - number))
        taken, used = [], 0
        for text in one.samples:
            used += len(text.encode()) + 1
            if used > share:
                break
            taken.append(text)
        room -= sum(len(text.encode()) + 1 for text in taken)
        kept.append(taken)
    told = [
        f"{one.title}: {len(texts)} of {len(one.samples)} sample images, so that the file stays below "
        f"{most / MEGA:g} MB (--max-mb)."
        for one, texts in zip(viewers, kept, strict=True)
        if len(texts) < len(one.samples)
    ]
    if bare > most:
        told.append(f"The tables alone take more than {most / MEGA:g} MB: no sample is shown.")
    return Report(_render(values, blocks, viewers, kept, tuple(told)), tuple(told))


def _render(
    values: Mapping[str, Any],
    blocks: Mapping[str, str],
    viewers: Sequence[Shown],
    samples: Sequence[Sequence[str]],
    left_out: Sequence[str],
) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, program = (HERE / "report.css").read_text("utf-8"), (HERE / "report.js").read_text("utf-8")
    tasks = [
        {
            "anchor": one.anchor,
            "title": one.title,
            "shown": len(texts),
            "total": one.total,
            "json": f'{{"view":{_json(one.data)},"samples":[{",".join(texts)}]}}',
        }
        for one, texts in zip(viewers, samples, strict=True)
    ]
    template = environment.get_template("report.html.jinja")
    return template.render(
        **values,
        left_out=left_out,
        viewers=tasks,
        blocks=blocks,
        style=style,
        program=program,
        policy=content_policy(style, program),
    )


def content_policy(style: str, program: str) -> str:
    """The Content-Security-Policy of a page with this style sheet and this program."""
    return (
        f"default-src 'none'; script-src {_source(program)}; style-src {_source(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    return _safe(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")))


def _safe(text: str) -> str:
    """JSON that can stand in a page: nothing in it ends the block or begins a comment."""
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _tests(tests: Sequence[PairedTest]) -> list[dict[str, Any]]:
    """What the grid of differences shows."""
    return [
        {
            "a": one_line(test.a),
            "b": one_line(test.b),
            "sign": 0
            if not test.significant
            else 1
            if (test.difference > 0) == test.higher_is_better
            else -1,
            "text": one_line(test.sentence),
            "ranked": test.ranked,
        }
        for test in tests
    ]


def _tokenizers(table: Table) -> list[tuple[str, str, list[str]]]:
    """Label, kind and facts of every measured row."""
    found: list[tuple[str, str, list[str]]] = []
    for row in table.rows:
        told = row.tokenizer
        cell = next((cell for cell in row.cells if cell is not None), None)
        if row.origin == "paper" or cell is None:
            continue
        side = flat(cell.record.tokenizer_protocol)
        facts = [
            told.family,
            told.weights.replace("sha256:", "")[:12],
            *(
                "–" if n is None else f"{n:,}"
                for n in (told.parameters, told.message_length, told.vocab_size)
            ),
            f"{told.resolution} px" if told.resolution else "–",
            side.get("policy", "–").replace("null", "–"),
            side.get("preprocessing", "–"),
            told.training_data,
            told.weights_licence,
        ]
        found.append((row.label + row.marks, told.kind, [one_line(text) or "–" for text in facts]))
    return found


def _environments(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Every environment that numbers were computed in, and how many records are from it."""
    counts: dict[tuple[str, ...], int] = {}
    for record in records:
        if (e := record.environment) is not None:
            commit = (e.git_commit or "–")[:12]
            key = (e.comit_bench, commit, e.python, e.torch or "–", e.device, e.dtype, e.platform)
            counts[tuple(map(one_line, key))] = counts.get(tuple(map(one_line, key)), 0) + 1
    return [(*key, str(count)) for key, count in counts.items()]


def _commands(records: Sequence[Record]) -> list[tuple[str, str, str]]:
    """Every command line, the tokenizers and the tasks whose records it made."""
    made: dict[str, list[Record]] = {}
    for record in records:
        if command := command_of(record):
            made.setdefault(command, []).append(record)
    return [
        (
            command,
            ", ".join(distinct(one_line(r.tokenizer.name) for r in several)),
            ", ".join(distinct(one_line(r.task.name) for r in several)),
        )
        for command, several in made.items()
    ]
