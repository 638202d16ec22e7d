"""Memory that runs out: one message that says what to lower, and other work goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_images, write_recipes

from comit_bench import evaluate, load_tokenizer
from comit_bench.errors import BenchError, UnsupportedOperation, UsageError, memory_runs_out
from comit_bench.train.config import load_config
from comit_bench.train.loop import Trainer

CUDA = (
    "CUDA out of memory. Tried to allocate 64.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 12.00 "
    "GiB is free. Including non-PyTorch memory, this process has 67.10 GiB memory in use.\nMore lines"
)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError(CUDA), r"out of memory \(CUDA out of memory. Tried.*64.00 GiB\). Do"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "allocate"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), r"error: out of memory\)"),
        (MemoryError(), "of this machine"),
    ],
)
def test_it_is_one_message(error: Exception, says: str) -> None:
    with pytest.raises(BenchError, match=says) as caught, memory_runs_out("Do less."):
        raise error
    assert "\n" not in str(caught.value) and caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes differ"),
        UnsupportedOperation("no decoder"),
        UsageError("out of memory"),
        KeyError(),
    ],
)
def test_everything_else_passes(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory_runs_out("Do less."):
        raise error
    assert caught.value is error


def test_an_evaluation_goes_on_with_the_next_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path)
    write_recipes(tmp_path, seeds=1)
    tokenizer: Any = load_tokenizer("pixel-oracle", device="cpu")

    monkeypatch.setattr(
        tokenizer, "encode", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError(CUDA))
    )
    settings: dict[str, Any] = dict(
        include=(tmp_path,),
        data_root=tmp_path,
        cache=tmp_path / "cache",
        output=tmp_path / "out",
        progress=False,
    )
    with pytest.raises(BenchError, match=r"out of memory.*--dtype bfloat16.*the same command continues"):
        evaluate(tokenizer, ["tiny-colours"], **settings)
    monkeypatch.undo()
    assert evaluate(tokenizer, ["tiny-colours"], **settings)[-1].complete


def test_training_says_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("global_batch=8", "device_batch=4", "data.count=20", "data.val_count=2", f"output={tmp_path}")
    for extra, also in ((), "activation_checkpointing=true"), (("activation_checkpointing=true",), None):
        run = load_config("comit-nano-no-srepa", (*settings, *extra, "optim.name=adam"))
        trainer = Trainer(run, device="cpu", progress=False)
        monkeypatch.setattr(trainer, "module", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError(CUDA)))
        with pytest.raises(BenchError, match=r"Lower device_batch \(now 4") as caught:
            trainer.fit()
        assert (also is None) == ("or set" not in str(caught.value))
