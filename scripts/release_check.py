"""What a release must pass: ``python scripts/release_check.py [--tag vX.Y.Z] [--output DIR] [--borrow]``.

Takes what is committed, not what lies in the folder. A check that fails stops only those that need what it
makes; the exit status is 1 when one failed. RELEASING.md says what comes before and after.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SMOKE = (
    "import comit_bench; from pathlib import Path; from sys import prefix; "
    "assert Path(prefix).resolve() in Path(comit_bench.__file__).resolve().parents, comit_bench.__file__; "
    "comit_bench.load_tokenizer('comit-nano')"
)


class Failed(Exception):
    """A check that did not pass; the message says what is wrong and how to mend it."""


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, in an environment without the checkout."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        words = " ".join(str(word) for word in command)
        raise Failed(f"{words}: exit status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def versions(root: Path) -> dict[str, str | None]:
    """The version by each file that names it; for CHANGELOG.md that of the newest release."""

    def find(name: str, pattern: str) -> str | None:
        found = re.search(pattern, (root / name).read_text(encoding="utf-8"), re.M)
        return found[1] if found else None

    return {
        "comit_bench/__init__.py": find("comit_bench/__init__.py", r'^__version__ = "([^"]+)"$'),
        "CITATION.cff": find("CITATION.cff", r'^version: "?([^"\s]+)"?$'),
        "CHANGELOG.md": find("CHANGELOG.md", r"^## \[(\d[^\]]*)\]"),
    }


def check_versions(root: Path, tag: str | None) -> str:
    """The version that all files and the tag name.

    Raises:
        Failed: Two of them differ, or the heading in CHANGELOG.md has no date.
    """
    named: dict[str, str | None] = versions(root)
    if tag is not None:
        named["the tag"] = (
            tag.removeprefix("v") if tag.startswith("v") else f"{tag} (expected v and a version)"
        )
    if len(set(named.values())) > 1 or None in named.values():
        lines = "".join(f"\n{name}: {version or 'none'}" for name, version in named.items())
        raise Failed(f"versions differ: write the same one into each{lines}")
    version = str(named["comit_bench/__init__.py"])
    heading = re.search(
        rf"^## \[{re.escape(version)}\] [-–] (\S+)$",
        (root / "CHANGELOG.md").read_text(encoding="utf-8"),
        re.M,
    )
    try:
        datetime.date.fromisoformat(heading[1] if heading else "")
    except ValueError:
        raise Failed(f"CHANGELOG.md: expected the heading ## [{version}] - YYYY-MM-DD") from None
    return version


def check_clean(root: Path) -> None:
    """Nothing that belongs to the release may lie about uncommitted.

    Raises:
        Failed: There are changes, or files that git neither follows nor ignores.
    """
    if changes := run("git", "status", "--porcelain", cwd=root):
        raise Failed(f"commit or remove what is not committed, it would not be released:\n{changes}")


def build(root: Path, work: Path, *, isolated: bool) -> tuple[Path, Path]:
    """The sdist, and the wheel made from it, of the last commit."""
    archive, source, dist = work / "source.tar", work / "source", work / "dist"
    run("git", "archive", "--format=tar", f"--output={archive}", "HEAD", cwd=root)
    with tarfile.open(archive) as tar:
        tar.extractall(source, filter="data")
    options = [] if isolated else ["--no-isolation"]
    run(sys.executable, "-m", "build", *options, "--outdir", dist, source, cwd=work)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return sdist, wheel


def check_wheel(wheel: Path, version: str, work: Path, *, borrow: bool) -> None:
    """The wheel works in a fresh environment, from a folder that has nothing to do with the checkout."""
    home, elsewhere = work / "environment", work / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "venv", home, cwd=work)
    binaries = home / ("Scripts" if os.name == "nt" else "bin")
    python = binaries / "python"
    alone = ["--no-deps", "--no-index"] if borrow else []
    run(python, "-m", "pip", "install", "--quiet", *alone, wheel, cwd=elsewhere)
    if borrow:  # folders named in a .pth come last: they cannot answer for the wheel
        site = run(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=elsewhere
        ).strip()
        libraries = [place for place in sys.path if Path(place).name.endswith("-packages")]
        Path(site, "borrowed.pth").write_text("\n".join(libraries) + "\n", encoding="utf-8")
    said = run(binaries / "comit-bench", "--version", cwd=elsewhere).strip()
    if said != version:
        raise Failed(f"comit-bench --version says {said!r}, expected {version!r}")
    for what in ("tasks", "datasets", "tokenizers"):
        if not run(binaries / "comit-bench", "ls", what, "--names", cwd=elsewhere).strip():
            raise Failed(
                f"comit-bench ls {what}: an empty list; is its data in pyproject.toml's package-data?"
            )
    run(python, "-c", SMOKE, cwd=elsewhere)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Run all checks and say how each ended; 1 when one failed."""
    parser = argparse.ArgumentParser(description="What a release must pass.")
    parser.add_argument("--tag", help="the tag it will have, vX.Y.Z")
    parser.add_argument("--output", type=Path, help="a new folder for the sdist and the wheel that passed")
    parser.add_argument(
        "--borrow",
        action="store_true",
        help="libraries of this environment, nothing is installed but the wheel",
    )
    options = parser.parse_args(arguments)
    if options.output and options.output.exists():
        parser.error(f"--output {options.output}: is there already, name a new folder")
    failed = []

    def step(name: str, check: Callable[[], Any]) -> Any:
        try:
            made = check()
        except Failed as error:
            failed.append(name)
            sys.stdout.write(f"FAILED  {name}\n{str(error).strip()}\n")
            return None
        sys.stdout.write(f"ok      {name}\n")
        sys.stdout.flush()
        return made

    with tempfile.TemporaryDirectory(prefix="comit-bench-release-") as folder:
        work = Path(folder)
        step("everything is committed", lambda: check_clean(root))
        step("one version", lambda: check_versions(root, options.tag))
        files = step("sdist and wheel", lambda: build(root, work, isolated=not options.borrow))
        if files:
            twine = (sys.executable, "-m", "twine", "check", "--strict", *files)
            step("twine check", lambda: run(*twine, cwd=work))
            version = str(versions(root)["comit_bench/__init__.py"])
            step("the wheel works", lambda: check_wheel(files[1], version, work, borrow=options.borrow))
        if options.output and not failed and files:
            shutil.copytree(files[0].parent, options.output)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
