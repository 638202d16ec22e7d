"""``comit-bench data build | show | download`` and what ``doctor`` says about data."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from official import write_small_vg
from PIL import Image
from typer.testing import CliRunner

from comit_bench.commands.app import app
from comit_bench.data import download as downloads
from comit_bench.data import pictures
from comit_bench.data.pieces import missing_pieces
from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError
from comit_bench.recipes.download import ATTEMPTS
from comit_bench.recipes.specs import DatasetSpec, DownloadSpec, find_datasets

# --------------------------------------------------------------------------------------------- a server


class Shelf(ThreadingHTTPServer):
    """Serves bytes by path, understands ranges, and can break off."""

    files: dict[str, bytes]
    break_after: list[int]  # bytes of the next answers, then it is patient
    seen: list[str | None]  # Range headers

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Shelf

    def do_GET(self) -> None:
        content = self.server.files.get(self.path)
        asked = self.headers.get("Range")
        self.server.seen.append(asked)
        if content is None:
            self.send_error(404)
            return
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        start = 0
        if asked and self.headers.get("If-Range") == tag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", tag)
        self.end_headers()
        stop = start + self.server.break_after.pop(0) if self.server.break_after else len(content)
        self.wfile.write(content[start:stop])
        if stop < len(content):
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    monkeypatch.setattr("comit_bench.recipes.download.time.sleep", lambda seconds: None)
    server = Shelf(("127.0.0.1", 0), _Handler)
    server.files, server.break_after, server.seen = {}, [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def zipped(names: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return stream.getvalue()


def sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def spec_with(*items: DownloadSpec) -> DatasetSpec:
    return DatasetSpec(
        name="tiny", version=1, title="Tiny", reader="coco", folder="tiny", licence="none", downloads=items
    )


# -------------------------------------------------------------------------------------------- downloads


def test_a_broken_download_continues(shelf: Shelf, tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    shelf.files["/a.bin"], shelf.break_after = content, [100_000, 300_000]
    item = DownloadSpec(
        url=f"{shelf.address}/a.bin",
        file="a.bin",
        creates="a.bin",
        size=len(content),
        checksum=sha256(content),
    )
    downloads.download(spec_with(item), tmp_path, progress=False)
    assert (tmp_path / "a.bin").read_bytes() == content
    assert shelf.seen == [None, "bytes=100000-", "bytes=400000-"]
    note = json.loads((tmp_path / ".downloads" / "a.bin.json").read_text())
    assert (note["sha256"], note["size"]) == (sha256(content), len(content))
    assert not list(tmp_path.rglob("*.part"))
    downloads.download(spec_with(item), tmp_path, progress=False)
    assert len(shelf.seen) == 3, "nothing is fetched twice"


def test_a_file_that_changed_on_the_server_is_fetched_anew(shelf: Shelf, tmp_path: Path) -> None:
    old, new = b"old" * 100_000, b"new!" * 100_000
    shelf.files["/a.bin"], shelf.break_after = old, [1000] + [0] * ATTEMPTS
    item = DownloadSpec(url=f"{shelf.address}/a.bin", file="a.bin", creates="a.bin")
    with pytest.raises(MissingError, match="the same command continues"):
        downloads.download(spec_with(item), tmp_path, progress=False)
    assert (tmp_path / "a.bin.arrived.part").stat().st_size == 1000
    shelf.files["/a.bin"] = new
    downloads.download(spec_with(item), tmp_path, progress=False)
    assert (tmp_path / "a.bin").read_bytes() == new


def test_wrong_size_checksum_address(shelf: Shelf, tmp_path: Path) -> None:
    shelf.files["/a.bin"] = b"abc"
    url = f"{shelf.address}/a.bin"
    wrong = DownloadSpec(url=url, file="a.bin", creates="a.bin", checksum=sha256(b"abd"))
    with pytest.raises(CorruptFileError, match="may have changed"):
        downloads.download(spec_with(wrong), tmp_path, progress=False)
    assert not (tmp_path / "a.bin").exists()
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(MissingError, match="offers 3 bytes, expected 4"):
        downloads.download(
            spec_with(DownloadSpec(url=url, file="a.bin", creates="a.bin", size=4)), tmp_path, progress=False
        )
    gone = DownloadSpec(url=f"{shelf.address}/b.bin", file="b.bin", creates="b.bin")
    with pytest.raises(MissingError, match="404"):
        downloads.download(spec_with(gone), tmp_path, progress=False)
    with pytest.raises(UsageError, match="http"):
        downloads.fetch(DownloadSpec(url="file:///etc/passwd", file="x", creates="x"), tmp_path / "x")


@pytest.mark.parametrize("top", ["images/", "some/where/images/", ""])
def test_archives_of_every_shape(shelf: Shelf, tmp_path: Path, top: str) -> None:
    shelf.files["/i.zip"] = zipped({f"{top}{n}.jpg": b"x" * n for n in (1, 2)})
    item = DownloadSpec(url=f"{shelf.address}/i.zip", file="i.zip", unpack=".", creates="images")
    downloads.download(spec_with(item), tmp_path, progress=False)
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == ["1.jpg", "2.jpg"]
    assert sorted(p.name for p in (tmp_path / ".downloads").iterdir()) == ["i.zip.json"]


def test_an_archive_that_adds_to_a_folder(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "mine.json").write_text("{}")
    names = {"annotations/instances_train2017.json": b"1", "annotations/instances_val2017.json": b"2"}
    shelf.files["/a.zip"] = zipped(names)
    item = DownloadSpec(
        url=f"{shelf.address}/a.zip", file="a.zip", unpack=".", creates="annotations/instances_train2017.json"
    )
    downloads.download(spec_with(item), tmp_path, keep=True, progress=False)
    assert len(list((tmp_path / "annotations").iterdir())) == 3
    assert (tmp_path / ".downloads" / "a.zip").is_file()
    (tmp_path / ".downloads" / "a.zip.unpacking").write_text("")  # as after a crash in the middle
    assert not downloads.is_done(item, tmp_path)


def test_tars_and_dangerous_members(tmp_path: Path) -> None:
    good, evil, cut = tmp_path / "good.tar", tmp_path / "evil.zip", tmp_path / "cut.zip"
    with tarfile.open(good, "w") as archive:
        member = tarfile.TarInfo("images/1.jpg")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    downloads.unpack(good, tmp_path / "out", "images")
    assert (tmp_path / "out" / "images" / "1.jpg").read_bytes() == b"abc"
    evil.write_bytes(zipped({"../escaped.txt": b"x"}))
    with pytest.raises(CorruptFileError, match="would leave the folder"):
        downloads.unpack(evil, tmp_path / "out2", "images")
    assert not (tmp_path / "escaped.txt").exists()
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("../escaped.txt"), io.BytesIO(b""))
    with pytest.raises(CorruptFileError, match="damaged"):
        downloads.unpack(tmp_path / "evil.tar", tmp_path / "out3", "images")
    content = bytearray(zipped({"images/1.jpg": b"abcdefgh" * 100}))
    content[60] ^= 1
    cut.write_bytes(bytes(content))
    with pytest.raises(CorruptFileError, match="damaged"):
        downloads.unpack(cut, tmp_path / "out4", "images")


def test_every_download_of_a_recipe_is_a_web_address() -> None:
    for recipe in find_datasets().values():
        for item in recipe.spec.downloads:
            assert item.url.startswith(("http://", "https://"))
            assert (item.unpack is not None) == item.file.endswith(".zip")
            if item.unpack is None:
                assert item.creates == item.file


# ------------------------------------------------------------------------------------------ the commands


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["data", *arguments])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    tiny.write_recipes(tmp_path)
    return tiny.write_images(tmp_path, train=6, val=3)


def test_build_writes_a_report(small: Path) -> None:
    done = run("build", "tiny", "--data-root", str(small), "--include-path", str(small), "-q")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["splits"] == {"train": 24, "val": 12}
    assert (found["missing"], found["broken"]) == (0, 0)
    image = next((small / "tiny" / "val").rglob("*.png"))
    image.write_bytes(image.read_bytes()[:50])
    done = run("build", "tiny", "--data-root", str(small), "--include-path", str(small), "-q")
    assert json.loads(done.stdout)["broken"] == 1
    report = json.loads(Path(json.loads(done.stdout)["report"]).read_text())
    (broken,) = report["broken"].values()
    assert str(image) in broken
    for other in list((small / "tiny" / "val").rglob("*.png"))[:4]:
        other.write_bytes(b"")
    done = run("build", "tiny", "--data-root", str(small), "--include-path", str(small), "-q")
    assert isinstance(done.exception, BenchError)
    assert "max_broken" in str(done.exception)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_build_does_not_depend_on_workers(small: Path, workers: str) -> None:
    image = next((small / "tiny" / "val").rglob("*.png"))
    image.write_bytes(b"nothing")
    done = run(
        "build", "tiny", "--data-root", str(small), "--include-path", str(small), "-q", "--workers", workers
    )
    assert json.loads(done.stdout)["broken"] == 1


def test_show_draws_two_pictures(small: Path, tmp_path: Path) -> None:
    broken = next((small / "tiny" / "val").rglob("*.png"))
    broken.write_bytes(b"nothing")
    output = tmp_path / "pictures"
    done = run(
        "show", "tiny", "--data-root", str(small), "--include-path", str(small), "--output", str(output), "-q"
    )
    assert done.exit_code == 0, done.output
    assert "4 different, 24 in all" in done.stdout
    for name in ("tiny-histograms.png", "tiny-samples.png"):
        with Image.open(output / name) as picture:
            assert min(picture.size) > 300
            assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 10
    done = run(
        "show", "tiny", "--data-root", str(small), "--include-path", str(small), "--split", "vall", "-q"
    )
    assert isinstance(done.exception, UsageError)
    assert "val" in str(done.exception)


def test_show_draws_the_boxes_of_relations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_small_vg(tmp_path)
    listed = json.loads((base / "relationships.json").read_text())
    for one in listed:
        (relation,) = one["relationships"]
        relation["subject"] |= {"x": 10, "y": 20, "w": 30, "h": 40, "name": " Man"}
        too_small = {**relation, "subject": {**relation["subject"], "w": 1, "h": 1}}
        other = {"predicate": "under", "subject": relation["object"], "object": relation["subject"]}
        one["relationships"] = [too_small, relation, relation, other]
    (base / "relationships.json").write_text(json.dumps(listed))
    figures: list[Any] = []
    real = pictures._save
    monkeypatch.setattr(
        pictures, "_save", lambda figure, target: figures.append(figure) or real(figure, target)
    )
    places = ["--data-root", str(tmp_path), "--output", str(tmp_path / "out")]
    done = run("show", "visual-genome", *places, "-q")
    assert done.exit_code == 0, done.output
    (sheet,) = [figure for figure in figures if len(figure.axes) == pictures.SAMPLES]
    side = 8  # pixels of the images; boxes are shares of 100 x 100
    for axes in sheet.axes[: len(sheet.axes) - 2]:
        boxes = [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axes.patches]
        subject, thing = (0.1, 0.2, 0.3, 0.4), (0.0, 0.0, 0.5, 0.5)
        wanted = [thing, subject, subject, thing]
        assert np.allclose(
            boxes, [(x * side - 0.5, y * side - 0.5, w * side, h * side) for x, y, w, h in wanted]
        )
        assert [text.get_text() for text in axes.texts] == ["b", "man", "man", "b"]
        assert axes.get_title() == "b under man\nman on b"


def test_download_prints_the_steps_or_asks_where_to(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = run("download", "imagenet100")
    assert steps.exit_code == 0
    for words in ("image-net.org", "val/<wnid>/*.JPEG", "comit-bench data build imagenet100"):
        assert words in steps.stdout
    assert "nothing is downloaded" in run("download", "scenes-pairs").stdout
    assert isinstance(run("download", "mscoco-pairs").exception, UsageError)
    wrong = run("show", "mscoco-pair").exception
    assert isinstance(wrong, UsageError)
    assert "mscoco-pairs" in str(wrong)


# ----------------------------------------------------------------------------------------------- doctor


def test_every_missing_piece_is_named_with_a_command(tmp_path: Path) -> None:
    found = find_datasets()
    for name, recipe in found.items():
        pieces = missing_pieces(recipe.spec, None)
        assert bool(pieces) == (recipe.spec.generator is None), name
    coco = found["mscoco-pairs"].spec
    (whole,) = missing_pieces(coco, tmp_path)
    assert whole.command == f"comit-bench data download mscoco-pairs --data-root {tmp_path}"
    (tmp_path / "coco" / "train2017").mkdir(parents=True)
    texts = [piece.what for piece in missing_pieces(coco, tmp_path)]
    assert len(texts) == 3
    for words in ("instances_train2017.json", "instances_val2017.json", "val2017/"):
        assert any(words in text for text in texts), words
    (tmp_path / "visual-genome" / "images" / "VG_100K").mkdir(parents=True)
    texts = [piece.what for piece in missing_pieces(found["visual-genome"].spec, tmp_path)]
    assert len(texts) == 5
    for words in ("relationships.json", "image_data.json", "object_alias", "relationship_alias", "VG_100K_2"):
        assert any(words in text for text in texts), words
    (tmp_path / "imagenet" / "val").mkdir(parents=True)
    (tmp_path / "imagenet" / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    pieces = missing_pieces(found["imagenet100"].spec, tmp_path)
    assert len(pieces) == 2  # train, and labels of the flat validation folder
    assert "LOC_val_solution.csv" in pieces[1].what
    assert "image-net.org" in pieces[1].command
    assert missing_pieces(found["imagenet1k-val"].spec, tmp_path) == []


def test_doctor_lists_them(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--data-root", str(tmp_path)])
    for name in ("mscoco-pairs", "visual-genome", "cssd", "ecssd"):
        assert f"comit-bench data download {name} --data-root {tmp_path}" in done.output
    assert "scenes-pairs: ok" in done.output
