"""--device: what is not supported, and a CUDA that is absent or half there, is told at the start."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from comit_bench.commands.app import app
from comit_bench.errors import UsageError
from comit_bench.tokenizers.load import load_tokenizer, resolve_device
from comit_bench.train.setup import check_device

WRONG = (
    *(
        "mps",
        "meta",
        "xpu",
        "hpu",
        "cuda:-1",
        "cuda:x",
        "cuda:",
        "cuda:01",
        "cuda:1.5",
        "cuda: 0",
        "cuda:99999",
    ),
    *(
        "",
        " ",
        "cpu ",
        " cpu",
        "CPU",
        "Cuda",
        "AUTO",
        "cpu:0",
        "gpu",
        "cuda:0,1",
        "cuda\n",
        "None",
        "x" * 500,
    ),
)


@pytest.mark.parametrize("name", WRONG)
def test_other_devices_are_refused_with_those_that_are_supported(name: str) -> None:
    with pytest.raises(UsageError, match="supported are auto, cpu, cuda and cuda:N") as caught:
        resolve_device(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 350


@given(st.text(max_size=12) | st.from_regex(r"cuda:?[-\d ]{0,4}", fullmatch=True))
@example("cuda:٣")
def test_any_text_is_a_device_or_one_clear_line(name: str) -> None:
    try:
        assert resolve_device(name).type in ("cpu", "cuda")
    except UsageError as error:
        assert "--device" in str(error)


COMMANDS: dict[str, list[str]] = {
    "run": ["run", "--tokenizer", "comit-nano", "--dry-run"],
    "paper": ["paper", "--dry-run"],
    "sweep": ["sweep", "--steps", "1", "--limit", "2"],
    "tokenize": ["tokenize", "IMAGES", "--out", "OUT", "--tokenizer", "vq-grid-nano"],
    "figure": ["figure", "reconstruction", "--tokenizer", "vq-grid-nano"],
    "train": ["train", "--config", "comit-nano", "--dry-run"],
    "train a small network": ["train", "--config", "titok-nano", "--dry-run"],
}


@pytest.mark.parametrize("device", ["mps", "meta", ""])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_them(
    command: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    names = {"IMAGES": str(tmp_path / "images"), "OUT": str(tmp_path / "out.safetensors")}
    done = CliRunner().invoke(app, [*(names.get(a, a) for a in COMMANDS[command]), "--device", device])
    assert isinstance(done.exception, UsageError), done.output
    assert "--device" in str(done.exception) and "supported are" in str(done.exception)


def torch_with(
    monkeypatch: pytest.MonkeyPatch, *, built: bool = True, count: int = 0, works: bool = True
) -> None:
    """A torch that was built with CUDA, or not, on a machine with some devices."""
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda="12.4" if built else None, hip=None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: built and count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    def ones(*_: Any, **__: Any) -> Any:
        if not works:
            raise RuntimeError("CUDA error: the driver is too old\nmore")
        return torch.zeros(1)

    monkeypatch.setattr(torch, "ones", ones)


@pytest.mark.parametrize(
    ("situation", "device", "says"),
    [
        ({"built": False}, "cuda", "built without CUDA.*--device cpu or auto"),
        ({"count": 0}, "cuda:0", r"no usable CUDA device \(CUDA_VISIBLE_DEVICES is '7'\)"),
        ({"count": 1}, "cuda:1", "there is only cuda:0"),
        ({"count": 4}, "cuda:99", "there are only cuda:0 to cuda:3"),
        ({"count": 1, "works": False}, "cuda", r"does not work \(CUDA error: the driver is too old\)"),
        ({"count": 1, "works": False}, "auto", r"does not work .*Use --device cpu\."),
    ],
)
def test_a_cuda_that_is_absent_or_half_there(
    situation: dict[str, Any], device: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    torch_with(monkeypatch, **situation)
    with pytest.raises(UsageError, match=says):
        resolve_device(device)
    with pytest.raises(UsageError, match=says):
        load_tokenizer("vq-grid-nano", device=device)
    if ":" not in device:
        from comit_bench.train.config import load_config

        with pytest.raises(UsageError, match=says):
            check_device(load_config("comit-nano"), device)


def test_what_is_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_with(monkeypatch, count=2)
    assert [str(resolve_device(name)) for name in ("auto", "cpu", "cuda", "cuda:1")] == [
        *("cuda", "cpu", "cuda", "cuda:1")
    ]
    torch_with(monkeypatch, count=0)
    assert str(resolve_device("auto")) == "cpu"


def test_meta_is_for_counting_random_weights_in_python_only() -> None:
    assert load_tokenizer("vq-grid-nano", weights="random", device="meta").device.type == "meta"  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="supported are"):
        load_tokenizer("vq-grid-nano", device="meta")
