"""Images per second of encoding and decoding, by preset, type and number of images at once.

Weights are random and drawn on the device: speed does not depend on what they say. Pixel decoders are not
compiled. Bytes go in on the host and stay on the device on the way out, as in a run.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from common import Day, in_one_line
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# The most wanted first: what does not fit into the time is named at the end.
PRESETS = (
    "comit-b", "comit-l", "comit-xl", "titok-l-32", "flextok-d18-d28", "selftok-512", "alit-small",
    "comit-nano", "titok-b-64", "titok-s-128", "titok-bl-64", "titok-bl-128", "titok-sl-256",
    "flextok-d12-d12", "flextok-d18-d18", "alit-base", "alit-semilarge", "selftok-1024", "vq-grid-nano",
    "titok-nano",
)  # fmt: skip
SIZES = (8, 64)
SLOW = 8.0  # seconds that a measurement may be expected to take
DRAWS = (Tensor.normal_, Tensor.uniform_)


class WithoutDrawing(TorchFunctionMode):
    """Initialisation draws nothing: a minute of one core for a large network."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in DRAWS else func(*args, **(kwargs or {}))


def load(day: Day, name: str) -> Any:
    """The adapter of a preset with random weights, drawn where they are needed."""
    from comit_bench.tokenizers.load import load_tokenizer
    from comit_bench.tokenizers.registry import find_tokenizer

    options = {"compile": "off"} if "compile" in (find_tokenizer(name).known_options() or ()) else {}
    with WithoutDrawing():
        where: dict[str, Any] = {"device": str(day.device), "offline": True}
        tokenizer: Any = load_tokenizer(name, weights="random", **where, **options)
    network: nn.Module = tokenizer.model
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
            else:
                parameter.nan_to_num_(0.0, 0.0, 0.0).clamp_(-1.0, 1.0)
    return tokenizer


def measure(day: Day, tokenizer: Any, size: int, what: str) -> dict[str, Any]:
    """Rate and memory of one direction, ``size`` images at once."""
    from comit_bench.tokenizers.base import tile_rows

    side = tokenizer.info.resolution
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8)
    generators = [torch.Generator().manual_seed(n) for n in range(size)]
    token = tile_rows.set(size)
    try:
        tokens = tokenizer.encode(images, generators=generators)
        if day.on_gpu:
            torch.cuda.reset_peak_memory_stats(day.device)
        calls = {
            "encode": lambda: tokenizer.encode(images, generators=generators),
            "decode": lambda: tokenizer.decode(tokens, seeds=range(size)),
        }
        seconds = day.best_of(calls[what], budget=1.0, rounds=4)
    finally:
        tile_rows.reset(token)
    peak = torch.cuda.max_memory_allocated(day.device) / 2**30 if day.on_gpu else None
    return {"images_per_s": size / seconds, "seconds": seconds, "peak_gib": peak}


def both_ways(day: Day, tokenizer: Any, name: str) -> None:
    """All sizes and types of one preset, bfloat16 and small batches first."""
    for dtype in (torch.bfloat16, torch.float32) if day.on_gpu else (torch.float32,):
        tokenizer.dtype = dtype
        for what in ("encode", "decode"):
            expected = 0.0
            for size in (2,) if day.tiny else SIZES:
                if day.left < 4 or expected > SLOW:
                    break
                before = time.monotonic()
                facts = {"name": name, "what": what, "dtype": str(dtype)[6:], "batch": size}
                day.attempt(facts, partial(measure, day, tokenizer, size, what))
                expected = (time.monotonic() - before) * SIZES[-1] / SIZES[0] / 4


def run(day: Day) -> None:
    """The most wanted presets first."""
    names = ("vq-grid-nano",) if day.tiny else PRESETS
    for number, name in enumerate(names):
        if day.left < 8:
            day.write(what="left out for want of time", names=list(names[number:]))
            return
        try:
            tokenizer = load(day, name)
        except Exception as error:
            day.write(name=name, error=in_one_line(error))
            continue
        both_ways(day, tokenizer, name)
