"""Files are whole or absent, and errors of the system become advice."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kills import die_everywhere, leftovers, run_and_die

from comit_bench import files
from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError
from comit_bench.files import (
    AlreadyThere,
    atomic_path,
    cache_root,
    digest_json,
    inside,
    locked,
    open_plain,
    private_folder,
    remove_folder,
    require_file,
    require_folder,
    require_room,
    sha256_file,
    sweep,
    try_lock,
    write_atomic,
)
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


def put_folder(target: Path, content: str) -> None:
    with atomic_path(target) as temporary:
        temporary.mkdir()
        for name in "ab":
            (temporary / name).write_text(content)


def texts(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_folder_is_never_lost_wherever_its_replacement_is_killed(tmp_path: Path) -> None:
    def work(root: Path) -> None:
        sweep(root)
        assert texts(root / "folder") in ({"a": "old", "b": "old"}, {"a": "new", "b": "new"})
        put_folder(root / "folder", "new")

    die_everywhere(lambda root: put_folder(root / "folder", "old"), work, texts, tmp_path, least=10)


def test_a_file_is_never_lost_wherever_its_replacement_is_killed(tmp_path: Path) -> None:
    def work(root: Path) -> None:
        assert (root / "file").read_text() in ("old", "new")
        write_atomic(root / "file", "new")

    die_everywhere(lambda root: write_atomic(root / "file", "old"), work, texts, tmp_path, least=5)


def test_a_folder_goes_at_once(tmp_path: Path) -> None:
    def work(root: Path) -> None:
        sweep(root)
        if (root / "folder").exists():
            assert texts(root / "folder") == {"a": "old", "b": "old"}
        remove_folder(root / "folder")

    die_everywhere(lambda root: put_folder(root / "folder", "old"), work, texts, tmp_path, least=5)


def test_what_a_living_process_writes_is_not_swept(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "x") as temporary:
        temporary.write_text("half")
        assert run_and_die(lambda: sweep(tmp_path), None)
        assert temporary.read_text() == "half"
    assert (tmp_path / "x").read_text() == "half"


def test_files_of_others_are_not_swept(tmp_path: Path) -> None:
    names = (".mine.part", "big.iso.part", ".abcdef-12345678.part.old", ".0123-abcdefgh.part")
    for name in names:
        (tmp_path / name).write_text("keep")
    (tmp_path / ".ffffff-abcdefgh.part").mkdir()  # of another machine, an hour ago
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {*names, ".ffffff-abcdefgh.part"}
    old = time.time() - 2 * files.FOREIGN_SECONDS
    os.utime(tmp_path / ".ffffff-abcdefgh.part", (old, old))
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == set(names)


@pytest.mark.parametrize("length", [1, 100, 240, 255])
def test_any_name_that_the_system_takes_can_be_written(tmp_path: Path, length: int) -> None:
    target = tmp_path / ("x" * length)
    write_atomic(target, "a")
    write_atomic(target, "b")
    assert target.read_text() == "b"
    remove_folder(target)
    put_folder(target, "c")
    put_folder(target, "d")
    assert texts(target) == {"a": "d", "b": "d"} and len(list(tmp_path.iterdir())) == 1


def test_two_processes_replace_one_folder_at_the_same_time(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from comit_bench.files import atomic_path\n"
        "for n in range(60):\n"
        "    with atomic_path(Path(sys.argv[1])) as new:\n"
        "        new.mkdir()\n"
        "        for name in 'ab': (new / name).write_text(sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "folder")]
    running = [subprocess.Popen([*command, text]) for text in ("one", "two", "three")]
    assert [process.wait(timeout=60) for process in running] == [0, 0, 0]
    assert texts(tmp_path / "folder") in [{"a": t, "b": t} for t in ("one", "two", "three")]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_file_that_must_not_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        write_atomic(tmp_path / f"x{number}", "mine", replace=False)
        with pytest.raises(AlreadyThere):
            write_atomic(tmp_path / f"x{number}", "other", replace=False)
        assert (tmp_path / f"x{number}").read_text() == "mine"

        def no_links(*_: object) -> None:
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", no_links)
    assert not leftovers(tmp_path)


def special(path: Path, kind: str) -> Path:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        os.chdir(path.parent)  # the name of a socket must be short
        socket.socket(socket.AF_UNIX).bind(path.name)
    else:
        path.symlink_to("/dev/null")
    return path


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_special_files_are_neither_replaced_nor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = special(tmp_path / "x", kind)
    before = path.stat().st_mode
    for write in (lambda: write_atomic(path, "a"), lambda: put_folder(path, "a"), lambda: require_file(path)):
        with pytest.raises(UsageError, match=r"x: is a (named pipe|socket|device)"):
            write()
    with pytest.raises((CorruptFileError, OSError)):  # a socket cannot even be opened
        open_plain(path)
    with pytest.raises(BenchError, match="not a folder"):
        require_folder(path)
    assert path.stat().st_mode == before and not leftovers(tmp_path)


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    write_atomic(tmp_path / "far" / "file", "old")
    put_folder(tmp_path / "far" / "folder", "old")
    for name in ("file", "folder", "later"):
        (tmp_path / name).symlink_to(tmp_path / "far" / name)
    write_atomic(tmp_path / "file", "new")
    put_folder(tmp_path / "folder", "new")
    write_atomic(tmp_path / "later", "new")
    assert texts(tmp_path / "far") == dict.fromkeys(("file", "folder/a", "folder/b", "later"), "new")
    assert all((tmp_path / name).is_symlink() for name in ("file", "folder", "later"))
    (tmp_path / "loop").symlink_to("loop")
    write_atomic(tmp_path / "loop", "x")
    assert (tmp_path / "loop").read_text() == "x"


def test_a_file_and_a_folder_do_not_replace_each_other(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", "x")
    put_folder(tmp_path / "folder", "x")
    with pytest.raises(BenchError, match="not a folder"):
        put_folder(tmp_path / "file", "y")
    with pytest.raises(BenchError, match="this is a folder"):
        write_atomic(tmp_path / "folder", "y")
    assert texts(tmp_path) == dict.fromkeys(("file", "folder/a", "folder/b"), "x")


def test_errors_of_the_system_inside_other_libraries_are_explained(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="disk is full"), atomic_path(tmp_path / "x"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="something else"), atomic_path(tmp_path / "x"):
        raise RuntimeError("something else")


# ----------------------------------------------------------------- before the work


@pytest.mark.parametrize("place", ["file", "file/below", "dangling/x", "/dev/null/x", "/proc/x/y"])
def test_a_folder_that_cannot_be_written_is_noticed_at_once(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dangling").symlink_to("/proc/nowhere/else")
    with pytest.raises(BenchError, match=r"(--output|COMIT_BENCH_CACHE)") as caught:
        require_folder(tmp_path / place)
    assert "\n" not in str(caught.value) and (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_full_or_read_only_disk_is_noticed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(BenchError, match=r"(disk is full|cannot write here)"):
        require_folder(tmp_path / "out")
    assert not leftovers(tmp_path)


def test_a_folder_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    require_folder(tmp_path / "a" / "b")
    require_file(tmp_path / "a" / "c")
    assert not list(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="name of a file"):
        require_file(tmp_path)


def test_room_is_asked_for(tmp_path: Path) -> None:
    require_room(tmp_path, 10, "this needs")
    with pytest.raises(BenchError, match=r"this needs 1000000000\.0 GB, but .* are free in"):
        require_room(tmp_path, 10**18, "this needs")


@pytest.mark.parametrize("home", ["", None])
def test_no_home_directory(monkeypatch: pytest.MonkeyPatch, home: str | None) -> None:
    monkeypatch.delenv("COMIT_BENCH_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if home is None:
        monkeypatch.delenv("HOME", raising=False)
        import pwd

        def unknown(number: int) -> None:
            raise KeyError(number)

        monkeypatch.setattr(pwd, "getpwuid", unknown)
    else:
        monkeypatch.setenv("HOME", home)
    with pytest.raises(BenchError, match="Set COMIT_BENCH_CACHE=DIR"):
        cache_root()


def test_the_home_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMIT_BENCH_CACHE", "~no-such-user/x")
    with pytest.raises(BenchError, match=r"COMIT_BENCH_CACHE .~no-such-user/x"):
        cache_root()


# ----------------------------------------------------------------- locks


def test_a_lock_is_given_back_when_its_process_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from comit_bench.files import locked\n"
        "with locked(Path(sys.argv[1]), 'at work'): print('held', flush=True); time.sleep(60)\n"
    )
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        assert try_lock(path) is None
        other.kill()
        other.wait()
    with locked(path, "at work"):
        pass


def test_who_waits_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SAY_AFTER", 0.1)
    done: list[str] = []

    def other() -> None:
        with locked(tmp_path / "lock", "fitting kmeans-patch"):
            done.append("second")

    with locked(tmp_path / "lock", "fitting kmeans-patch"):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.5)
        done.append("first")
    thread.join()
    assert done == ["first", "second"]
    assert caplog.messages == ["another process is fitting kmeans-patch: waiting for it"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOLCK])
def test_without_locks_the_work_is_done_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "try_lock", refuse)
    with locked(tmp_path / "lock", "at work"):
        write_atomic(tmp_path / "x", "done")
    assert (tmp_path / "x").read_text() == "done"


# ----------------------------------------------------------------- paths that stay inside

OUTSIDE = ["", ".", "./", "..", "../x", "a/../../x", "a/..", "/etc/passwd", "//x", "a\0b", "C:/x", "c:x",
           "..\\x", "a\\..\\..\\x", "\\x", "\\\\server\\x"]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorruptFileError, match="archive x"):
        inside(tmp_path, name, what="archive x", kind=CorruptFileError)


@given(
    st.lists(
        st.sampled_from(["a", "..", ".", "", "b c", "C:", "é", "..a", "a..", "\0", "\\", "~"]), max_size=5
    )
)
def test_what_is_let_through_lies_inside(parts: list[str]) -> None:
    root = Path("/root/of/all")
    name = "/".join(parts)
    try:
        path = inside(root, name, what="it", links=True)
    except UsageError:
        pieces = set(name.replace("\\", "/").split("/"))
        leads_out = ".." in pieces or "\0" in pieces or not pieces - {"", "."}
        assert leads_out or name[0] in "/\\" or name.startswith("C:")
        return
    assert Path(os.path.normpath(path)).is_relative_to(root) and Path(os.path.normpath(path)) != root


def test_links_that_lead_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (root / "out").symlink_to(tmp_path)
    (root / "near").symlink_to(root / "in")
    (root / "loop").symlink_to("loop")
    (tmp_path / "door").symlink_to(root)
    assert inside(root, "near/x", what="it") == root / "near" / "x"
    assert inside(tmp_path / "door", "in/x", what="it") == tmp_path / "door" / "in" / "x"
    assert inside(root, "out/x", what="it", links=True) == root / "out" / "x"
    with pytest.raises(UsageError, match="a link that leads out"):
        inside(root, "out/x", what="it")
    refused: Callable[[], Path] = lambda: inside(root, "loop/x", what="it")  # noqa: E731
    with pytest.raises(UsageError):
        refused()


def test_private_folders_are_private(tmp_path: Path) -> None:
    with private_folder(tmp_path) as place:
        assert place.stat().st_mode & 0o077 == 0
    assert not list(tmp_path.iterdir())


def test_seeds_depend_on_seed_and_key_alone() -> None:
    assert seed_for(0, "a") == seed_for(0, "a")
    assert len({seed_for(s, k) for s in range(3) for k in "abc"}) == 9
    assert generator_for(1, "x").initial_seed() == seed_for(1, "x")
