"""What ``doctor``, ``ls tokenizers`` and ``weights ls`` say about weights, and the commands they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from comit_bench.commands.app import app
from comit_bench.tokenizers.family import Hub
from comit_bench.tokenizers.presence import command, hub_state, weights_state
from comit_bench.tokenizers.registry import builtin, downloads, find_tokenizer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and an empty cache of ours."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "hub"


def put(hub: Path, repository: str, *names: str) -> Path:
    """Files as the hub's client leaves them."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("c0ffee")
    for name in names:
        path = folder / "snapshots" / "c0ffee" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1")
    return folder


def test_everything_that_can_be_had_is_listed_once(hub: Path) -> None:
    states = {item.name: weights_state(item) for item in downloads()}
    assert len(states) == len(downloads())
    beside = {"selftok-512-renderer", "selftok-1024-renderer", *VAES}
    assert states.keys() == builtin().keys() | beside
    nothing = {name for name, state in states.items() if state == "-"}
    assert nothing == {"vqmodel", "kmeans-patch", "pixel-oracle", "supervised-cnn", "comit-nano-untrained"}
    shipped = {name for name, state in states.items() if state == "yes"}
    assert shipped == {"comit-nano", "comit-nano-no-srepa", "comit-nano-no-local-crops", *NANO}


NANO = ("titok-nano", "vq-grid-nano")
VAES = ("sd-mse-vae", "sd-ema-vae", "flextok-vae", "sd3-vae")


def test_files_in_the_hub_cache_count_when_all_are_there(hub: Path) -> None:
    entry = find_tokenizer("comit-l").preset
    assert weights_state(entry) == "no"
    folder = put(hub, "cvg-unibe/comit-l", "config.json")
    assert weights_state(entry) == "part"
    put(hub, "cvg-unibe/comit-l", "pytorch_model.bin")
    assert weights_state(entry) == "part"  # COMiT has no such file
    put(hub, "cvg-unibe/comit-l", "model.safetensors")
    assert weights_state(entry) == "yes"
    (folder / "snapshots" / "c0ffee" / "config.json").unlink()
    assert weights_state(entry) == "part"


def test_a_download_that_was_begun_is_told(hub: Path) -> None:
    folder = put(hub, "cvg-unibe/comit-b")
    assert hub_state("cvg-unibe/comit-b", ("model.safetensors",)) == "no"
    (folder / "blobs").mkdir()
    (folder / "blobs" / "abc.incomplete").write_bytes(b"1")
    assert hub_state("cvg-unibe/comit-b", ("model.safetensors",)) == "part"


def test_titok_also_has_an_older_file(hub: Path) -> None:
    put(hub, "yucornetto/tokenizer_titok_l32_imagenet", "config.json", "pytorch_model.bin")
    assert weights_state(find_tokenizer("titok-l-32").preset) == "yes"


def test_released_files_are_looked_for_in_our_cache(hub: Path, tmp_path: Path) -> None:
    entry = find_tokenizer("alit-small").preset
    folder = tmp_path / "cache" / "weights" / "alit-small"
    folder.mkdir(parents=True)
    assert weights_state(entry) == "no"
    (folder / "alit.pth.part").write_bytes(b"1")
    assert weights_state(entry) == "part"
    for name in ("model.safetensors", "source.json"):
        (folder / name).write_bytes(b"1")
    assert weights_state(entry) == "yes"


def test_doctor_names_the_command_for_every_family(hub: Path) -> None:
    put(hub, "cvg-unibe/comit-l", "config.json", "model.safetensors")
    put(hub, "cvg-unibe/comit-b", "config.json")
    text = CliRunner().invoke(app, ["doctor"]).output
    lines = [line.strip() for line in text.splitlines()]
    for name in ("comit-xl", "titok-l-32", "flextok-d12-d12", "alit-base", "selftok-512-renderer"):
        (line,) = [line for line in lines if line.startswith(f"{name}:")]
        assert line.startswith(f"{name}: missing  comit-bench weights fetch {name}  (from "), line
    assert "comit-l: ok       in the cache, from hub cvg-unibe/comit-l" in lines
    assert any(line.startswith("comit-b: begun    comit-bench weights fetch comit-b") for line in lines)
    assert "titok-nano: ok       ships with the package" in lines
    (vae,) = [line for line in lines if line.startswith("sd3-vae (VAE of SelfTok)")]
    assert "comit-bench weights fetch sd3-vae  (from hub stabilityai/" in vae
    listing = CliRunner().invoke(app, ["weights", "ls"]).stdout.splitlines()
    states = {line.split()[0]: line.split()[1] for line in listing}
    assert (states["comit-l"], states["comit-b"], states["sd3-vae"]) == ("here", "downloading", "missing")
    assert "titok-nano" not in states


def test_every_command_that_is_named_is_understood(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def of_hub(repository: str, names: Any, **_: Any) -> Path:
        asked[repository] = tuple(names)
        return Path("somewhere")

    monkeypatch.setattr("comit_bench.tokenizers.hub.fetch", of_hub)
    monkeypatch.setattr("comit_bench.tokenizers.weights.fetch", lambda name, **_: asked.update({name: ()}))
    missing = [item for item in downloads() if weights_state(item) == "no"]
    for item in missing:
        words = command(item).split()
        assert words[0] == "comit-bench"
        assert CliRunner().invoke(app, words[1:]).exit_code == 0, words
        place = item.source.repository if isinstance(item.source, Hub) else item.name
        assert place in asked, words
    assert len(asked) == len(missing) >= 24
    assert asked["stabilityai/sd-vae-ft-mse"] == ("config.json", "diffusion_pytorch_model.safetensors")
    assert asked["stabilityai/stable-diffusion-3-medium-diffusers"][0] == "vae/config.json"
    done = CliRunner().invoke(app, ["weights", "fetch", "sd3-vae", "--url", "http://x"])
    assert "from the hub" in str(done.exception)
