"""Places that cannot be written are told in one line before any work, by every command."""

from __future__ import annotations

import errno
import os
import re
import signal
from pathlib import Path

import pytest
from kills import leftovers, run_and_die
from tiny import write_images, write_recipes
from typer.testing import CliRunner

from comit_bench import load_tokenizer
from comit_bench.commands.app import app
from comit_bench.errors import BenchError
from comit_bench.pipeline.folders import tokenize_folder
from comit_bench.probing import pool


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "data", train=2, val=1)
    write_recipes(tmp_path / "recipes")
    (tmp_path / "file").write_text("precious")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "nowhere")
    return tmp_path


def commands(root: Path, place: Path) -> dict[str, list[str]]:
    tiny = ["--include-path", str(root / "recipes"), "--data-root", str(root / "data")]
    return {
        "run": ["run", *tiny, "--tasks", "tiny-colours", "-t", "pixel-oracle", "-q", "--output", str(place)],
        "sweep": ["sweep", "-t", "vq-grid-nano", "--limit", "2", "-q", "--output", str(place)],
        "tokenize": ["tokenize", str(root / "data"), "-t", "vq-grid-nano", "-q", "--out", str(place / "x")],
        "figure": ["figure", "reconstruction", "-t", "vq-grid-nano", "--output", str(place)],
        "show": ["data", "show", "tiny", *tiny, "-q", "--output", str(place)],
        "table": ["table", str(root / "data"), "--output", str(place)],
        "train": ["train", "--config", "vq-grid-nano", "steps=1", "count=4", f"output={place}", "-q"],
        "teacher": ["train", "--config", "scenes-teacher", "steps=1", "count=100", f"output={place}", "-q"],
        "comit": ["train", "--config", "comit-nano", "steps=1", f"output={place}", "-q", "--device", "cpu"],
        "convert": ["weights", "convert", "alit-small", str(root / "file"), "--output", str(place)],
    }


def told(arguments: list[str]) -> str:
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, BenchError), (done.exception, done.output)
    assert done.stdout == ""
    text = str(done.exception)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("place", ["file/below", "fifo"])
@pytest.mark.parametrize("command", [*commands(Path(), Path())])
def test_every_command(root: Path, command: str, place: str) -> None:
    before = sorted(root.rglob("*"))
    text = told(commands(root, root / place)[command])
    assert str(root / place) in text and "not a folder" in text
    assert sorted(root.rglob("*")) == before and (root / "file").read_text() == "precious"


@pytest.mark.parametrize("command", ["run", "sweep", "tokenize", "show", "fetch", "build"])
@pytest.mark.parametrize("cache", ["/dev/null/x", "~no-such-user/x"])
def test_a_cache_that_cannot_be_written(
    root: Path, monkeypatch: pytest.MonkeyPatch, command: str, cache: str
) -> None:
    monkeypatch.setenv("COMIT_BENCH_CACHE", cache if cache[0] in "/~" else str(root / cache))
    more = {
        "fetch": ["weights", "fetch", "alit-small", "-q"],
        "build": ["data", "build", "tiny", "--include-path", str(root / "recipes"), "--data-root",
                  str(root / "data")],
    }  # fmt: skip
    before = sorted(root.rglob("*"))
    assert "COMIT_BENCH_CACHE" in told((commands(root, root / "out") | more)[command])
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("command", ["run", "tokenize"])
def test_nobody_has_a_home(root: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.delenv("COMIT_BENCH_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "")
    assert "Set COMIT_BENCH_CACHE=DIR" in told(commands(root, root / "out")[command])
    monkeypatch.setenv("HOME", "/dev/null")
    assert "COMIT_BENCH_CACHE=DIR" in told(commands(root, root / "out")[command])


def test_the_data_root_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMIT_BENCH_DATA", "~no-such-user/data")
    assert re.search(r"COMIT_BENCH_DATA .*no-such-user/data.*home", told(["doctor"]))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_before_the_work(
    root: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    write = Path.write_bytes

    def refuse(path: Path, content: bytes) -> int:
        if root / "out" in (path, *path.parents) or path.parent.parent == root:
            raise OSError(code, os.strerror(code))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    text = told(commands(root, root / "out")["run"])
    assert ("disk is full" if code == errno.ENOSPC else "Choose another place") in text
    assert not (root / "cache").exists()


def test_a_disk_that_is_too_small_for_the_tokens(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comit_bench import files

    usage = type(files.shutil.disk_usage(root))
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(10, 9, 1))
    nano = load_tokenizer("vq-grid-nano", device="cpu")
    with pytest.raises(BenchError, match=r"tokens of 12 images need .* are free in"):
        tokenize_folder(nano, root / "data", root / "tokens", cache=root / "cache")
    assert not list((root / "cache").rglob("*.safetensors"))


def test_full_in_the_middle_keeps_what_is_computed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nano = load_tokenizer("vq-grid-nano", device="cpu")
    write, calls = Path.write_bytes, [0]

    def full(path: Path, content: bytes) -> int:
        if b'"shard":"' in content:
            calls[0] += 1
            if calls[0] > 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(BenchError, match="disk is full"):
            tokenize_folder(nano, root / "data", root / "tokens", cache=root / "cache", shard_size=3)
    assert len(list((root / "cache").rglob("shard-*.safetensors"))) == 2
    done = tokenize_folder(nano, root / "data", root / "tokens", cache=root / "cache", shard_size=3)
    assert done.computed == 6 and done.messages == 12


def test_data_of_probes_are_swept_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.tempfile, "gettempdir", lambda: str(tmp_path))

    def dies() -> None:
        with pool._exchange() as folder:
            (folder / "data.safetensors").write_bytes(bytes(1000))
            os.kill(os.getpid(), signal.SIGKILL)

    assert not run_and_die(dies, None)
    assert len(leftovers(tmp_path)) == 1
    with pool._exchange() as folder:
        assert leftovers(tmp_path) == [folder] and folder.stat().st_mode & 0o077 == 0
    assert not list(tmp_path.iterdir())


def test_no_place_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (tmp_path / "absent" / "x", Path("/dev/null/x")):
        monkeypatch.setattr(pool.tempfile, "gettempdir", lambda place=place: str(place))
        (tmp_path / "absent").write_text("a file") if place.parent == tmp_path / "absent" else None
        with pytest.raises(BenchError, match="set TMPDIR"), pool._exchange():
            pass
