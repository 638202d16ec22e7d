"""The plan of the house: who may import whom, file by file. Imports inside functions and for types count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "comit_bench"
AT_THE_TOP = {"__init__", "run", "errors", "files", "seeding"}

# What each folder may import beside itself; commands may import everything.
GROUND = {"errors", "files", "seeding"}
LOW = GROUND | {"nn", "recipes"}
ARROWS = {
    "errors": set(),
    "seeding": set(),
    "files": {"errors"},
    "nn": {"errors"},
    "recipes": GROUND | {"nn"},
    "data": GROUND | {"recipes"},
    "tokenizers": LOW,
    "metrics": LOW | {"data", "tokenizers"},
    "probing": LOW | {"data", "tokenizers"},
    "results": LOW | {"data", "tokenizers", "metrics"},
    "tasks": LOW | {"data", "tokenizers", "metrics", "probing", "results"},
    "figures": LOW | {"data", "tokenizers", "metrics", "probing", "results", "tasks"},
    "train": LOW | {"data", "tokenizers", "metrics", "results"},
    "pipeline": LOW | {"data", "tokenizers", "metrics", "probing", "results", "tasks", "figures"},
}
SHIMS = {"run", "train.__main__"}  # `python -m` of these runs a command
RESULTS = ("schema", "records", "compare", "table")  # of `results/`, from below; then `render/`
NETWORKS = {"model", "base_model", "blocks", "fast", "codec", "crops"}  # of a family: mathematics only


def name_of(path: Path) -> str:
    """``comit_bench/data/tokens/store.py`` -> ``data.tokens.store``; a package has its folder's name."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str) -> Iterator[str]:
    """Modules of ours that a module imports; ``from folder import module`` is the module."""
    path = MODULES[name]
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *([node.module] if node.module else [])))
            found = [f"{stem}.{alias.name}" for alias in node.names]
            found = [full if full.partition(".")[2] in MODULES else stem for full in found]
        else:
            continue
        yield from (
            other.partition(".")[2] for other in found if other.partition(".")[2] in set(MODULES) - {name}
        )


@cache
def graph() -> dict[str, frozenset[str]]:
    return {name: frozenset(imported(name)) for name in MODULES if name != "__init__"}


def circle(graph: dict[str, frozenset[str]]) -> list[str]:
    """Modules that import each other in a ring, the first one found; empty when there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def folder(name: str) -> str:
    return name.partition(".")[0]


def test_the_graph_is_that_of_the_package() -> None:
    """Every rule below is empty if this fails."""
    assert len(MODULES) > 150 and sum(map(len, graph().values())) > 800
    assert {"pipeline.jobs", "results.schema"} <= graph()["pipeline.evaluate"]
    assert "tokenizers.comit.model" in graph()["tokenizers.comit.adapter"]


def test_nothing_is_loose_at_the_top_and_every_folder_has_a_rule() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == AT_THE_TOP
    folders = {folder(name) for name in MODULES if "." in name}
    assert folders == set(ARROWS) - GROUND | {"commands"}


def test_there_is_no_circle() -> None:
    assert not (found := circle(graph())), f"a circle: {' -> '.join([*found, found[0]])}"


def test_a_circle_would_be_found() -> None:
    ring = {"a": frozenset({"b"}), "b": frozenset({"c", "d"}), "c": frozenset({"a"}), "d": frozenset[str]()}
    assert circle(ring) == ["a", "b", "c"]
    assert not circle({**ring, "c": frozenset({"d"})})


@pytest.mark.parametrize("part", sorted(ARROWS))
def test_imports_run_downwards(part: str) -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in graph().items()
        if folder(name) == part and name not in SHIMS
        for other in others
        if folder(other) not in ARROWS[part] | {part}
    ]
    assert not wrong, f"{part} may import {sorted(ARROWS[part]) or 'nothing of ours'}"


def test_results_are_built_from_records_up() -> None:
    """A comparison knows nothing of tables, and neither knows how it is printed."""
    place = {f"results.{name}": number for number, name in enumerate(RESULTS)}
    place |= {name: len(RESULTS) for name in MODULES if name.startswith("results.render")}
    wrong = [
        f"{name} imports {other}"
        for name in place
        if name in graph()
        for other in graph()[name]
        if place.get(other, 0) > place[name]
    ]
    assert not wrong


def test_networks_of_families_are_mathematics() -> None:
    """They know ``nn`` and the files of their own family that are networks as well."""
    networks = [
        name for name in MODULES if name.startswith("tokenizers.") and name.rpartition(".")[2] in NETWORKS
    ]
    assert len(networks) > 12
    wrong = [
        f"{name} imports {other}"
        for name in networks
        for other in graph()[name]
        if folder(other) != "nn"
        and not (other.rpartition(".")[0] == name.rpartition(".")[0] and other.rpartition(".")[2] in NETWORKS)
    ]
    assert not wrong
