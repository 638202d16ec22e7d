"""The report: what stands in the page, that names stay text, and that its size is bounded."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rows import put
from typer.testing import CliRunner

from comit_bench.errors import MissingError, UsageError
from comit_bench.recipes.specs import recipe_root
from comit_bench.results.outcomes import OutcomeFiles
from comit_bench.results.records import load_records
from comit_bench.results.render.report.charts import breakdowns, charts
from comit_bench.results.render.report.page import build_report, content_policy, write_report
from comit_bench.results.render.report.pictures import NoPictures, Pictures, Source
from comit_bench.results.render.report.samples import TEXTS
from comit_bench.results.render.report.views import interval_of

HOSTILE = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Elements of a page: (tag, attributes), and the text of scripts by id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self._open = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = (dict(attrs).get("id") or "program") if tag == "script" else ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self.scripts[self._open] = self.scripts.get(self._open, "") + data
            self._open = ""

    def json(self, name: str) -> Any:
        return json.loads(self.scripts[f"data-{name}"])


def right(*shares: float, seeds: int = 3, n: int = 80) -> np.ndarray:
    """Outcomes 0 or 1 [seeds, n] with a share of right images."""
    return np.stack([(np.arange(n) < n * shares[0]).astype(np.float64)] * seeds)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ids = [f"{number:03d}-{'x' * 200}" for number in range(80)]
    put(tmp_path, "good", {"top1": right(0.9)}, ids=ids)
    put(tmp_path, "bad", {"top1": right(0.2)}, ids=ids)
    put(
        tmp_path,
        HOSTILE,
        {"top1": right(0.9)},
        ids=ids,
        tokenizer={"family": "<b>family</b>", "training_data": "a & b"},
    )
    return tmp_path


def page_of(folder: Path, **settings: Any) -> tuple[Page, str]:
    found = write_report([folder], folder / "report.html", pictures=NoPictures(), **settings)
    assert (folder / "report.html").read_text("utf-8") == found.html
    return Page(found.html), found.html


def test_names_from_records_are_text(folder: Path) -> None:
    page, html = page_of(folder)
    assert HOSTILE not in html and "<b>family</b>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert HOSTILE in {record["name"] for record in page.json("records")}
    assert all(tag != "b" or not attributes for tag, attributes in page.elements)
    programs = [a for tag, a in page.elements if tag == "script" and a.get("type") != "application/json"]
    assert programs == [{}], "there is one program, and it is inline"


def test_nothing_is_loaded_from_elsewhere(folder: Path) -> None:
    page, html = page_of(folder)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert "style" not in attributes and not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    (policy,) = [a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv")]
    style = re.search(r"<style>(.*?)</style>", html, flags=re.DOTALL)
    assert style and policy == content_policy(style[1], page.scripts["program"])
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy


def test_the_summary_says_who_is_better(folder: Path) -> None:
    page, html = page_of(folder)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", html))
    assert "good and &lt;script&gt;alert(1)&lt;/script&gt; cannot be told from the best" in text or (
        "&lt;script&gt;alert(1)&lt;/script&gt; and good cannot be told from the best" in text
    )
    assert "is significantly better than bad." in text
    tests = page.json("tests")["recognition-scenes"]
    signs = {frozenset((test["a"], test["b"])): test["sign"] for test in tests}
    assert signs[frozenset(("good", HOSTILE))] == 0
    assert abs(signs[frozenset(("good", "bad"))]) == 1


def test_intervals_are_those_of_outcomes(folder: Path) -> None:
    record = next(record for record in load_records(folder) if record.tokenizer.name == "good")
    found = interval_of(record, "top1", record.metrics["top1"], OutcomeFiles(folder))
    assert found is not None and found[0] < 90.0 < found[1]
    reach = (found[1] - found[0]) / 2 / (record.metrics["top1"].stderr or np.nan)
    assert 1.96 < reach < 2.2
    assert interval_of(record, "top1", record.metrics["top1"], lambda _: None) is None


def test_published_numbers_stand_apart(folder: Path) -> None:
    record = load_records(recipe_root("results") / "paper")[0]
    found = build_report(
        [*load_records(folder), record], OutcomeFiles(folder, also=TEXTS), pictures=NoPictures()
    )
    before, _, after = found.html.partition('<div id="published">')
    assert f'data-kind="published"><th scope="row">{record.tokenizer.name}' in after
    assert 'tr data-kind="published"' not in before


def test_size_is_bounded_and_what_is_left_out_is_said(folder: Path) -> None:
    whole = write_report([folder], folder / "whole.html", pictures=NoPictures())
    assert whole.left_out == ()
    limit = len(whole.html.encode()) / 1e6 - 0.008
    small = write_report([folder], folder / "small.html", pictures=NoPictures(), megabytes=limit)
    assert len(small.html.encode()) <= limit * 1e6
    assert len(small.left_out) == 1 and "sample images" in small.left_out[0]
    assert "Left out of this file." in small.html and "Left out of this file." not in whole.html
    kept = Page(small.html).json("samples-0")["samples"]
    assert 0 < len(kept) < len(Page(whole.html).json("samples-0")["samples"]) == 80


def test_samples_hold_what_outcomes_hold(folder: Path) -> None:
    page, _ = page_of(folder, samples=10)
    found = page.json("samples-0")
    view, samples = found["view"], found["samples"]
    assert len(samples) == 10 and view["total"] == 80
    names = [row["label"] for row in view["rows"]]
    metric = view["metrics"][0]
    assert metric["binary"] and dict(zip(names, metric["right"], strict=True))["bad"] == 16
    assert metric["wins"][names.index("good")][names.index("bad")] == 56
    assert metric["wins"][names.index("bad")][names.index("good")] == 0
    differing = [
        s for s in samples if s["values"][0][names.index("good")] > s["values"][0][names.index("bad")]
    ]
    assert len(differing) >= 5, "half of the samples show rows that differ"
    assert view["why"] == "images were left out (--no-images)"
    assert all("answers" not in sample and "image" not in sample for sample in samples)
    assert "data-samples-0" not in page_of(folder, samples=0)[0].scripts


def test_answers_are_shown_with_their_seeds() -> None:
    folder = recipe_root("results") / "reference"
    records = [r for r in load_records(folder) if r.task.name == "recognition-scenes"]
    found = build_report(records, OutcomeFiles(folder, also=TEXTS), pictures=NoPictures(), samples=4)
    sample = Page(found.html).json("samples-0")["samples"][0]
    assert sample["truth"] == sample["id"].partition("/")[0]
    counts = {sum(times for _, times in answers) for answers in sample["answers"]}
    assert counts <= {0, 3} and 3 in counts, "an answer for every probe seed, or none at all"


def test_images_of_other_data_are_not_shown(folder: Path) -> None:
    record = load_records(folder)[0]
    pictures = Pictures()
    pictures._opened[record.task.dataset.name] = type("Data", (), {"fingerprint": "other"})()  # type: ignore[assignment]
    told = pictures.source(record)
    assert isinstance(told, str) and "not those that were measured" in told


def test_several_outcomes_of_one_image_have_its_picture() -> None:
    source = Source(data=None, split=None, places={"a": 0, "original/b": 1})  # type: ignore[arg-type]
    assert [source.find(name) for name in ("a", "a#2", "b", "c")] == [0, 0, 1, None]


def test_bad_input(tmp_path: Path, folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(MissingError, match="no records under"):
        write_report([empty], tmp_path / "r.html")
    with pytest.raises(UsageError, match="--samples -1"):
        write_report([folder], tmp_path / "r.html", samples=-1)
    with pytest.raises(UsageError, match="--max-mb 0"):
        write_report([folder], tmp_path / "r.html", megabytes=0)


def test_command(folder: Path) -> None:
    from comit_bench.commands.app import app

    done = CliRunner().invoke(app, ["report", str(folder), "--no-images", "--output", str(folder / "x.html")])
    assert done.exit_code == 0, done.output
    assert done.output.strip().endswith("x.html")
    assert (folder / "x.html").stat().st_size > 10_000


def test_curves_come_from_details(tmp_path: Path) -> None:
    fits = {"fits": {"score": "top1", "early_stop": [[10.0, 30.0, 20.0], [20.0, 50.0]]}}
    used = {"rank_frequency": {"rank": [1, 2, 3], "count": [9, 3, 0]}, "entropy_by_position": [1.0, 2.0]}
    put(tmp_path, "a", {"top1": right(0.9)}, record={"details": fits | used})
    put(tmp_path, "b", {"top1": right(0.2)}, record={"details": {"fits": "nonsense", "by_predicate": 3}})
    found = charts(load_records(tmp_path))
    assert [one.title.partition(":")[0] for one in found] == [
        "Fits of probes",
        "How often ids are used",
        "Bits at each position of the message",
    ]
    assert found[0].table[1:] == (("1", "15"), ("2", "40"), ("3", "20"))
    assert [row[0] for row in found[1].table[1:]] == ["1", "2"], "a logarithm has no place for 0"
    assert all(one.lines for one in breakdowns(load_records(tmp_path)))


def test_a_reference_far_away_does_not_flatten_the_others(tmp_path: Path) -> None:
    put(tmp_path, "a", {"top1": right(0.10)})
    put(tmp_path, "b", {"top1": right(0.12)})
    put(tmp_path, "oracle", {"top1": right(1.0)}, tokenizer={"kind": "reference"})
    _, html = page_of(tmp_path)
    assert html.count('<span class="fine">outside</span>') == 2
