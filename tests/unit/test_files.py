"""Files are whole or absent, and errors of the system become advice."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from comit_bench.errors import BenchError, MissingError
from comit_bench.files import atomic_path, cache_root, digest_json, sha256_file, write_atomic
from comit_bench.seeding import generator_for, seed_for


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "a" / "file.txt"
    write_atomic(target, "old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and [p.name for p in target.parent.iterdir()] == ["file.txt"]


def test_directories_appear_at_once_and_replace_each_other(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for content in ("one", "two"):
        with atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
            assert not (target / content).exists()
        assert [p.name for p in target.iterdir()] == [content]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("code", "says"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "cannot write here"), (errno.EIO, "cannot write")],
)
def test_system_errors_become_advice(tmp_path: Path, code: int, says: str) -> None:
    with pytest.raises(BenchError, match=says), atomic_path(tmp_path / "x"):
        raise OSError(code, "reason")
    assert not list(tmp_path.iterdir())


def test_our_own_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="mine"), atomic_path(tmp_path / "x"):
        raise MissingError("mine")


def test_cannot_write_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="file"):
        write_atomic(tmp_path / "file" / "below.txt", "x")


def test_digests(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x", b"abc")
    assert sha256_file(tmp_path / "x").endswith("f20015ad")
    assert (
        digest_json({"b": 1, "a": [2]}) == digest_json({"a": [2], "b": 1}) != digest_json({"a": [2], "b": 2})
    )


def test_cache_location(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path / "here"))
    assert cache_root() == tmp_path / "here"
    monkeypatch.delenv("COMIT_BENCH_CACHE")
    assert cache_root().name == "comit_bench"


def test_seeds_depend_on_seed_and_key_alone() -> None:
    assert seed_for(0, "a") == seed_for(0, "a")
    assert len({seed_for(s, k) for s in range(3) for k in "abc"}) == 9
    assert generator_for(1, "x").initial_seed() == seed_for(1, "x")
