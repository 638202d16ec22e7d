"""Kinds of tasks, metrics and readers of others: the examples run as they are; mistakes are named."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plugins import install
from tiny import write_images, write_recipes

import comit_bench
from comit_bench.data.datasets import open_dataset
from comit_bench.data.pieces import missing_pieces
from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError
from comit_bench.pipeline.jobs import Settings
from comit_bench.pipeline.suite import suite_tasks
from comit_bench.recipes import specs
from comit_bench.recipes.specs import find_datasets, find_tasks
from comit_bench.results.schema import Record

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "own_parts"
PAGE = (ROOT / "docs" / "your-own-parts.md").read_text(encoding="utf-8")
MODULES = {path.name: path.read_text(encoding="utf-8") for path in sorted(EXAMPLE.glob("*.py"))}
POINTS = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["entry-points"]


def forget() -> None:
    """What is installed is looked up once per process."""
    for found in (specs.kinds, specs.readers, specs.reader_of_others):
        found.cache_clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr("comit_bench.probing.pool.usable_cores", lambda: 1)
    forget()
    yield tmp_path / "site"
    forget()


@pytest.fixture
def installed(site: Path) -> Path:
    install(site, MODULES, {}, group="comit_bench.tokenizers", groups=POINTS)
    return site


def write_listed(root: Path, **lines: str) -> Path:
    """``root/listed/{train,val}.csv`` over the coloured images of ``tiny``; returns ``root``."""
    write_images(root)
    (root / "tiny").rename(root / "listed")
    for split in ("train", "val"):
        files = sorted((root / "listed" / split).rglob("*.png"))
        text = "".join(f"{f.relative_to(root / 'listed').as_posix()},{f.parent.name}\n" for f in files)
        (root / "listed" / f"{split}.csv").write_text(lines.get(split, text))
    return root


def measure(root: Path, *tasks: str) -> dict[tuple[str, str], Record]:
    records = comit_bench.evaluate(
        "pixel-oracle", tasks, suite="scenes", data_root=root, include=(EXAMPLE / "recipes",),
        cache=root / "cache", output=root / "out", progress=False,
    )  # fmt: skip
    return {(record.tokenizer.name, record.task.name): record for record in records}


def test_the_page_shows_the_examples_word_for_word() -> None:
    shown = re.findall(r"```(python|toml|yaml)\n# (\S+)\n(.*?)```", PAGE, flags=re.DOTALL)
    assert {name for _, name, _ in shown} == {
        *MODULES, "pyproject.toml", "recipes/probes/colours-top3/task.yaml",
        "recipes/probes/colours-nearest/task.yaml", "recipes/datasets/listed/dataset.yaml",
    }  # fmt: skip
    for _, name, text in shown:
        whole = (EXAMPLE / name).read_text(encoding="utf-8")
        assert text.strip() in whole, name


@pytest.mark.parametrize(("name", "lines"), [("top3.py", 15), ("nearest_mean.py", 30), ("listed.py", 30)])
def test_a_part_of_your_own_is_one_short_module(name: str, lines: int) -> None:
    assert len(MODULES[name].splitlines()) <= lines


@pytest.mark.usefixtures("installed")
def test_a_metric_a_kind_and_a_reader_of_others_go_all_the_way(tmp_path: Path) -> None:
    root = write_listed(tmp_path / "data")
    found = measure(root, "colours-top3", "colours-nearest")
    top3, nearest = found["pixel-oracle", "colours-top3"], found["pixel-oracle", "colours-nearest"]
    assert ("majority", "colours-top3") in found and ("majority", "colours-nearest") not in found
    assert set(top3.metrics) == {"top1", "top3"}
    assert top3.metrics["top3"].value >= top3.metrics["top1"].value > 40
    assert nearest.metrics["top1"].value > 90 and nearest.metrics["top1"].chance == 25
    assert nearest.task.kind == "nearest-mean" and len(nearest.seeds) == 1
    assert nearest.counts is not None and nearest.counts.report == 40 and nearest.counts.train == 0
    assert list((root / "out").rglob("*.parquet"))
    assert measure(root, "colours-nearest")["pixel-oracle", "colours-nearest"] == nearest  # kept


@pytest.mark.usefixtures("installed")
def test_the_data_are_those_of_the_lists(tmp_path: Path) -> None:
    root = write_listed(tmp_path)
    recipe = find_datasets((EXAMPLE / "recipes",))["listed"]
    data = open_dataset(recipe, data_root=root, cache=tmp_path / "cache", progress=False)
    assert data.kind == "classes" and data.classes == ("blue_a", "blue_b", "red_a", "red_b")
    val = data.splits["val"]
    assert len(val) == 40 and all(
        data.classes[k] in str(p) for k, p in zip(val.labels, val.paths, strict=True)
    )
    assert not missing_pieces(recipe.spec, root)
    assert suite_tasks("extra", Settings(include=(EXAMPLE / "recipes",))) == [
        "colours-top3",
        "colours-nearest",
    ]
    (root / "listed" / "val.csv").unlink()
    with pytest.raises(MissingError, match=r"list of 'val'"):
        open_dataset(recipe, data_root=root, cache=tmp_path / "cache", progress=False)


WRONG: dict[str, tuple[str, str]] = {
    "two classes": ("np.array([classes.index(c)]", "np.array([0, 1]"),
    "no such class": ("classes.index(c)]", "9]"),
    "another kind": ('Manifest("classes"', 'Manifest("multilabel"'),
    "no split": ("(), splits)", "(), {})"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_a_reader_makes_is_checked(what: str, site: Path, tmp_path: Path) -> None:
    source = MODULES["listed.py"].replace(*WRONG[what])
    assert source != MODULES["listed.py"]
    install(site, {**MODULES, "listed.py": source}, {}, groups=POINTS)
    recipe = find_datasets((EXAMPLE / "recipes",))["listed"]
    with pytest.raises(CorruptFileError, match="reader 'listed' on "):
        open_dataset(recipe, data_root=write_listed(tmp_path), cache=tmp_path / "cache", progress=False)


@pytest.mark.usefixtures("site")
def test_without_the_package_the_names_are_unknown() -> None:
    with pytest.raises(UsageError, match=r"no such kind of task; known are classification.*multilabel"):
        find_tasks((EXAMPLE / "recipes",))
    with pytest.raises(UsageError, match=r"no such reader; known are class-folders"):
        find_datasets((EXAMPLE / "recipes",))


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ({"comit_bench.tasks": {"codebook": "top3:KIND"}}, "takes the name 'codebook', which exists"),
        ({"comit_bench.tasks": {"mine": "top3:Top3"}}, "'mine' names a type, expected a"),
        ({"comit_bench.tasks": {"mine": "top3:KINDD"}}, "'mine' cannot be loaded from 'top3:KINDD'"),
        ({"comit_bench.tasks": {"mine": "nowhere:KIND"}}, "(ModuleNotFoundError: No module named 'nowhere')"),
        ({"comit_bench.readers": {"coco": "listed:READER"}}, "takes the name 'coco', which exists"),
        ({"comit_bench.readers": {"mine": "broken:READER"}}, "(ZeroDivisionError: division by zero)"),
    ],
)
def test_packages_that_do_not_fit(points: dict[str, Any], words: str, site: Path) -> None:
    install(site, {**MODULES, "broken.py": "1 / 0\n"}, {}, groups=points)
    with pytest.raises(BenchError) as caught:
        find_tasks()
        find_datasets()
    assert words in str(caught.value)
    sys.modules.pop("broken", None)


@pytest.mark.usefixtures("installed")
def test_options_belong_to_kinds_of_others(tmp_path: Path) -> None:
    write_recipes(tmp_path / "a", kind="nearest-mean", probe=None, attributes=None, options={"distance": 2})
    write_recipes(tmp_path / "b", options={"distance": 2})
    path = tmp_path / "a" / "probes" / "tiny-colours" / "task.yaml"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith(("probe:", "attributes:"))))
    recipe = find_tasks((tmp_path / "a",))["tiny-colours"]
    assert recipe.spec.options == {"distance": 2} and "options" in recipe.spec.model_dump()
    with pytest.raises(UsageError, match="section 'options' means nothing to kind 'classification'"):
        find_tasks((tmp_path / "b",))


def test_a_package_offers_its_recipes(site: Path) -> None:
    source = f"from pathlib import Path\n\nROOT = Path({str(EXAMPLE / 'recipes')!r})\n"
    points = {**POINTS, "comit_bench.recipes": {"theirs": "their_recipes:ROOT"}}
    install(site, {**MODULES, "their_recipes.py": source}, {}, groups=points)
    assert find_tasks()["colours-top3"].origin == find_datasets()["listed"].origin == "plugin:theirs"
