"""The demo notebook: valid JSON of the notebook format, committed without outputs, and it runs."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "look_inside.ipynb"
PNG = b"\x89PNG\r\n\x1a\n"


def read() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return content


def sources(kind: str) -> dict[str, str]:
    return {cell["id"]: "".join(cell["source"]) for cell in read()["cells"] if cell["cell_type"] == kind}


def test_it_follows_the_notebook_format() -> None:
    """The rules of nbformat 4.5 for the cells that are used."""
    notebook = read()
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    kernel = notebook["metadata"]["kernelspec"]
    assert {key: type(value) for key, value in kernel.items()} == dict.fromkeys(kernel, str)
    assert {"name", "display_name"} <= set(kernel)
    assert isinstance(notebook["metadata"]["language_info"]["name"], str)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        common = {"cell_type", "id", "metadata", "source"}
        wanted = common | ({"outputs", "execution_count"} if cell["cell_type"] == "code" else set())
        assert cell["cell_type"] in ("markdown", "code")
        assert set(cell) == wanted
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert isinstance(cell["metadata"], dict)
        assert cell["source"] and all(isinstance(line, str) for line in cell["source"])
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        assert not cell["source"][-1].endswith("\n")


def test_it_is_committed_without_outputs() -> None:
    for cell in read()["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_it_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a notebook does: one namespace, and the value of a cell's last expression is shown."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    shown: dict[str, Any] = {}
    for name, source in sources("code").items():
        body = ast.parse(source, filename=f"{NOTEBOOK.name}#{name}")
        last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
        exec(compile(body, f"{NOTEBOOK.name}#{name}", "exec"), space)
        if isinstance(last, ast.Expr):
            shown[name] = eval(compile(ast.Expression(last.value), f"{NOTEBOOK.name}#{name}", "eval"), space)
    pictures = {name for name, value in shown.items() if hasattr(value, "_repr_png_")}
    assert pictures == {"reconstruction", "evolution", "policies", "edit", "neighbours", "counterfactual"}
    assert all(shown[name]._repr_png_().startswith(PNG) for name in pictures)
    assert [path.name for path in shown["save"]] == ["evolution-comit-nano.pdf", "evolution-comit-nano.png"]
    assert all((tmp_path / path).is_file() for path in shown["save"])
    assert space["scenes"].names[0] in capsys.readouterr().out
