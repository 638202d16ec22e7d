"""Names out of recipes, archives, annotations, tables and options never lead outside; archives stay small."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import stat
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_recipes

from comit_bench.data import download as downloads
from comit_bench.data.datasets import open_dataset
from comit_bench.data.manifests import rows_from
from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError
from comit_bench.files import check_url
from comit_bench.recipes.download import download as download_weights
from comit_bench.recipes.specs import DatasetSpec, DownloadSpec, check_paths, find_datasets, parse_recipe
from comit_bench.train.config import load_config
from comit_bench.train.data import open_images

OUT = ["../x", "../../x", "a/../../x", "/etc/passwd", "C:/x", "..\\x", ""]


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# ----------------------------------------------------------------- recipes and options


def recipe_with(**changes: Any) -> dict[str, Any]:
    return {
        "name": "d",
        "version": 1,
        "title": "d",
        "reader": "class-folders",
        "folder": "d",
        "splits": {"train": ["train"], "val": ["val"]},
        "licence": "none",
        **changes,
    }


def download_with(**changes: str) -> dict[str, Any]:
    item = {"url": "https://no.where/a.zip", "file": "a.zip", "unpack": ".", "creates": "a"}
    return {"downloads": [item | changes]}


@pytest.mark.parametrize("name", OUT)
@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("folder", lambda name: {"folder": name}),
        ("splits.val", lambda name: {"splits": {"val": ["fine", name]}}),
        ("images.x", lambda name: {"images": {"x": [name]}}),
        ("labels.x", lambda name: {"labels": {"x": [name]}}),
        ("shards.val", lambda name: {"shards": {"val": [f"{name}/*.tar" if name else name]}}),
        ("hub_copies", lambda name: {"hub_copies": [name]}),
        ("class_list", lambda name: {"class_list": name}),
        ("downloads.file", lambda name: download_with(file=name)),
        ("downloads.unpack", lambda name: download_with(unpack=name)),
        ("downloads.creates", lambda name: download_with(creates=name)),
    ],
)
def test_recipes(tmp_path: Path, name: str, key: str, changes: Callable[[str], dict[str, Any]]) -> None:
    path = tmp_path / "datasets" / "d" / "dataset.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(recipe_with(**changes(name))))
    with pytest.raises(UsageError) as caught:
        parse_recipe(path, DatasetSpec)
    assert str(path) in str(caught.value) and key in str(caught.value)
    if (key, name) == ("folder", ""):  # nothing that could be built by hand
        return
    spec = DatasetSpec.model_validate(recipe_with(**changes(name)))
    if key != "class_list":  # reading one that lies elsewhere harms nobody who builds a spec by hand
        with pytest.raises(UsageError, match=key):
            check_paths(spec)
    if key.startswith("downloads"):
        with pytest.raises(UsageError):
            downloads.download(spec, tmp_path / "data" / "d", progress=False)
    assert everything(tmp_path) == {"datasets", "datasets/d", "datasets/d/dataset.yaml"}


def test_generated_sets_stay_in_the_cache(tmp_path: Path) -> None:
    generator = {"layout": "recognition", "train": 1, "val": 1}
    write_recipes(tmp_path)
    recipe = find_datasets((tmp_path,))["tiny"]
    spec = DatasetSpec.model_validate(recipe_with(folder="../../x", generator=generator))
    with pytest.raises(UsageError, match="folder"):
        open_dataset(type(recipe)(spec, recipe.path, "x"), data_root=None, cache=tmp_path / "a" / "b")
    assert not (tmp_path / "x").exists()


def test_all_our_recipes_stay_inside() -> None:
    for recipe in find_datasets().values():
        check_paths(recipe.spec, strict=True)


@pytest.mark.parametrize("name", [*OUT, ".", "a/.."])
@pytest.mark.parametrize("preset", ["comit-nano", "scenes-teacher", "vq-grid-nano"])
def test_names_of_runs(tmp_path: Path, name: str, preset: str) -> None:
    with pytest.raises(UsageError, match="name"):
        load_config(preset, (f"name='{name}'", f"output={tmp_path}"))


@pytest.mark.parametrize("key", ["data.split", "data.val_split"])
def test_names_of_splits(tmp_path: Path, key: str) -> None:
    (tmp_path / "source").mkdir()
    more = ("data.kind=class-folders", f"data.source={tmp_path / 'source'}", f"{key}=../elsewhere")
    with pytest.raises(UsageError, match=key):
        open_images(load_config("comit-nano", more))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x.jpg", "/etc/passwd", "", "..", "a\0.jpg"])
def test_files_that_annotations_name(name: str) -> None:
    import numpy as np

    labels = np.zeros((1, 1), dtype=np.int32)
    rows_from([("1", "train/fine/x.jpg", labels)], 1)
    with pytest.raises(CorruptFileError, match="outside"):
        rows_from([("1", f"train/{name}", labels)], 1)
    with pytest.raises(CorruptFileError, match="outside"):
        rows_from([("1", "train/x.jpg", labels)], 1, [f"masks/{name}"])


# ----------------------------------------------------------------- archives


def zip_of(members: list[tuple[str, bytes, int]]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return stream.getvalue()


def tar_of(members: list[tuple[str, bytes, bytes, str]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, kind, content, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), link
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


REG, LINK = stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777
ZEROS = bytes(1 << 20)
EVIL: dict[str, Callable[[], bytes]] = {
    "zip up": lambda: zip_of([("../x", b"x", REG)]),
    "zip deep up": lambda: zip_of([("images/1", b"1", REG), ("images/../../x", b"x", REG)]),
    "zip absolute": lambda: zip_of([("/x", b"x", REG)]),
    "zip drive": lambda: zip_of([("C:/x", b"x", REG)]),
    "zip backslash": lambda: zip_of([("..\\x", b"x", REG)]),
    "zip link": lambda: zip_of([("images", b"/tmp", LINK)]),
    "zip link, then below it": lambda: zip_of([("images", b"..", LINK), ("images/x", b"x", REG)]),
    "zip fifo": lambda: zip_of([("images/x", b"", stat.S_IFIFO | 0o644)]),
    "zip twice": lambda: zip_of([("images/x", b"1", REG), ("images//x", b"2", REG)]),
    "zip file and folder": lambda: zip_of([("images", b"1", REG), ("images/x", b"2", REG)]),
    "zip bomb": lambda: zip_of([("images/x", ZEROS, REG)]),
    "zip bomb of many": lambda: zip_of([(f"images/{n}", ZEROS[:100_000], REG) for n in range(8)]),
    "tar up": lambda: tar_of([("../x", tarfile.REGTYPE, b"x", "")]),
    "tar absolute": lambda: tar_of([("/x", tarfile.REGTYPE, b"x", "")]),
    "tar link": lambda: tar_of([("images/x", tarfile.SYMTYPE, b"", "/etc/passwd")]),
    "tar link near": lambda: tar_of([("images/x", tarfile.SYMTYPE, b"", "y")]),
    "tar hard link": lambda: tar_of([("images/x", tarfile.LNKTYPE, b"", "/etc/passwd")]),
    "tar device": lambda: tar_of([("images/x", tarfile.CHRTYPE, b"", "")]),
    "tar fifo": lambda: tar_of([("images/x", tarfile.FIFOTYPE, b"", "")]),
    "tar.gz bomb": lambda: gzip.compress(tar_of([("images/x", tarfile.REGTYPE, ZEROS, "")])),
    "tar.bz2 bomb": lambda: bz2.compress(tar_of([("images/x", tarfile.REGTYPE, ZEROS, "")])),
    "tar.xz bomb": lambda: lzma.compress(tar_of([("images/x", tarfile.REGTYPE, ZEROS, "")]), preset=0),
    "tar.gz header bomb": lambda: gzip.compress(tar_of([("x" * (1 << 20), tarfile.REGTYPE, b"", "")])),
    "nothing": lambda: b"",
    "a web page": lambda: b"<html>too many requests</html>",
}


@pytest.mark.parametrize("kind", EVIL)
def test_archives_that_are_no_plain_set_of_files(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "SMALL", 1 << 18)
    archive = tmp_path / "files" / "a.zip"
    archive.parent.mkdir()
    archive.write_bytes(EVIL[kind]())
    with pytest.raises(CorruptFileError, match="damaged or dangerous archive") as caught:
        downloads.unpack(archive, tmp_path / "out", "images")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert everything(tmp_path) == {"files", "files/a.zip"}


def test_a_member_that_lies_about_its_size(tmp_path: Path) -> None:
    content = bytearray(zip_of([("images/x", b"a" * 5000, REG)]))
    for start in (content.index(b"PK\3\4") + 22, content.index(b"PK\1\2") + 24):
        content[start : start + 4] = (10).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(CorruptFileError, match="damaged"):
        downloads.unpack(tmp_path / "a.zip", tmp_path / "out", "images")


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_good_tars(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    members = [("./", tarfile.DIRTYPE, b"", ""), ("./images", tarfile.DIRTYPE, b"", "")]
    sizes = (0, 1, 511, 512, 3000)
    members += [(f"./images/{n}.jpg", tarfile.REGTYPE, bytes([n % 256]) * n, "") for n in sizes]
    members += [("./images/" + "long" * 50, tarfile.REGTYPE, b"long", "")]
    (tmp_path / "a.tar").write_bytes(pack(tar_of(members)))
    downloads.unpack(tmp_path / "a.tar", tmp_path / "out", "images")
    found = {p.name: p.read_bytes() for p in (tmp_path / "out" / "images").iterdir()}
    assert len(found) == 6 and found["3000.jpg"] == bytes([3000 % 256]) * 3000


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(downloads.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    (tmp_path / "a.zip").write_bytes(zip_of([("images/x", bytes(2000), REG)]))
    with pytest.raises(BenchError, match="disk is full"):
        downloads.unpack(tmp_path / "a.zip", tmp_path / "out", "images")
    assert everything(tmp_path) == {"a.zip"}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(alphabet=st.sampled_from("ab./\\:C \0é"), min_size=1, max_size=8),
            st.sampled_from([REG, LINK, stat.S_IFDIR | 0o755, 0]),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_no_zip_reaches_outside(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, int]]
) -> None:
    root = tmp_path_factory.mktemp("zip")
    with warnings.catch_warnings(action="ignore"):  # names that are there twice
        (root / "a.zip").write_bytes(zip_of([(name, b"x", mode) for name, mode in members]))
    with suppress(CorruptFileError):
        downloads.unpack(root / "a.zip", root / "data", "images")
    assert {name.split("/")[0] for name in everything(root)} <= {"a.zip", "data"}
    assert all(path.is_file() or path.is_dir() for path in root.rglob("*"))
    assert not any(path.is_symlink() for path in root.rglob("*"))


def test_links_in_the_data_root_do_not_lead_writes_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "images").symlink_to(tmp_path / "elsewhere")
    item = DownloadSpec(url="https://no.where/a.zip", file="a.zip", unpack="images", creates="images/x")
    spec = DatasetSpec.model_validate(recipe_with(downloads=[item.model_dump()]))
    with pytest.raises(UsageError, match="a link that leads out"):
        downloads.download(spec, tmp_path / "d", progress=False)
    assert not list((tmp_path / "elsewhere").iterdir())


# ----------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("url", "checked", "good"),
    [
        ("https://example.org/x", False, True),
        ("http://127.0.0.1:80/x", False, True),
        ("http://localhost/x", False, True),
        ("http://[::1]:8/x", False, True),
        ("http://example.org/x", True, True),
        ("http://example.org/x", False, False),
        ("http://127.0.0.1.example.org/x", False, False),
        ("http://localhost@example.org/x", False, False),
        ("file:///etc/passwd", True, False),
        ("FILE:///etc/passwd", True, False),
        ("ftp://example.org/x", True, False),
        ("data:,x", True, False),
        ("/etc/passwd", True, False),
        ("https:///x", True, False),
        ("https://[x", True, False),
        ("", True, False),
    ],
)
def test_addresses(url: str, checked: bool, good: bool) -> None:
    if good:
        check_url(url, checked=checked)
        return
    with pytest.raises(UsageError, match="address"):
        check_url(url, checked=checked)
    if not checked:
        with pytest.raises(UsageError, match="address"):
            downloads.fetch(DownloadSpec(url=url, file="x", creates="x"), Path("/nowhere/x"))


def test_a_recipe_with_a_plain_address_needs_a_checksum(tmp_path: Path) -> None:
    path = tmp_path / "d" / "dataset.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(recipe_with(**download_with(url="http://example.org/a.zip"))))
    with pytest.raises(UsageError, match="only https"):
        parse_recipe(path, DatasetSpec)
    more = download_with(url="http://example.org/a.zip", checksum="sha256:" + "0" * 64)
    path.write_text(yaml.safe_dump(recipe_with(**more)))
    parse_recipe(path, DatasetSpec)


class Server(ThreadingHTTPServer):
    answers: dict[str, tuple[int, dict[str, str], bytes]]
    asked: list[str]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # whoever asked has hung up


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        code, headers, content = self.server.answers[self.path]
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("comit_bench.recipes.download.time.sleep", lambda seconds: None)
    made = Server(("127.0.0.1", 0), Handler)
    made.answers, made.asked = {}, []
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize("target", ["file:///etc/passwd", "http://example.org/x", "ftp://example.org/x"])
def test_redirections_obey_the_same_rule(server: Server, tmp_path: Path, target: str) -> None:
    server.answers["/x"] = (302, {"Location": target}, b"")
    with pytest.raises(BenchError, match=r"(only https|not allowed)"):
        downloads.fetch(DownloadSpec(url=f"{server.address}/x", file="x", creates="x"), tmp_path / "x")
    with pytest.raises(BenchError, match=r"(only https|not allowed|302)"):
        download_weights(f"{server.address}/x", tmp_path / "y", pause=0)
    assert not {"x", "y"} & everything(tmp_path)


def plain(content: bytes, **headers: str) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Length": str(len(content)), **headers}, content


def test_a_wrong_first_download_does_not_block_the_right_one(server: Server, tmp_path: Path) -> None:
    item = {"url": f"{server.address}/a.zip", "file": "a.zip", "unpack": ".", "creates": "images"}
    spec = DatasetSpec.model_validate(recipe_with(downloads=[item]))
    good = zip_of([("images/1.jpg", b"x", REG)])
    wrong: list[tuple[Any, Any]] = [
        (plain(b"<html>", **{"Content-Type": "text/html"}), "web page"),
        (plain(b"<html>"), "damaged or dangerous"),
        (plain(zip_of([("other/1.jpg", b"x", LINK)])), "damaged or dangerous"),
        (plain(good[:50]), "damaged or dangerous"),
    ]
    for answer, says in wrong:
        server.answers["/a.zip"] = answer
        with pytest.raises(BenchError, match=says):
            downloads.download(spec, tmp_path, progress=False)
        assert not (tmp_path / ".downloads" / "a.zip").exists()
    server.answers["/a.zip"] = plain(good)
    downloads.download(spec, tmp_path, progress=False)
    assert (tmp_path / "images" / "1.jpg").read_bytes() == b"x"


def test_an_archive_that_a_person_has_put_there_is_not_removed(tmp_path: Path) -> None:
    spec = DatasetSpec.model_validate(recipe_with(**download_with(creates="images")))
    (tmp_path / ".downloads").mkdir()
    (tmp_path / ".downloads" / "a.zip").write_bytes(b"half an archive")
    with pytest.raises(CorruptFileError, match="Remove it"):
        downloads.download(spec, tmp_path, progress=False)
    assert (tmp_path / ".downloads" / "a.zip").read_bytes() == b"half an archive"


def test_more_than_announced_is_not_written(server: Server, tmp_path: Path) -> None:
    server.answers["/x"] = (200, {}, b"x" * 5_000_000)  # without a length
    item = DownloadSpec(url=f"{server.address}/x", file="x", creates="x", size=1000)
    with pytest.raises(CorruptFileError, match="more than 1,000 bytes"):
        downloads.fetch(item, tmp_path / "x", progress=False)
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) < 2_000_000


def test_special_files_in_the_way_of_a_download(server: Server, tmp_path: Path) -> None:
    server.answers["/x"] = plain(b"content")
    item = DownloadSpec(url=f"{server.address}/x", file="x", creates="x")
    for name in ("x", "x.part", "x.arrived.part"):
        os.mkfifo(tmp_path / name)
        if name != "x.part":
            with pytest.raises(UsageError, match="named pipe"):
                downloads.fetch(item, tmp_path / "x", progress=False)
        if name != "x.arrived.part":
            with pytest.raises(UsageError, match="named pipe"):
                download_weights(f"{server.address}/x", tmp_path / "x", pause=0)
        (tmp_path / name).unlink()


def test_two_downloads_at_the_same_time_are_one(server: Server, tmp_path: Path) -> None:
    item = {"url": f"{server.address}/a.zip", "file": "a.zip", "unpack": ".", "creates": "images"}
    spec = DatasetSpec.model_validate(recipe_with(downloads=[item]))
    server.answers["/a.zip"] = plain(zip_of([(f"images/{n}.jpg", os.urandom(5000), REG) for n in range(50)]))
    errors: list[BaseException] = []

    def work() -> None:
        try:
            downloads.download(spec, tmp_path, progress=False)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and server.asked == ["/a.zip"]
    assert len(list((tmp_path / "images").iterdir())) == 50
    assert everything(tmp_path) - {f"images/{n}.jpg" for n in range(50)} == {
        "images",
        ".downloads",
        ".downloads/a.zip.json",
    }
    assert json.loads((tmp_path / ".downloads" / "a.zip.json").read_text())["checked"] is None


def test_a_server_without_the_file(server: Server, tmp_path: Path) -> None:
    server.answers["/x"] = (404, {}, b"")
    with pytest.raises(MissingError, match="404"):
        downloads.fetch(DownloadSpec(url=f"{server.address}/x", file="x", creates="x"), tmp_path / "x")
