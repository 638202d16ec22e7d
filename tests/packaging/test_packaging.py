"""What a person gets from the wheel is what the checkout has: sdist -> wheel -> install -> elsewhere.

Heavy dependencies are not installed again: the clean environment sees those of this one behind its own.
Builds start from a copy of the files that git would commit, so a stale ``build/`` cannot matter.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import comit_bench

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("probes", "datasets", "results/paper", "results/reference")
# A person's own results beside the committed ones: these must stay where they are.
PRIVATE = ("results/records/mine.json", "results/tables/table.md", "results/records/deep/er/mine.json")


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, in an environment without our checkout."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def recipe_files(root: Path) -> set[str]:
    return {
        path.relative_to(root).as_posix()
        for folder in SHIPPED
        for path in (root / folder).rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the checkout, with results of somebody's own in it."""
    target = tmp_path_factory.mktemp("source")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # a deletion that is not committed yet is listed too
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    for name in PRIVATE:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("{}")
    return target


@pytest.fixture(scope="module")
def archives(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that was built from the sdist."""
    output = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, source, cwd=output)
    (sdist,) = output.glob("*.tar.gz")
    (wheel,) = output.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a fresh environment that holds the wheel and, behind it, this environment's libraries."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", home, cwd=home)
    binaries = home / ("Scripts" if os.name == "nt" else "bin")
    python = binaries / "python"
    pip = (
        python,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    )
    run(*pip, archives[1], cwd=home)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    paths = sysconfig.get_paths()
    # Folders named in a .pth come last and their own .pth files are not read, so neither an editable
    # install of the checkout nor an older wheel in this environment can answer for the new one.
    (site / "behind.pth").write_text(f"{paths['purelib']}\n{paths['platlib']}\n")
    return binaries


def test_the_wheel_carries_every_recipe_and_nothing_private(
    source: Path, archives: tuple[Path, Path]
) -> None:
    expected = recipe_files(source)
    assert any(name.endswith("task.yaml") for name in expected)
    assert any(name.endswith("dataset.yaml") for name in expected)
    with zipfile.ZipFile(archives[1]) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
    prefix = "comit_bench/_recipes/"
    assert {name.removeprefix(prefix) for name in names if name.startswith(prefix)} == expected
    tops = {name.split("/")[0] for name in names}
    assert tops == {"comit_bench", f"comit_bench-{comit_bench.__version__}.dist-info"}
    sources = {path.relative_to(source).as_posix() for path in (source / "comit_bench").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    methods = {
        path.relative_to(source).as_posix() for path in source.glob("comit_bench/tokenizers/*/README.md")
    }
    assert "comit_bench/tokenizers/comit/README.md" in methods and methods | {"comit_bench/py.typed"} <= names
    drawn = {
        path.relative_to(source).as_posix()
        for path in (source / "comit_bench/data/scenes/atlas").rglob("*")
        if path.is_file()
    }
    assert len(drawn) >= 20 and drawn | {"comit_bench/tasks/minilm-table.safetensors"} <= names


def test_the_sdist_is_complete_and_holds_nothing_private(source: Path, archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as sdist:
        names = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    assert (
        recipe_files(source) | {"LICENSE", "THIRD_PARTY_LICENSES.md", "README.md", "pyproject.toml"} <= names
    )
    assert not [name for name in names if name.startswith(("results/records", "results/tables", "build"))]


def test_metadata(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        info = f"comit_bench-{comit_bench.__version__}.dist-info"
        metadata = message_from_string(wheel.read(f"{info}/METADATA").decode())
        scripts = wheel.read(f"{info}/entry_points.txt").decode()
        licence = wheel.read(f"{info}/licenses/LICENSE").decode()
        others = wheel.read(f"{info}/licenses/THIRD_PARTY_LICENSES.md").decode()
    assert (metadata["Name"], metadata["Version"]) == ("comit-bench", comit_bench.__version__)
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    assert "Apache License" in licence and "Twemoji" in others
    assert "comit-bench = comit_bench.commands.app:main" in scripts


def test_the_installed_package_is_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "import comit_bench, comit_bench.recipes.specs as r; print(comit_bench.__file__); "
        "print(*[r.recipe_root(kind) for kind in ('probes', 'datasets', 'results')], sep='\\n')"
    )
    for place in run(installed / "python", "-c", code, cwd=tmp_path).split("\n")[:4]:
        assert installed.parent.resolve() in Path(place).resolve().parents


def test_the_wheel_says_its_version_and_no_commit(installed: Path, tmp_path: Path) -> None:
    said = run(installed / "comit-bench", "--version", cwd=tmp_path)
    assert said == f"{comit_bench.__version__}\n"


@pytest.mark.parametrize("what", ["tasks", "datasets", "tokenizers"])
def test_the_wheel_lists_what_the_checkout_lists(installed: Path, tmp_path: Path, what: str) -> None:
    here = run(sys.executable, "-m", "comit_bench.commands.app", "ls", what, "--names", cwd=ROOT)
    elsewhere = run(installed / "comit-bench", "ls", what, "--names", cwd=tmp_path)
    assert elsewhere.splitlines() == here.splitlines()
    assert len(here.splitlines()) >= (3 if what == "tokenizers" else 1)
    assert not list(tmp_path.iterdir())
