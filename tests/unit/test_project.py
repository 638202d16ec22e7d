"""The habits of the project: workflows, forms, links between pages, what a release must pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(
    set((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) - {ROOT / ".github/ISSUE_TEMPLATE/config.yml"}
)
PAGES = [*ROOT.glob(".github/**/*.*"), ROOT / "SECURITY.md", ROOT / "RELEASING.md"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield import_module
    for name in ("check_links", "release_check"):
        sys.modules.pop(name, None)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def git(root: Path, *arguments: str) -> None:
    who = ("-c", "user.name=someone", "-c", "user.email=someone@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(("git", "-C", root, *who, *arguments), capture_output=True, check=True)


def steps(workflow: Any) -> list[Any]:
    return [step for job in workflow["jobs"].values() for step in (job, *job.get("steps", ()))]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_pin_actions_and_may_only_read(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job.get("permissions", {}) == ({"id-token": "write"} if name == "publish" else {})
        assert "uses" in job or job["timeout-minutes"] <= 60
    for step in steps(workflow):
        uses = step.get("uses", "./.github/workflows/ci.yml")
        if uses.startswith("./"):
            assert (ROOT / uses).is_file()
        else:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+(\.\d+)*|[0-9a-f]{40})", uses)
        if uses.startswith("actions/checkout@"):
            assert step["with"] == {"persist-credentials": False}
        # What others write (titles, branch names) reaches a shell through the environment only.
        assert set(re.findall(r"\$\{\{\s*(\w+)", str(step.get("run", "")))) <= {"matrix"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_scripts_that_are_there(path: Path) -> None:
    named = re.findall(r"(?<![\w/])((?:\.ci|scripts)/[\w.]+)", path.read_text(encoding="utf-8"))
    for name in named:
        assert (ROOT / name).is_file(), name
        assert not name.startswith(".ci") or os.access(ROOT / name, os.X_OK)
    assert named


def test_ci_runs_the_oldest_and_the_newest_python_and_the_lowest_dependencies() -> None:
    jobs = read(ROOT / ".github/workflows/ci.yml")["jobs"]["check"]["strategy"]["matrix"]["include"]
    pythons = [text.rpartition(" ")[2] for text in project()["classifiers"] if re.search(r":: 3\.\d+$", text)]
    oldest, newest = pythons[0], pythons[-1]
    assert project()["requires-python"] == f">={oldest}"
    assert [(job["python"], job["command"]) for job in jobs] == [
        (oldest, ".ci/run"),
        (newest, ".ci/run"),
        (oldest, ".ci/run --lowest"),
    ]


def test_every_dependency_has_a_lowest_version_that_ci_can_read() -> None:
    extras = [table for name, table in project()["optional-dependencies"].items() if name != "dev"]
    for entry in sum(extras, project()["dependencies"]):
        assert re.fullmatch(r"[A-Za-z0-9_-]+>=\d+(\.\d+)*(,<[\d.]+)?", entry), entry


def test_ci_refuses_an_unknown_option() -> None:
    done = subprocess.run([ROOT / ".ci/run", "--latest"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--lowest" in done.stderr


def test_nothing_is_published_that_was_not_tested_and_checked() -> None:
    release = read(ROOT / ".github/workflows/release.yml")
    publish = release["jobs"]["publish"]
    assert set(publish["needs"]) == {"test", "build"} and publish["environment"]
    assert release["jobs"]["test"] == {"uses": "./.github/workflows/ci.yml"}
    assert any(
        "scripts/release_check.py --tag" in step.get("run", "") for step in release["jobs"]["build"]["steps"]
    )
    assert release[True] == {"push": {"tags": ["v[0-9]*"]}}  # YAML 1.1 reads the key "on" as true
    assert "secrets." not in str(release)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_are_forms(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= set(form) <= {"name", "description", "labels", "title", "body"}
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in asked}) == len(asked)
    assert any(part.get("validations", {}).get("required") for part in asked)
    for part in form["body"]:
        assert part["type"] in ("markdown", "input", "textarea", "dropdown")
        assert part["attributes"]["value" if part["type"] == "markdown" else "label"]
        assert part["type"] != "dropdown" or all(isinstance(o, str) for o in part["attributes"]["options"])


def test_there_is_a_form_for_each_kind() -> None:
    assert {path.stem for path in FORMS} == {"bug", "new-tokenizer", "new-task", "results"}
    text = (ROOT / ".github/PULL_REQUEST_TEMPLATE.md").read_text(encoding="utf-8")
    for question in ("Which test failed before", "Which numbers move", "Which command made"):
        assert question in text
    ecosystems = {update["package-ecosystem"] for update in read(ROOT / ".github/dependabot.yml")["updates"]}
    assert ecosystems == {"pip", "github-actions"}


def test_these_pages_name_files_that_exist_and_no_address() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert "://" not in text, page
        for name in re.findall(
            r"(?<![\w./])((?:docs|scripts|comit_bench|\.ci)/[\w./-]*\w|[A-Z]{3,}\.md)\b", text
        ):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_links_between_pages_lead_somewhere(script: Any) -> None:
    assert script("check_links").dead_links(ROOT) == []


def test_dead_links_are_found(script: Any, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        "# One & two\n## Twice\n## Twice\n"
        "[a](b.md) [b](#one--two) [c](b.md#three) [d](#twice-1) [e](https://a.b/gone) `[f](gone.md)`\n"
        "```\n[g](gone.md)\n```\n"
        '[h](gone.md) [i](#gone) [j](b.md#gone) ![k](gone.png "title") <img src="gone.jpg">\n'
    )
    (tmp_path / "b.md").write_text("# Three\n")
    git(tmp_path, "init", "--quiet")
    dead = script("check_links").dead_links(tmp_path)
    assert dead == [f"a.md: {name}" for name in ("gone.md", "#gone", "b.md#gone", "gone.png", "gone.jpg")]


def tree(
    root: Path, *, package: str = "1.2.3", citation: str = "1.2.3", heading: str = "[1.2.3] - 2026-01-31"
) -> Path:
    (root / "comit_bench").mkdir()
    (root / "comit_bench/__init__.py").write_text(f'__version__ = "{package}"\n')
    (root / "CITATION.cff").write_text(f"cff-version: 1.2.0\nversion: {citation}\n")
    (root / "CHANGELOG.md").write_text(f"## [Unreleased]\n\n## {heading}\n\n## [1.0.0] - 2025-01-01\n")
    return root


def test_a_release_has_one_version(script: Any, tmp_path: Path) -> None:
    assert script("release_check").check_versions(tree(tmp_path), "v1.2.3") == "1.2.3"


@pytest.mark.parametrize(
    ("wrong", "tag", "says"),
    [
        ({"package": "1.2.4"}, None, "__init__.py: 1.2.4"),
        ({"citation": "1.2.2"}, None, "CITATION.cff: 1.2.2"),
        ({"heading": "[1.1.0] - 2026-01-31"}, None, "CHANGELOG.md: 1.1.0"),
        ({"heading": "[1.2.3]"}, None, "YYYY-MM-DD"),
        ({"heading": "[1.2.3] - soon"}, None, "YYYY-MM-DD"),
        ({}, "v1.2.4", "the tag: 1.2.4"),
        ({}, "1.2.3", "expected v"),
    ],
)
def test_a_release_of_two_versions_is_refused(
    script: Any, tmp_path: Path, wrong: dict[str, str], tag: str | None, says: str
) -> None:
    check = script("release_check")
    with pytest.raises(check.Failed, match=re.escape(says)):
        check.check_versions(tree(tmp_path, **wrong), tag)


def test_a_release_is_committed(script: Any, tmp_path: Path) -> None:
    check = script("release_check")
    git(tree(tmp_path), "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    check.check_clean(tmp_path)
    (tmp_path / "forgotten.py").write_text("")
    with pytest.raises(check.Failed, match=r"forgotten\.py"):
        check.check_clean(tmp_path)


def test_the_checkout_names_one_version(script: Any) -> None:
    named = script("release_check").versions(ROOT)
    assert named["comit_bench/__init__.py"] == named["CITATION.cff"]
