"""WebDataset shards: patterns, listings, reading by offset, and everything that is refused."""

from __future__ import annotations

import gzip
import io
import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_sets import image_files, write_shards, write_tar

from comit_bench.data.readers import tar_shards
from comit_bench.data.readers.tar_shards import TarImages, expand_braces, find_shards, index_shards, scan_tar
from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "pattern",
    [
        "s-{000..012}.tar", "s-{0..3}.tar", "{a,b}/{8..11}.tar", "{3..1}.tar", "plain.tar", "{a,{b,c}}.tar",
        "{08..11}{x,}.tar",
    ],
)  # fmt: skip
def test_braces_mean_what_they_mean_in_bash(pattern: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True
    )
    assert expand_braces(pattern) == done.stdout.split()


@given(st.integers(0, 500), st.integers(0, 60), st.integers(1, 6))
def test_ranges_keep_their_width(first: int, more: int, width: int) -> None:
    names = expand_braces(f"{{{first:0{width}d}..{first + more:0{width}d}}}")
    assert [int(name) for name in names] == list(range(first, first + more + 1))


@pytest.mark.parametrize(
    "pattern", ["{x}.tar", "{}.tar", "{0...3}.tar", "{0..9999999}.tar", "{0..999}{0..999}"]
)
def test_other_braces_are_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"neither a range|more than 100000"):
        expand_braces(pattern)


def test_shards_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "a", image_files(6), 3)
    write_tar(tmp_path / "odd {1}.tar", image_files(1))
    all_three = tuple(sorted((tmp_path / "a").glob("*.tar")))
    assert find_shards(f"{tmp_path}/a") == all_three
    assert find_shards(f"{tmp_path}/a/*.tar") == all_three
    assert find_shards(f"{tmp_path}/a/shard-{{000000..000002}}.tar") == all_three
    assert find_shards(f"{tmp_path}/a/shard-000002.tar::{tmp_path}/a/shard-00000{{0,1}}.tar") == all_three
    assert find_shards(f"{tmp_path}/{{a,a}}/*2.tar::{tmp_path}/a/*2.tar") == all_three[2:]
    assert find_shards(f"{tmp_path}/odd {{1}}.tar") == (tmp_path / "odd {1}.tar",)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_shards("~/a/*.tar") == all_three


def test_shards_that_are_not_there_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path, image_files(4), 2)
    with pytest.raises(MissingError, match=r"shard-000002\.tar: no such shard, and 2 more are missing"):
        find_shards(f"{tmp_path}/shard-{{000000..000004}}.tar")
    with pytest.raises(MissingError, match=r"nothing-\*\.tar: no \.tar files there\. Give a directory"):
        find_shards(f"{tmp_path}/nothing-*.tar")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "x.tar.gz").write_bytes(b"")
    with pytest.raises(MissingError, match="only compressed ones"):
        find_shards(str(tmp_path / "packed"))
    for address in ("https://example.org/{0..3}.tar", "s3://bucket/x.tar", "pipe:cat x.tar"):
        with pytest.raises(UsageError, match="not from an address"):
            find_shards(address)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_by_offset(tmp_path: Path, cache: Path, form: int) -> None:
    files = image_files(9)
    if form != tarfile.USTAR_FORMAT:  # names that need extra headers
        files[f"{'long/' * 60}name.png"] = b"not looked at"
        files["ümläut/0.png"] = b"x" * 513
    write_tar(tmp_path / "x.tar", files, form=form)
    images = TarImages([tmp_path / "x.tar"], cache=cache)
    assert list(images.ids) == sorted(files)
    assert [images.read(i) for i in range(len(files))] == [files[name] for name in sorted(files)]
    assert images.where(0) == f"{tmp_path}/x.tar: {min(files)}"


def test_tars_of_gnu_tar_are_read(tmp_path: Path, cache: Path) -> None:
    files = image_files(5)
    for name, content in files.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(content)
    subprocess.run(["tar", "-C", str(tmp_path / "tree"), "-cf", str(tmp_path / "x.tar"), "."], check=True)
    images = TarImages([tmp_path / "x.tar"], cache=cache)
    assert {name: images.read(i) for i, name in enumerate(images.ids)} == files


def test_order_and_ids_do_not_depend_on_the_sharding(tmp_path: Path, cache: Path) -> None:
    files = image_files(20)
    contents = []
    for number in (1, 2, 7):
        write_shards(tmp_path / str(number), files, number)
        images = TarImages(find_shards(f"{tmp_path}/{number}"), cache=cache)
        contents.append([(name, images.read(i)) for i, name in enumerate(images.ids)])
    assert contents[0] == contents[1] == contents[2] == sorted(files.items())


def test_names_that_repeat_get_their_shard_in_front(tmp_path: Path, cache: Path) -> None:
    for folder in ("a", "b"):
        for number in (0, 1):
            write_tar(tmp_path / folder / f"{number}.tar", {"000.png": f"{folder}{number}".encode()})
    shards = find_shards(f"{tmp_path}/{{a,b}}/*.tar")
    images = TarImages(shards, cache=cache)
    assert images.ids == ("a/0/000.png", "a/1/000.png", "b/0/000.png", "b/1/000.png")
    assert [images.read(i) for i in range(4)] == [b"a0", b"a1", b"b0", b"b1"]


def test_names_that_are_not_utf8_are_usable(tmp_path: Path, cache: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for raw in (b"\xe9.png", b"\xe8.png"):
            entry = tarfile.TarInfo(raw.decode("utf-8", "surrogateescape"))
            entry.size = 1
            archive.addfile(entry, io.BytesIO(raw[:1]))
    for _ in range(2):  # listed, then from the cache
        images = TarImages([tmp_path / "x.tar"], cache=cache)
        assert images.ids == ("\\xe8.png", "\\xe9.png")
        assert [images.read(i) for i in (0, 1)] == [b"\xe8", b"\xe9"]


def test_the_image_of_a_sample_is_found_or_chosen(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.tar"
    pairs = {"a/0.input.png": b"in", "a/0.target.png": b"out", "a/1.input.PNG": b"in1", "a/1.json": b"{}",
             "a/._0.png": b"junk of a Mac", "README": b""}  # fmt: skip
    write_tar(path, pairs)
    with pytest.raises(
        UsageError, match=r"sample a/0 has several images \(a/0\.input\.png, a/0\.target\.png\)"
    ):
        TarImages([path], cache=cache)
    chosen = TarImages([path], cache=cache, image_key=".Input.png")
    assert chosen.ids == ("a/0.input.png", "a/1.input.PNG")
    with caplog.at_level(logging.WARNING):
        assert TarImages([path], cache=cache, image_key="jpg;target.png").ids == ("a/0.target.png",)
    assert "2 samples of 1 shards hold no image" in caplog.text  # a/1 and the README's label
    with pytest.raises(UsageError, match=r"end in tiff; there are: cls, input\.png, json, target\.png"):
        TarImages([path], cache=cache, image_key="tiff")


def test_links_are_left_out_and_said(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        entry = tarfile.TarInfo("0.png")
        entry.size = 2
        archive.addfile(entry, io.BytesIO(b"ab"))
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert TarImages([tmp_path / "x.tar"], cache=cache).ids == ("0.png",)
    assert "1 members that are links" in caplog.text


def test_a_member_that_is_there_twice_is_refused(tmp_path: Path, cache: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for content in (b"a", b"b"):
            entry = tarfile.TarInfo("0.png")
            entry.size = 1
            archive.addfile(entry, io.BytesIO(content))
    with pytest.raises(CorruptFileError, match=r"x\.tar: holds 0\.png more than once"):
        TarImages([tmp_path / "x.tar"], cache=cache)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    """Also at the border between two members, where tarfile itself says nothing."""
    write_tar(tmp_path / "x.tar", {"0.png": b"a" * 700, "1.png": b"b" * 512})
    whole = (tmp_path / "x.tar").read_bytes()
    cut = tmp_path / "cut.tar"
    with tarfile.open(tmp_path / "x.tar") as archive:
        borders = [entry.offset for entry in archive]
        end = archive.getmembers()[-1].offset_data + 512
    assert len(borders) == 4
    for length in [*borders, *range(0, end + 512, 100), end, end + 511]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CorruptFileError, match=r"cut\.tar: .*(truncated|no tar|damaged)"):
            scan_tar(cut)
    cut.write_bytes(whole[: end + 512])  # a lone end block is enough
    assert scan_tar(cut).names == ("0.png", "0.cls", "1.png", "1.cls")


def test_tars_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, image_files(3))
    whole = path.read_bytes()
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(CorruptFileError, match=r"x\.tar: compressed with gzip"):
        scan_tar(path)
    path.write_bytes(b"<html>" * 500)
    with pytest.raises(CorruptFileError, match=r"x\.tar: truncated or no tar"):
        scan_tar(path)
    path.write_bytes(whole + whole)
    with pytest.raises(CorruptFileError, match="data after the end marker"):
        scan_tar(path)
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        second = archive.getmembers()[1].offset
    path.write_bytes(whole[:second] + b"\xff" * 512 + whole[second + 512 :])
    with pytest.raises(CorruptFileError, match=f"no tar header at byte {second}"):
        scan_tar(path)
    with pytest.raises(MissingError, match="no such shard"):
        scan_tar(tmp_path / "none.tar")


def test_a_shard_is_listed_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "s", image_files(10), 3)
    shards = find_shards(f"{tmp_path}/s")
    scanned: list[str] = []

    def counting(path: Path) -> tar_shards.TarIndex:
        scanned.append(path.name)
        return scan_tar(path)

    monkeypatch.setattr(tar_shards, "scan_tar", counting)
    first = index_shards(shards, cache)
    assert sorted(scanned) == [path.name for path in shards]
    assert index_shards(shards, cache) == first
    assert len(scanned) == 3

    write_tar(shards[1], {"new.png": b"new"})  # another size
    assert index_shards(shards, cache)[1].names == ("new.png", "new.cls")
    status = shards[2].stat()
    os.utime(shards[2], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert index_shards(shards, cache)[2].names == first[2].names
    assert scanned[3:] == [shards[1].name, shards[2].name]

    stored = sorted((cache / "tar-index").glob("*.json"))
    assert len(stored) == 3
    for content in (b"", b"{", b"[]", b'{"format": 1}', json.dumps({"format": 0}).encode()):
        stored[0].write_bytes(content)
        before = len(scanned)
        assert index_shards(shards, cache)[0].names == first[0].names
        assert len(scanned) == before + 1


def test_the_first_bad_shard_ends_the_listing(tmp_path: Path, cache: Path) -> None:
    write_shards(tmp_path, image_files(4), 2)
    (tmp_path / "shard-000001.tar").write_bytes(b"short")
    with pytest.raises(CorruptFileError, match=r"shard-000001\.tar"):
        index_shards(find_shards(str(tmp_path)), cache)


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path / "s", image_files(4), 2)
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert len(TarImages(find_shards(f"{tmp_path}/s"), cache=tmp_path / "cache").ids) == 4
    assert "it is made anew next time" in caplog.text


def _list_in_process(folder: str, cache: str) -> int:
    return len(TarImages(find_shards(folder), cache=Path(cache)).ids)


def test_processes_may_list_at_the_same_time(tmp_path: Path, cache: Path) -> None:
    write_shards(tmp_path / "s", image_files(40), 8)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        jobs = [(f"{tmp_path}/s", str(cache))] * 8
        assert pool.starmap(_list_in_process, jobs) == [40] * 8


def test_changes_during_the_run_stop_it(tmp_path: Path, cache: Path) -> None:
    """No image is blamed: nothing here is a CorruptFileError, which training would count as broken."""
    path = tmp_path / "x.tar"
    write_tar(path, image_files(3))
    images = TarImages([path], cache=cache)
    copy = pickle.loads(pickle.dumps(images))  # what workers get that are not forked
    assert copy.read(1) == images.read(1)
    write_tar(path, image_files(4))
    with pytest.raises(BenchError, match=r"x\.tar: was changed while it was in use") as changed:
        images.read(0)
    assert not isinstance(changed.value, CorruptFileError)
    path.unlink()
    with pytest.raises(MissingError, match=r"x\.tar: no such shard"):
        images.read(0)


def test_the_standard_library_is_enough() -> None:
    code = (
        "import sys, comit_bench.data.readers.tar_shards\n"
        "print('webdataset' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
