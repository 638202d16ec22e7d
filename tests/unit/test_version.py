"""``comit-bench --version``: the version, and in a checkout what git says of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from comit_bench import __version__
from comit_bench.commands.app import main
from comit_bench.results import checkout
from comit_bench.results.checkout import GitState, git_state


def git(root: Path, *arguments: str) -> str:
    who = ("-c", "user.name=someone", "-c", "user.email=someone@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(("git", "-C", root, *who, *arguments), capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one commit, which the package takes for its own."""
    monkeypatch.delenv("GIT_DIR", raising=False)
    (tmp_path / "file").write_text("one\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    def ask() -> str:
        monkeypatch.setattr(sys, "argv", ["comit-bench", "--version"])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
        return capsys.readouterr().out

    return ask


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("git was asked")


def test_a_checkout_tells_its_commit(root: Path, said: Callable[[], str]) -> None:
    commit = git(root, "rev-parse", "HEAD")
    (root / "new").write_text("git does not follow it\n")
    assert said() == f"{__version__} (git {commit[:12]})\n"
    assert git_state() == GitState(commit, dirty=False)


@pytest.mark.parametrize("staged", [False, True])
def test_a_dirty_checkout_says_so(root: Path, said: Callable[[], str], staged: bool) -> None:
    (root / "file").write_text("two\n")
    if staged:
        git(root, "add", "file")
    assert said() == f"{__version__} (git {git(root, 'rev-parse', 'HEAD')[:12]}, dirty)\n"


def test_without_git_folder_nothing_is_asked(
    tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "run", refuse)
    assert said() == f"{__version__}\n"


def test_a_checkout_without_a_git_program(
    root: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(root))
    assert said() == f"{__version__} (git commit unknown)\n"


def test_a_broken_git_folder_and_one_without_commits(root: Path) -> None:
    inner = root / "inner"
    (inner / ".git").mkdir(parents=True)
    assert git_state(inner) == GitState(), "the commit of the repository around it is not its own"
    fresh = root / "fresh"
    fresh.mkdir()
    git(fresh, "init", "--quiet")
    assert git_state(fresh) == GitState()


def test_a_worktree_and_the_environment_of_a_hook(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = root / "other"
    git(root, "worktree", "add", "--quiet", "--detach", str(other))
    git(other, "commit", "--quiet", "--allow-empty", "--message", "two")
    assert git(other, "rev-parse", "HEAD") != git(root, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(root / ".git"))
    state = git_state(other)
    monkeypatch.delenv("GIT_DIR")
    assert state == GitState(git(other, "rev-parse", "HEAD"))
