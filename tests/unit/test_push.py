"""Uploading: what is refused before the network is asked, what goes up, and what a failure says."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner
from versions import needs_muon

from comit_bench.commands import train as command
from comit_bench.commands.app import app
from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError
from comit_bench.tokenizers import push as hub
from comit_bench.tokenizers.comit.checkpoint import build, save
from comit_bench.tokenizers.comit.model import ComitSpec, CropGeometry
from comit_bench.train.config import load_config

FILES = ("README.md", "config.json", "curves.png", "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a card, a picture, and things that must stay here."""
    spec = ComitSpec(
        depth=1, width=16, heads=2, message_length=4, fsq_levels=(4, 4), max_input_size=32, patch_size=4,
        in_channels=3, out_channels=3, representation_layer=0, vae="none", vae_factor=1,
        geometry=CropGeometry(crop=12, half=16),
    )  # fmt: skip
    model = build(spec)
    model.predictor.init_weights(torch.Generator().manual_seed(0))
    path = tmp_path / "my-tokenizer"
    save(model, path)
    (path / "README.md").write_text("# card\n")
    (path / "curves.png").write_bytes(b"a picture")
    (path / "notes.txt").write_text("private")
    (path / "sub").mkdir()
    (path / "sub" / "config.json").write_text("{}")
    return path


@pytest.fixture(autouse=True)
def _no_real_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_test")


class FakeApi:
    """Remembers what it was asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error = error

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        return f"https://hub.test/{repo_id}"

    def upload_folder(self, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(("upload_folder", options))


def test_a_folder_goes_up_in_one_commit(folder: Path) -> None:
    upload = hub.prepare(folder, "me/comit-mine")
    assert upload.files == FILES
    assert upload.size == sum((folder / name).stat().st_size for name in FILES)
    api = FakeApi()
    done = hub.push(upload, private=True, api=api)
    assert done.url == "https://hub.test/me/comit-mine"
    (made, options), (sent, files) = api.calls
    assert (made, sent) == ("create_repo", "upload_folder")
    assert options == {"repo_id": "me/comit-mine", "private": True, "exist_ok": True, "repo_type": "model"}
    assert (files["repo_id"], files["folder_path"]) == ("me/comit-mine", str(folder))
    assert files["allow_patterns"] == list(FILES)


@pytest.mark.parametrize("name", ["alone", "a/b/c", "/b", "a/", "a b/c", "a/b--c", "a/..b", "a/b.git", "-/x"])
def test_repository_names_are_checked(folder: Path, name: str) -> None:
    with pytest.raises(UsageError, match="expected USER/NAME"):
        hub.prepare(folder, name)
    with pytest.raises(UsageError, match=r"push_to_hub.*expected USER/NAME"):
        load_config("comit-nano", (f"push_to_hub={name}",))
    assert load_config("comit-nano", ("push_to_hub=me/comit_1.0",)).push_to_hub == "me/comit_1.0"


def test_what_the_loader_refuses_is_refused(folder: Path) -> None:
    with pytest.raises(MissingError, match="no such folder"):
        hub.prepare(folder / "nowhere", "me/x")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:100])
    with pytest.raises(CorruptFileError, match="not a readable safetensors file"):
        hub.prepare(folder, "me/x")
    weights.unlink()
    with pytest.raises(MissingError, match="found neither"):
        hub.prepare(folder, "me/x")
    (folder / "weights.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=r"has no model\.safetensors"):
        hub.prepare(folder, "me/x")
    weights.write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    config["predictor"]["hidden_size"] = 32
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="does not fit"):
        hub.prepare(folder, "me/x")
    (folder / "config.json").unlink()
    with pytest.raises(MissingError, match=r"config\.json"):
        hub.prepare(folder, "me/x")


def test_without_a_card_the_plan_says_so(folder: Path) -> None:
    (folder / "README.md").unlink()
    assert "there is no README.md" in str(hub.prepare(folder, "me/x"))


def test_dry_run_lists_and_asks_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_client", lambda: pytest.fail("the hub was asked"))
    done = CliRunner().invoke(app, ["push", str(folder), "--repo", "me/x", "--dry-run"])
    assert done.exit_code == 0
    for name in FILES:
        assert name in done.output
    assert "notes.txt" not in done.output
    assert "nothing was uploaded" in done.output


def test_without_a_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UsageError, match=r"no token .*hf auth login"):
        hub.push(hub.prepare(folder, "me/x"))


def test_our_own_mistakes_are_not_hidden(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        hub.push(hub.prepare(folder, "me/x"), api=FakeApi(ZeroDivisionError("a bug")))


# ------------------------------------------------- the real client, a hub on this machine


class Hub(BaseHTTPRequestHandler):
    """The few addresses that an upload of small files asks for."""

    status = 200
    address = ""
    stored: dict[str, bytes] = {}
    made: list[dict[str, Any]] = []

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        content = {"id": "me/comit-mine", "sha": "0" * 40, "siblings": [], "name": "me", "tags": []}
        self._answer(content if self.status == 200 else {"error": "no"}, self.status)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            data = b"".join(parts)
        if self.status != 200:
            self._answer({"error": "no"}, self.status)
        elif self.path.endswith("/repos/create"):
            self.made.append(json.loads(data))
            self._answer({"url": f"{self.address}/me/comit-mine", "id": "1", "name": "me/comit-mine"})
        elif "/preupload/" in self.path:
            names = [entry["path"] for entry in json.loads(data)["files"]]
            plain = [{"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for n in names]
            self._answer({"files": plain})
        elif "/commit/" in self.path:
            for line in data.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.stored[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            commit = f"{self.address}/me/comit-mine/commit/{'1' * 40}"
            self._answer({"commitUrl": commit, "commitOid": "1" * 40, "hookOutput": "", "success": True})
        else:
            self._answer({})

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def local_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Hub, "status", 200)
    monkeypatch.setattr(Hub, "stored", {})
    monkeypatch.setattr(Hub, "made", [])
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Hub.address = f"http://127.0.0.1:{server.server_port}"
    yield Hub.address
    server.shutdown()
    thread.join()
    server.server_close()


def client(endpoint: str) -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint, token="hf_test")


def test_the_real_client_uploads_the_bytes(folder: Path, local_hub: str) -> None:
    done = hub.push(hub.prepare(folder, "me/comit-mine"), private=True, api=client(local_hub))
    made = Hub.made[0]  # newer clients send a visibility
    assert made.get("private") is True or made.get("visibility") == "private"
    assert str(done.url).endswith("/me/comit-mine")
    assert {name: (folder / name).read_bytes() for name in FILES} == Hub.stored


@pytest.mark.parametrize(("status", "text"), [(401, "may not write to me"), (403, "refused"), (404, "404")])
def test_the_hub_says_no(
    folder: Path, local_hub: str, monkeypatch: pytest.MonkeyPatch, status: int, text: str
) -> None:
    monkeypatch.setattr(Hub, "status", status)
    with pytest.raises(BenchError, match=text):
        hub.push(hub.prepare(folder, "me/comit-mine"), api=client(local_hub))


def test_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:  # a port at which nobody listens
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(BenchError, match="cannot be reached"):
        hub.push(hub.prepare(folder, "me/x"), api=client(f"http://127.0.0.1:{port}"))
    assert sorted(path.name for path in folder.iterdir())[:2] == ["README.md", "config.json"]


# ------------------------------------------------------------------- after training

TINY = (
    "model.depth=1", "model.width=16", "model.heads=2", "model.message_length=4", "steps=1",
    "model.representation_layer=0", "global_batch=4", "data.count=8", "data.val_count=2",
)  # fmt: skip


@needs_muon
def test_a_failed_upload_after_training_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config("comit-nano", (*TINY, f"output={tmp_path}", "push_to_hub=me/x", "push_private=true"))
    api = FakeApi(ConnectionError("no route"))
    monkeypatch.setattr(hub, "_client", lambda: api)
    assert command._train(config, "cpu", "auto", "a command", progress=False) == 1
    said = capsys.readouterr()
    exported = tmp_path / "comit-nano" / "export" / "comit-nano"
    assert said.out.strip() == str(exported)
    assert "finished and exported" in said.err
    assert f"comit-bench push {exported} --repo me/x --private" in said.err
    assert hub.prepare(exported, "me/x").files == (
        "README.md", "config.json", "curves.png", "model.safetensors", "reconstructions.png",
    )  # fmt: skip
    api.error = None
    assert command._train(config, "cpu", "auto", "a command", progress=False) == 0
    assert api.calls[-1][1]["repo_id"] == "me/x"


@needs_muon
def test_a_run_that_cannot_upload_warns_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    config = load_config("comit-nano", (*TINY, f"output={tmp_path}", "push_to_hub=me/x"))
    assert command._train(config, "cpu", "auto", "a command", progress=False) == 2
    said = capsys.readouterr().err
    assert said.index("warning: push_to_hub is me/x") < said.index("finished and exported")
