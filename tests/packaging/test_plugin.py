"""The documented third-party tokenizer: its wheel is built, installed elsewhere and run by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny import write_images, write_recipes

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "mean_colour"


def run(*command: str | Path, cwd: Path, path: tuple[Path, ...] = (), **extra: str) -> str:
    """Standard output of a command that must succeed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **extra}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed example and nothing else."""
    home = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, home / "source")
    run(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "-o",
        home / "dist",
        home / "source",
        cwd=home,
    )
    (wheel,) = (home / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "mean_colour.py" in archive.namelist()
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, *pip, "--target", home / "site", wheel, cwd=home)
    return home / "site"


def test_the_module_is_about_as_long_as_promised() -> None:
    lines = (EXAMPLE / "mean_colour.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 36


def test_it_is_listed_with_the_distribution_it_came_from(installed: Path, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "comit_bench.commands.app", "ls", "tokenizers")
    assert "mean-colour" not in run(*command, "--names", cwd=tmp_path, path=(ROOT,)).split()
    assert "mean-colour" in run(*command, "--names", cwd=tmp_path, path=(installed, ROOT)).split()
    listing = run(*command, cwd=tmp_path, path=(installed, ROOT))
    assert "plugin:comit-bench-mean-colour" in listing


def test_it_satisfies_the_contract(installed: Path, tmp_path: Path) -> None:
    code = """
import torch
from comit_bench.tokenizers.base import Tokenizer
from comit_bench.tokenizers.load import load_tokenizer
t = load_tokenizer("Mean-Colour", device="cpu")
assert isinstance(t, Tokenizer)
x = torch.randint(0, 256, (5, 3, 1, 1), dtype=torch.uint8).expand(-1, -1, 32, 32).contiguous()
tokens = t.encode(x)
assert tokens.ids.shape == (5, 16) and torch.equal(t.codes_from_ids(tokens.ids), tokens.codes)
assert (t.decode(tokens, seeds=range(5)).int() - x.int()).abs().max() <= 16
print("satisfied")
"""
    assert run(sys.executable, "-c", code, cwd=tmp_path, path=(installed, ROOT)).strip() == "satisfied"


def test_it_runs_by_name_from_images_to_a_record(installed: Path, tmp_path: Path) -> None:
    data, recipes = write_images(tmp_path / "data", train=12, val=6), write_recipes(tmp_path / "recipes")
    run(
        *(
            sys.executable,
            "-m",
            "comit_bench.run",
            "--tokenizer",
            "mean-colour",
            "--tasks",
            "tiny-colours",
            "--suite",
            "scenes",
        ),
        *("--include-path", recipes, "--data-root", data, "--output", tmp_path / "out", "--device", "cpu"),
        "--no-references",
        cwd=tmp_path,
        path=(installed, ROOT),
        COMIT_BENCH_CACHE=str(tmp_path / "cache"),
    )
    (record,) = (tmp_path / "out").rglob("*mean-colour*/*.json")
    found = json.loads(record.read_text())
    assert found["tokenizer"]["name"] == "mean-colour"
    assert found["metrics"]["top1"]["value"] > 25  # four classes of plain colour
