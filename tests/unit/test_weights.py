"""Fetching and converting released weights, against a server on this machine."""

from __future__ import annotations

import json
import os
import threading
from argparse import Namespace
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from comit_bench.commands.app import app
from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError
from comit_bench.files import sha256_file
from comit_bench.recipes.download import download
from comit_bench.tokenizers import weights
from comit_bench.tokenizers.family import Family, Preset, Release, resolve
from comit_bench.tokenizers.registry import FAMILIES, downloads, find_release

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.float16)}


class Server(ThreadingHTTPServer):
    """Serves one file, with ranges; can break off, change its file or send a page."""

    content = b""
    version = '"one"'
    break_after: int | None = None
    page = False
    status: int | None = None
    sends_length = True

    def __init__(self) -> None:
        self.requests: list[str | None] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file.pth?rlkey=1&dl=1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append(wanted)
        if server.status is not None:
            self.send_error(server.status)
            return
        start = 0
        if wanted and self.headers.get("If-Range") == server.version:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(server.content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            size = len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Type", "text/html" if server.page else "application/binary")
        self.send_header("ETag", server.version)
        if server.sends_length:
            self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        body = server.content[start:]
        if server.break_after is not None:
            body, server.break_after = body[: server.break_after], None
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("comit_bench.recipes.download.PAUSE", 0.0)
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    return tmp_path / "cache"


def plain_unpack(content: Any, path: Path) -> dict[str, torch.Tensor]:
    return dict(content["ema"])


def plain_config(name: str) -> dict[str, str]:
    return {"family": name}


def refuse(name: str, tensors: dict[str, torch.Tensor], path: Path) -> None:
    if "a" not in tensors:
        raise UsageError(f"{path}: no {name}")


@pytest.fixture
def release(server: Server, monkeypatch: pytest.MonkeyPatch) -> Release:
    functions = {"test:unpack": plain_unpack, "test:config": plain_config, "test:check": refuse}
    real = resolve
    monkeypatch.setattr(weights, "resolve", lambda target: functions.get(target) or real(target))
    made = Release(
        file="toy.pth",
        url=server.url,
        unpack="test:unpack",
        config="test:config",
        check="test:check",
        allow=("argparse:Namespace",),
    )
    know(monkeypatch, made)
    return made


def know(monkeypatch: pytest.MonkeyPatch, release: Release) -> None:
    """The registry lists a release called toy."""
    toy = Family(name="toy", loader="test:load", presets=(Preset(name="toy", source=release),))
    monkeypatch.setattr("comit_bench.tokenizers.registry.FAMILIES", (*FAMILIES, toy))


def pickled(path: Path, content: object) -> bytes:
    torch.save(content, path)
    return path.read_bytes()


@pytest.fixture
def content(tmp_path: Path, server: Server) -> bytes:
    server.content = pickled(tmp_path / "made.pth", {"ema": TENSORS, "args": Namespace(epochs=3)})
    return server.content


# ---------------------------------------------------------------- download


def test_download_is_whole_and_reports_progress(tmp_path: Path, server: Server) -> None:
    server.content = os.urandom(3_000_000)
    seen: list[tuple[int, int | None]] = []
    target = tmp_path / "deep" / "file"
    download(server.url, target, advance=lambda done, total: seen.append((done, total)), pause=0)
    assert target.read_bytes() == server.content
    assert seen[-1] == (3_000_000, 3_000_000) and len(seen) > 1
    assert [p.name for p in target.parent.iterdir()] == ["file"]


def test_a_broken_connection_is_continued(tmp_path: Path, server: Server) -> None:
    server.content, server.break_after = os.urandom(500_000), 200_000
    download(server.url, tmp_path / "file", pause=0)
    assert (tmp_path / "file").read_bytes() == server.content
    assert server.requests == [None, "bytes=200000-"]


def test_a_later_run_continues(tmp_path: Path, server: Server) -> None:
    server.content = os.urandom(500_000)
    (tmp_path / "file.part").write_bytes(server.content[:123_456])
    (tmp_path / "file.part.json").write_text(
        json.dumps({"url": server.url, "version": server.version, "total": 500_000})
    )
    download(server.url, tmp_path / "file", pause=0)
    assert (tmp_path / "file").read_bytes() == server.content
    assert server.requests == ["bytes=123456-"]


@pytest.mark.parametrize("note", [None, "not json", '{"url": "http://elsewhere", "version": "x"}', "[]"])
def test_a_part_of_unknown_origin_is_not_continued(tmp_path: Path, server: Server, note: str | None) -> None:
    server.content = os.urandom(100_000)
    (tmp_path / "file.part").write_bytes(b"z" * 5000)
    if note is not None:
        (tmp_path / "file.part.json").write_text(note)
    download(server.url, tmp_path / "file", pause=0)
    assert (tmp_path / "file").read_bytes() == server.content
    assert server.requests == [None]


def test_a_file_that_changed_meanwhile_starts_anew(tmp_path: Path, server: Server) -> None:
    server.content, server.version = os.urandom(100_000), '"two"'
    (tmp_path / "file.part").write_bytes(b"z" * 5000)
    (tmp_path / "file.part.json").write_text(
        json.dumps({"url": server.url, "version": '"one"', "total": 9000})
    )
    download(server.url, tmp_path / "file", pause=0)
    assert (tmp_path / "file").read_bytes() == server.content


@pytest.mark.parametrize("total", [100_000, 77])
def test_a_part_that_is_complete_needs_no_byte(tmp_path: Path, server: Server, total: int) -> None:
    """The server answers 416: the part is the file, or it is too long and starts anew."""
    server.content = os.urandom(100_000)
    (tmp_path / "file.part").write_bytes(server.content)
    (tmp_path / "file.part.json").write_text(
        json.dumps({"url": server.url, "version": server.version, "total": total})
    )
    download(server.url, tmp_path / "file", pause=0)
    assert (tmp_path / "file").read_bytes() == server.content
    assert server.requests == ["bytes=100000-", *([None] if total == 77 else [])]


def test_servers_without_a_length_work(tmp_path: Path, server: Server) -> None:
    server.content, server.sends_length = os.urandom(100_000), False
    download(server.url, tmp_path / "file", pause=0)
    assert (tmp_path / "file").read_bytes() == server.content


def test_pages_refusals_and_dead_servers_are_told(tmp_path: Path, server: Server) -> None:
    server.content, server.page = b"<html>", True
    with pytest.raises(BenchError, match="web page"):
        download(server.url, tmp_path / "file", pause=0)
    server.status = 404
    with pytest.raises(MissingError, match="404"):
        download(server.url, tmp_path / "file", pause=0)
    server.requests.clear()
    server.status = 503
    with pytest.raises(MissingError, match="503"):
        download(server.url, tmp_path / "file", pause=0)
    assert len(server.requests) == 4
    url = server.url
    server.server_close()
    with pytest.raises(MissingError, match="refused"):
        download(url, tmp_path / "file", pause=0)
    assert not (tmp_path / "file").exists()


def test_no_network_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object, **__: object) -> None:
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", nobody)
    with pytest.raises(MissingError, match="Name or service not known"):
        download("https://www.dropbox.com/x", tmp_path / "file")


# ---------------------------------------------------------------- fetch and convert


def test_fetch_converts_once_and_records_the_checksum(
    release: Release, server: Server, content: bytes, cache: Path, tmp_path: Path
) -> None:
    folder = weights.fetch("TOY")
    assert folder == cache / "weights" / "toy" == weights.stored("toy")
    got = load_file(folder / "model.safetensors")
    assert all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in TENSORS.items())
    assert json.loads((folder / "config.json").read_text()) == {"family": "toy"}
    digest = sha256_file(tmp_path / "made.pth")
    assert json.loads((folder / "source.json").read_text())["checksum"] == digest
    assert json.loads((cache / "weights" / "checksums.json").read_text()) == {server.url: digest}
    assert not (folder / "toy.pth").exists()
    assert weights.fetch("toy") == folder and len(server.requests) == 1


def test_a_file_that_changes_behind_its_link_is_refused(
    release: Release, server: Server, content: bytes, cache: Path, tmp_path: Path
) -> None:
    folder = weights.fetch("toy", keep=True)
    assert (folder / "toy.pth").read_bytes() == content
    for file in folder.iterdir():
        file.unlink()
    server.content = pickled(tmp_path / "other.pth", {"ema": {"a": torch.zeros(1)}})
    with pytest.raises(CorruptFileError, match="the first download had sha256"):
        weights.fetch("toy")
    assert weights.stored("toy") is None and not list(folder.glob("*.pth"))
    server.content = content
    assert weights.fetch("toy") == folder


def test_the_checksum_also_guards_a_mirror(
    release: Release, server: Server, content: bytes, tmp_path: Path
) -> None:
    folder = weights.fetch("toy", url=server.url.replace("rlkey=1", "mirror=1"))
    (folder / "model.safetensors").unlink()
    server.content = pickled(tmp_path / "other.pth", {"ema": {"a": torch.zeros(1)}})
    with pytest.raises(CorruptFileError, match="first download"):
        weights.fetch("toy")


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("evil-was-here",)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("truncated", "truncated or of another format"),
        ("text", "truncated or of another format"),
        ("code", "mkdir"),
        ("foreign", "no toy"),
    ],
)
def test_bad_files_are_refused_and_not_kept(
    release: Release,
    server: Server,
    content: bytes,
    kind: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    bad: object = {"ema": {"b": torch.zeros(1)}} if kind == "foreign" else {"ema": TENSORS, "args": Evil()}
    server.content = {"truncated": content[:-200], "text": b"hello"}.get(kind) or pickled(
        tmp_path / "bad.pth", bad
    )
    for keep in (False, True):
        with pytest.raises((CorruptFileError, UsageError), match=says):
            weights.fetch("toy", keep=keep)
        assert not (tmp_path / "evil-was-here").exists()
        assert weights.stored("toy") is None
        assert not list((tmp_path / "cache" / "weights" / "toy").glob("*.pth"))
    server.content = content  # the wrong file was first, and does not block the right one
    assert weights.fetch("toy") == tmp_path / "cache" / "weights" / "toy"


def test_tensors_that_share_memory_are_copied(release: Release, tmp_path: Path) -> None:
    base = torch.arange(4.0)
    file = tmp_path / "x.pth"
    torch.save({"ema": {"a": base, "view": base[:2], "odd": torch.arange(6.0).view(2, 3).t()}}, file)
    got = load_file(weights.convert("toy", file, output=tmp_path / "out") / "model.safetensors")
    assert got["view"].tolist() == [0, 1] and got["odd"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_hub_releases_go_through_the_hub(
    release: Release, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    know(monkeypatch, replace(release, url=None, hub="somebody/toys"))
    asked: list[Any] = []

    def hub(repository: str, names: Any, **_: Any) -> Path:
        asked.append((repository, tuple(names)))
        (tmp_path / "toy.pth").write_bytes(content)
        return tmp_path

    monkeypatch.setattr("comit_bench.tokenizers.hub.fetch", hub)
    folder = weights.fetch("toy")
    assert asked == [("somebody/toys", ("toy.pth",))]
    assert (tmp_path / "toy.pth").exists() and (folder / "model.safetensors").exists()


def test_links_are_those_that_send_the_file() -> None:
    releases = [item.source for item in downloads() if isinstance(item.source, Release)]
    assert len({r.url for r in releases if r.url}) == len([r for r in releases if r.url]) == 7
    for release in releases:
        assert bool(release.url) != bool(release.hub)
        assert all(callable(resolve(t)) for t in (release.unpack, release.config, release.check) if t)
        if release.url and "dropbox.com" in release.url:
            assert release.url.startswith("https://") and release.url.endswith("&dl=1")
    with pytest.raises(UsageError, match="Did you mean 'alit-small'"):
        find_release("alit-smal")


# ---------------------------------------------------------------- command line


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["weights", *arguments])


def test_commands(release: Release, server: Server, content: bytes, cache: Path, tmp_path: Path) -> None:
    listing = run("ls")
    assert listing.exit_code == 0 and "toy" in listing.stdout and "missing" in listing.stdout
    done = run("fetch", "toy", "--quiet")
    assert done.exit_code == 0 and done.stdout.strip() == str(cache / "weights" / "toy")
    assert "here" in run("ls").stdout
    out = run("convert", "toy", str(tmp_path / "made.pth"), "--output", str(tmp_path / "out"))
    assert out.exit_code == 0 and (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("fetch", "kmeans-patch"), UsageError, "has no released weights"),
        (("fetch", "nonesuch"), UsageError, "unknown tokenizer"),
        (("fetch", "a", "b", "--url", "http://x"), UsageError, "one NAME"),
        (("fetch", "comit-l", "--url", "http://x"), UsageError, "from the hub"),
        (("convert", "alit-small", "gone.pth"), MissingError, "gone.pth"),
        (("convert", "alit-smal", "gone.pth"), UsageError, "Did you mean"),
    ],
)
def test_wrong_commands_say_what_is_wrong(
    arguments: tuple[str, ...], error: type[Exception], says: str
) -> None:
    done = run(*arguments)
    assert isinstance(done.exception, error)
    assert says in str(done.exception)


@pytest.mark.network
def test_a_released_link_answers(tmp_path: Path) -> None:
    """Fetches the smallest released file and its checksum; needs the internet and 2 GB."""
    folder = weights.fetch("alit-base")
    assert (folder / "model.safetensors").stat().st_size > 9e8
