"""The commit of the checkout this package runs from, if it runs from one."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What a hook or a shell may have set for another repository.
_OTHERS = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_COMMON_DIR",
    "GIT_OBJECT_DIRECTORY",
    "GIT_NAMESPACE",
)


@dataclass(frozen=True, slots=True)
class GitState:
    """What git says of a checkout.

    Attributes:
        commit: Whole hash; None before the first commit and when git is missing, refuses or takes over 5 s.
        dirty: Whether a file that git follows differs from the commit.
    """

    commit: str | None = None
    dirty: bool = False

    def __str__(self) -> str:
        if self.commit is None:
            return "git commit unknown"
        return f"git {self.commit[:12]}{', dirty' if self.dirty else ''}"


def git_state(root: Path | None = None) -> GitState | None:
    """The state of a checkout; None, without asking git, where there is no ``.git``.

    Args:
        root: Folder of the checkout; default that of this package.
    """
    root = root or ROOT
    if not (root / ".git").exists():
        return None
    environment = {name: value for name, value in os.environ.items() if name not in _OTHERS}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_CEILING_DIRECTORIES": str(root.parent)}
    command = ["git", "-C", str(root), "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return GitState()
    lines = done.stdout.splitlines()
    (commit,) = [line.split()[-1] for line in lines if line.startswith("# branch.oid ")] or ["(initial)"]
    if done.returncode or commit == "(initial)":
        return GitState()
    return GitState(commit, any(not line.startswith("# ") for line in lines))
