"""The LaTeX table: whatever the names are, it compiles with nothing but booktabs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from latex import check_latex

from comit_bench.results.records import Metric, Record, load_record
from comit_bench.results.render.layout import DASH
from comit_bench.results.render.text import tex_escape, to_latex
from comit_bench.results.table import build_table

BASE = load_record(Path(__file__).parents[1] / "fixtures" / "records" / "measured-v1.json")
LIMITED = load_record(Path(__file__).parents[1] / "fixtures" / "records" / "limited-untrained-v1.json")
PAPER = load_record(Path(__file__).parents[1] / "fixtures" / "records" / "paper-v1.json")


def make(name: str, scores: dict[str, float], *, task: str = "recognition", **tokenizer: object) -> Record:
    metrics = {key: Metric.from_seeds([value - 1, value, value + 1], n=9) for key, value in scores.items()}
    row = BASE.tokenizer.model_copy(update={"name": name, "family": name, "kind": "learned", **tokenizer})
    task_row = BASE.task.model_copy(update={"name": task})
    return BASE.model_copy(update={"tokenizer": row, "task": task_row, "metrics": metrics})


def crowd() -> list[Record]:
    """References, a baseline, every mark."""
    return [
        make("majority", {"top1": 2.0, "digit": 10.0}, kind="reference", parameters=0),
        make("pixel-oracle", {"top1": 90.0, "digit": 92.0}, kind="reference"),
        make("kmeans-patch", {"top1": 45.0, "digit": 50.0}, kind="baseline"),
        make("comit-nano", {"top1": 55.1, "digit": 60.0}),
        make("comit-nano", {"top1": 4.0, "digit": 12.0}, weights="random:0", trained=False),
        make("comit_l", {"top1": 65.0, "digit": 70.0}, parameters=610_850_000),
        LIMITED,
        PAPER,
    ]


AWKWARD = r'100%_&#$~^{x}\y<z>"é|±--[*†ß漢' + DASH


def awkward() -> list[Record]:
    """Names made of everything LaTeX could trip over, at the start of rows too."""
    names = (AWKWARD, "[3pt] first", "*star", "\\input{x}", "-- dashes", "plain")
    scores = [{f"m_{i}%[": 10.0 + index for i in range(7)} for index in range(len(names))]
    records = [make(name, score, task=AWKWARD) for name, score in zip(names, scores, strict=True)]
    return [*records, make("[oracle]", {"m_1%[": 99.0}, kind="reference", task=AWKWARD)]


@pytest.mark.parametrize("records", [crowd(), awkward(), crowd()[:1]], ids=["crowd", "awkward", "one"])
def test_latex_structure(records: list[Record]) -> None:
    check_latex(to_latex(build_table(records), caption="50 % & more_"))


def test_latex_ranks_marks_and_rules() -> None:
    text = to_latex(build_table(crowd()[:6], marks="rank"))
    assert r"\textbf{65.0 $\pm$ 1.0}" in text
    assert r"\underline{55.1 $\pm$ 1.0}" in text
    assert r"comit-nano$^{\dagger}$ & " in text and r"$^{\dagger}$\,untrained" in text
    assert r"comit\_l & 611M" in text
    assert r"top1 \% $\uparrow$" in text
    assert r"\multicolumn{2}{c}{recognition}" in text and r"\cmidrule(lr){5-6}" in text
    body = text[text.index(r"\toprule") :].splitlines()
    after = body[next(i for i, line in enumerate(body) if line.startswith("pixel-oracle")) + 1]
    assert after == r"\midrule"
    assert body[-1] == r"\end{table}" and r"\bottomrule" in body


def test_latex_shows_a_dash_for_missing_cells() -> None:
    text = to_latex(build_table([make("a", {"x": 10.0}), make("b", {"y": 20.0})]))
    row = next(line for line in text.splitlines() if line.startswith("a &"))
    assert row.endswith(r"10.0 $\pm$ 1.0 & \textendash{} \\")


def test_tex_escape() -> None:
    assert tex_escape("a_b 5% --limit é [") == r"a\_b 5\% -{}-limit e {[}"
    assert tex_escape("\\") == r"\textbackslash{}"
    assert tex_escape("漢") == "?"


def test_latex_label_must_be_plain() -> None:
    assert r"\label{tab:mine}" in to_latex(build_table([make("a", {"m": 1.0})]), label="tab:mine")
    with pytest.raises(ValueError, match="tab_mine"):
        to_latex(build_table([make("a", {"m": 1.0})]), label="tab_mine")


def test_latex_compiles(tmp_path: Path) -> None:
    """Runs a real LaTeX where there is one; the structure is checked everywhere."""
    tables = {"crowd": build_table(crowd()), "awkward": build_table(awkward()), "empty": build_table([])}
    document = [r"\documentclass{article}", r"\usepackage{booktabs}", r"\begin{document}"]
    for name, table in tables.items():
        text = to_latex(table, caption=f"{name} {AWKWARD}", label=f"tab:{name}")
        check_latex(text)
        (tmp_path / f"{name}.tex").write_text(text, encoding="utf-8")
        document.append(rf"\input{{{name}.tex}}")
    program = shutil.which("pdflatex")
    kpsewhich = shutil.which("kpsewhich")
    if program is None or kpsewhich is None:
        return
    if not subprocess.run([kpsewhich, "booktabs.sty"], check=False, capture_output=True).stdout:
        return
    (tmp_path / "document.tex").write_text("\n".join([*document, r"\end{document}"]), encoding="utf-8")
    done = subprocess.run(
        [program, "-interaction=nonstopmode", "-halt-on-error", "document.tex"],
        check=False, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert (tmp_path / "document.pdf").stat().st_size > 1000
