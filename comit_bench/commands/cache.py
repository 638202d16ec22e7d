"""``comit-bench cache ls | clear``: what lies in the cache, and making room there.

Only what this package has put there is listed or removed: every kind is known by its files, and whatever
else lies in the same folders stays. Nothing heavy is imported at the top.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from comit_bench.commands.options import command_group
from comit_bench.errors import BenchError, UsageError, did_you_mean
from comit_bench.files import LOCK, cache_root, explain_write_error, remove_folder, try_lock

app = command_group("List the cache and make room in it.")

# Kind -> what marks one thing of it below the folder of that name, and whether that is the folder around it.
MARKS = {
    "tokens": ("*/*/key.json", True),
    "fits": ("*/*/config.json", True),
    "datasets": ("*/scenes.json", True),
    "manifests": ("*/*/manifest.parquet", True),
    "weights": ("*/source.json", True),
    "features": ("*/*/key.json", True),
    "training-scenes": ("*/key.json", True),
    "references": ("*.npz", False),
    "text": ("*.safetensors", False),
    "negatives": ("*.safetensors", False),
    "digests": ("*.npz", False),
    "reports": ("*.json", False),
    "tar-index": ("*.json", False),
    "decoded": ("*.json", False),
    "unfinished": ("*/*.npz", True),
    "seconds": ("*.json", False),
}
ALL = "all"
KINDS = ", ".join(MARKS)


@dataclass(frozen=True, slots=True)
class Item:
    """One thing in the cache.

    Attributes:
        kind: One of ``MARKS``.
        path: File or folder.
        name: Of the tokenizer, the teacher or whatever it is; empty where the files do not say it.
        data: Of which images, empty as well.
        policy: Cropping policy of tokens.
        size: Bytes.
        changed: Time of its newest file.
    """

    kind: str
    path: Path
    name: str
    data: str
    policy: str
    size: int
    changed: float


def chosen_kinds(kinds: Sequence[str]) -> list[str]:
    """The kinds that were named, ``all`` for each of them."""
    for kind in kinds:
        if kind not in (*MARKS, ALL):
            raise UsageError(f"the cache holds no {kind!r}.{did_you_mean(kind, [*MARKS, ALL])}")
    return [kind for kind in MARKS if kind in kinds or ALL in kinds]


def find_items(root: Path, kinds: Sequence[str]) -> list[Item]:
    """Everything of these kinds below the cache directory, by name, data, policy and date."""
    found = []
    for kind in kinds:
        pattern, folder = MARKS[kind]
        paths = {mark.parent if folder else mark for mark in (root / kind).glob(pattern)}
        things = [_item(kind, path) for path in paths]
        found += sorted(things, key=lambda i: (i.name, i.data, i.policy, i.changed, i.path))
    return found


def _item(kind: str, path: Path) -> Item:
    size, changed = 0, 0.0
    for file in path.rglob("*") if path.is_dir() else [path]:
        try:
            state = file.lstat()
        except OSError:  # another process has just removed it
            continue
        size, changed = size + state.st_size, max(changed, state.st_mtime)
    return Item(kind, path, *_told(kind, path), size, changed)


def _told(kind: str, path: Path) -> tuple[str, str, str]:
    """Name, data and policy, as far as the files say them."""
    key = _read(path / "key.json").get("key", {})
    if kind == "tokens":
        about = _read(path / "about.json")  # stores of earlier versions have none
        name = about.get("tokenizer") or f"{key.get('family', '?')} {str(key.get('weights', '?'))[:19]}"
        return name, about.get("data") or str(key.get("data", "?"))[:19], str(key.get("policy") or "")
    if kind == "features":
        return str(key.get("teacher", {}).get("kind", "?")), str(key.get("data", "?"))[:19], ""
    if kind == "fits":
        config = _read(path / "config.json")
        return str(config.get("family", "?")), str(config.get("training_data", "?")), ""
    if kind == "manifests":
        return path.parent.name, "", ""
    return (path.name if kind in ("datasets", "weights") else ""), "", ""


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty when it is not there or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@app.command(name="ls")
def ls(
    kinds: Annotated[list[str] | None, typer.Argument(metavar="[KIND...]", help=f"{KINDS} or all.")] = None,
) -> None:
    """List what lies in the cache: tokens by tokenizer, data and policy, and everything else."""
    from comit_bench.commands.listing import print_rows
    from comit_bench.pipeline.plan import human_bytes

    root = cache_root()
    found = find_items(root, chosen_kinds(kinds or [ALL]))
    rows = []
    for item, same in groupby(found, lambda i: (i.kind, i.name or i.kind, i.data, i.policy)):
        group = list(same)  # several: other options, seeds, limits; or small files that say no name
        day = f"{datetime.fromtimestamp(max(i.changed for i in group)):%Y-%m-%d %H:%M}"
        size = human_bytes(sum(i.size for i in group))
        kind, name, data, policy = item
        rows.append((kind, str(len(group)), size, day, policy or "-", name, data or "-"))
    if rows:
        print_rows(("kind", "items", "size", "changed", "policy", "what", "data"), rows)
    sys.stderr.write(f"cache: {root}, {human_bytes(sum(item.size for item in found))}\n")


@app.command(name="clear")
def clear(
    kinds: Annotated[list[str], typer.Argument(metavar="KIND...", help=f"{KINDS} or all.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove chosen kinds of things from the cache; they are made or fetched again when they are needed."""
    from comit_bench.pipeline.plan import human_bytes

    root, chosen = cache_root(), chosen_kinds(kinds)
    found = find_items(root, chosen)
    size = human_bytes(sum(item.size for item in found))
    what = f"{len(found)} items of {', '.join(chosen)} ({size}) in {root}"
    if found and not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"{what}: add --yes to remove them")
        if not typer.confirm(f"Remove {what}?"):
            raise typer.Exit(1)
    remove_items(root, found)
    typer.echo(f"removed {what}")


def remove_items(root: Path, found: Sequence[Item]) -> None:
    """Remove things from the cache, none of them when one is refused.

    Raises:
        UsageError: Something leads out of the cache directory through a link.
        BenchError: Another process is at work there, or the system does not let us.
    """
    for item in found:
        if not item.path.resolve().is_relative_to(root.resolve()) or item.path.is_symlink():
            raise UsageError(
                f"{item.path}: leads out of the cache through a link, to {item.path.resolve()}. Nothing was "
                "removed; remove this one by hand."
            )
    with ExitStack() as held:
        for lock in sorted({lock for item in found for lock in _locks(root / item.kind)}):
            _take(lock, held)
        for item in found:
            try:
                remove_folder(item.path) if item.path.is_dir() else item.path.unlink(missing_ok=True)
            except OSError as error:
                raise explain_write_error(error, item.path) from error


def _locks(folder: Path) -> Iterator[Path]:
    """The lock files of a kind: processes that write there hold one of them."""
    return (path for path in folder.rglob("*lock") if path.name == LOCK or path.name.endswith(".lock"))


def _take(path: Path, held: ExitStack) -> None:
    """Take a lock until the end of the block."""
    try:
        lock = try_lock(path)
    except OSError:  # gone meanwhile, or no locks on this disk
        return
    if lock is None:
        raise BenchError(
            f"{path}: another process is at work in this part of the cache. Nothing was removed; wait for it "
            "and run the same command again."
        )
    held.callback(lock.release)
