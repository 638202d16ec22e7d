"""``comit-bench cost``: arithmetic and processor time of every tokenizer with a network, as Markdown.

Its output is ``results/reference/cost.md``, and a test compares that file with a fresh count. Random weights:
arithmetic does not depend on them.

FLOPs are counted on the meta device, where a network of any size costs neither memory nor time, through the
adapters themselves, so what is counted is what runs. Processor time is that of one thread and one image.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from comit_bench.errors import UsageError, did_you_mean
from comit_bench.tokenizers.base import TILE, Tokenizer, Tokens, tile_rows
from comit_bench.tokenizers.load import load_tokenizer
from comit_bench.tokenizers.registry import TokenizerEntry, builtin

# Further rows of a preset: settings that change its cost by much.
VARIANTS: dict[str, dict[str, Any]] = {
    "selftok-512": {"decoder": "renderer"},
    "selftok-1024": {"decoder": "renderer"},
}
REPEATS = 3
LONG = 10.0  # seconds; what takes longer is run twice
FEW = 2  # steps of a sampler whose whole run takes too long
HEAD = (
    *("preset", "parameters", "K", "settings"),
    *("GFLOP encode", "GFLOP decode", "CPU s encode", "CPU s decode"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one image costs.

    Attributes:
        name: Row of the table: the preset, and the option that the row is about.
        parameters: Of the tokenizer itself, without a frozen VAE.
        tokens: K.
        settings: What the numbers depend on, in words.
        encode: GFLOP.
        decode: GFLOP.
        weights_gb: Size of all weights in float32, VAE included.
    """

    name: str
    parameters: int
    tokens: int
    settings: str
    encode: float
    decode: float
    weights_gb: float

    @property
    def network(self) -> tuple[object, ...]:
        """Equal for presets that differ in their weights alone: they cost the same."""
        return (self.parameters, self.tokens, self.settings, self.encode, self.decode, self.weights_gb)


def presets() -> list[tuple[TokenizerEntry, dict[str, Any]]]:
    """Every built-in tokenizer with a network of its own, and its variants."""
    rows: list[tuple[TokenizerEntry, dict[str, Any]]] = []
    for entry in builtin().values():
        if entry.family.takes_weights and entry.preset.parameters is not None:
            rows.append((entry, {}))
            rows += [(entry, VARIANTS[entry.name])] if entry.name in VARIANTS else []
    return rows


def label(entry: TokenizerEntry, options: dict[str, Any]) -> str:
    """``selftok-512 decoder=renderer``."""
    return " ".join([entry.name, *(f"{key}={value}" for key, value in options.items())])


def _settings(tokenizer: Any, entry: TokenizerEntry) -> str:
    """Policy, iterations, steps and guidance, as far as a tokenizer has them."""
    words = ["one global crop"] if entry.looks_at_crops() else []
    if hasattr(tokenizer, "iterations"):
        words.append(f"{tokenizer.iterations} iterations")
    sampling = getattr(tokenizer, "sampling", tokenizer)
    steps, guidance = getattr(sampling, "steps", None), getattr(sampling, "guidance", None)
    if getattr(tokenizer, "schedule", steps) is None:  # a decoder of one pass
        steps = None
    if steps is not None:
        words.append(f"{steps} steps")
    if guidance is not None:
        words.append(f"guidance {getattr(guidance, 'weight', guidance):g}")
    return ", ".join(words) or "–"


def _tile(tokenizer: Tokenizer) -> Tensor:
    """Images on the meta device, as many as every adapter computes at once."""
    side = tokenizer.info.resolution
    return torch.zeros(TILE, 3, side, side, dtype=torch.uint8, device="meta")


def count(entry: TokenizerEntry, options: dict[str, Any]) -> Cost:
    """FLOPs per image, in the tiles of 8 images that every adapter computes in."""
    tokenizer: Any = load_tokenizer(entry.name, weights="random", device="meta", offline=True, **options)
    images = _tile(tokenizer)
    encode, tokens = gflop(lambda: tokenizer.encode(images))
    decode, _ = gflop(lambda: tokenizer.decode(tokens, seeds=range(TILE)))
    return Cost(
        name=label(entry, options),
        parameters=tokenizer.info.parameters,
        tokens=tokenizer.info.message_length,
        settings=_settings(tokenizer, entry),
        encode=encode,
        decode=decode,
        weights_gb=4e-9 * sum(value.numel() for value in tokenizer.model.state_dict().values()),
    )


def _least(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of the fastest of ``REPEATS`` runs, of two when they take long, and the result.

    Never of the first alone: it makes what is kept for all later images (modulations that none enters).
    """
    best, result = float("inf"), None
    for run in range(REPEATS):
        if run > 1 and best > LONG:
            break
        started = time.process_time()
        result = work()
        best = min(best, time.process_time() - started)
    return best, result


def gflop(work: Callable[[], Any]) -> tuple[float, Any]:
    """GFLOP per image of the second run, see :func:`_least`, and the result."""
    work()
    with FlopCounterMode(display=False) as counter:
        result = work()
    return counter.get_total_flops() / TILE / 1e9, result


def encode_gflop(tokenizer: Tokenizer, policy: str) -> float:
    """Of one image under a cropping policy, for a tokenizer on the meta device."""
    streams, images = [torch.Generator() for _ in range(TILE)], _tile(tokenizer)
    return gflop(lambda: tokenizer.encode(images, policy=policy, generators=streams))[0]


def step_gflop(tokenizer: Any) -> float:
    """What an adaptive policy spends between two crops: COMiT's one-step decoding of what it has sent."""
    info, noise = tokenizer.info, torch.stack([tokenizer.noise(0)] * TILE)
    codes = torch.empty(TILE, info.message_length, info.code_dim)
    return gflop(lambda: tokenizer.one_step(codes, torch.zeros(TILE, 2), noise))[0]


def rate() -> float:
    """float32 GFLOP per processor second of a large product."""
    a = torch.ones(1024, 1024)
    return float(2 * 1.024**3 / _least(lambda: a @ a)[0])


def measure(
    entry: TokenizerEntry, options: dict[str, Any], cost: Cost, *, limit: float, memory: float
) -> tuple[float | str, float | str]:
    """Processor seconds of encoding and decoding one image, or why they were not measured.

    Images that take longer than ``limit`` seconds and weights of more than ``memory`` GB are not run.
    """
    if cost.weights_gb > memory:
        return (f"not run: {cost.weights_gb:.0f} GB of weights",) * 2
    speed, late = rate(), "not run: would take about {:.0f} s"
    if cost.encode / speed > limit:
        return (late.format(cost.encode / speed), "not run: needs the tokens")
    tokenizer = load_tokenizer(entry.name, weights="random", device="cpu", offline=True, **options)
    side = tokenizer.info.resolution
    drawn = torch.randint(0, 256, (1, 3, side, side), generator=torch.Generator().manual_seed(0))
    token = tile_rows.set(1)
    try:
        encode, tokens = _least(lambda: tokenizer.encode(drawn.to(torch.uint8)))
        expected = cost.decode * encode / cost.encode
        if expected > limit:
            return encode, _from_few_steps(tokenizer, tokens, entry, options, cost) or late.format(expected)
        return encode, _least(lambda: tokenizer.decode(tokens, seeds=[0]))[0]
    finally:
        tile_rows.reset(token)


def _from_few_steps(
    tokenizer: Any, tokens: Tokens, entry: TokenizerEntry, options: dict[str, Any], cost: Cost
) -> str | None:
    """Processor seconds of a slow sampler: those of ``FEW`` steps, times the ratio of the FLOPs.

    Steps may differ in cost (SelfTok sees more tokens in some), hence FLOPs and not the number of steps. The
    first run is not counted, see :func:`_least`. None for a decoder without steps.
    """
    sampling = getattr(tokenizer, "sampling", None)
    steps = getattr(sampling or tokenizer, "steps", None)
    if steps is None or steps <= FEW:
        return None
    few = count(entry, {**options, "steps": FEW}).decode
    if sampling is None:
        tokenizer.steps = FEW
    else:
        tokenizer.sampling = replace(sampling, steps=FEW)
    tokenizer.decode(tokens, seeds=[0])
    started = time.process_time()
    tokenizer.decode(tokens, seeds=[0])
    seconds = (time.process_time() - started) * cost.decode / few
    return f"{_number(seconds)} (from {FEW} of {steps} steps)"


def _number(value: float | str) -> str:
    """Three digits that count."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def chosen(names: Sequence[str]) -> list[tuple[TokenizerEntry, dict[str, Any]]]:
    """The rows of these presets; no name means all."""
    rows = presets()
    known = {entry.name for entry, _ in rows}
    for name in names:
        if name.lower() not in known:
            raise UsageError(f"no preset with a network is called {name!r}.{did_you_mean(name, known)}")
    wanted = {name.lower() for name in names} or known
    return [(entry, options) for entry, options in rows if entry.name in wanted]


def table(
    names: Sequence[str] = (), *, limit: float = 120.0, memory: float = 24.0, timed: bool = True
) -> Iterator[str]:
    """The lines of the table, each as soon as it is known.

    Args:
        names: Presets; none means all.
        limit: Seconds that one image may take.
        memory: GB that weights may take.
        timed: Whether processor time is measured at all.
    """
    rows = chosen(names)
    torch.set_num_threads(1)
    yield _line(HEAD)
    yield "| :-- | --: | --: | :-- | --: | --: | --: | --: |"
    seen: dict[tuple[object, ...], tuple[float | str, float | str]] = {}
    for entry, options in rows:
        cost = count(entry, options)
        seconds: tuple[float | str, float | str] = ("–", "–")
        if timed:
            if cost.network not in seen:
                seen[cost.network] = measure(entry, options, cost, limit=limit, memory=memory)
            seconds = seen[cost.network]
        size = [f"{cost.parameters / 1e6:,.2f} M", str(cost.tokens), cost.settings]
        numbers = (cost.encode, cost.decode, *seconds)
        yield _line([cost.name, *size, *map(_number, numbers)])


def heading(command: str) -> str:
    """What stands above the table: how it was made, and on what."""
    today = time.strftime("%Y-%m-%d")
    return (
        "# Cost of one image\n\n"
        "Not scores, so no record: what encoding and decoding one image costs with every preset that has a\n"
        "network. Random weights, default settings, float32. Made by\n\n"
        f"    {command}\n\n"
        f"{today}, torch {torch.__version__}, one thread of {_processor()}.\n\n"
        "- GFLOP: torch's counter on the meta device, through the adapters, VAE and pixel decoder included;\n"
        "  per image of a tile of 8, as the benchmark computes: what a tile shares is counted once, what is\n"
        "  computed once for all images (modulations that no image enters) is not.\n"
        f"- CPU s: processor time of one image alone, the least of {REPEATS} runs; of two where they take\n"
        f"  longer than {LONG:g} s. Presets of one network share one measurement. Where decoding takes\n"
        f"  too long, {FEW} steps are run and scaled by GFLOP, which the cell says.\n"
        "- parameters: of the tokenizer, without a frozen VAE. K: tokens per image. Options that are no\n"
        "  default stand beside the name.\n"
    )


def _processor() -> str:
    """The processor's own name where the system tells it."""
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(names: Sequence[str], *, limit: float, memory: float, timed: bool) -> None:
    """Print heading and table to stdout, line by line."""
    for option, value in (("--limit", limit), ("--memory", memory)):
        if not 0 < value < float("inf"):
            raise UsageError(f"{option} {value}: expected a number above 0")
    command = " ".join(["OMP_NUM_THREADS=1 comit-bench cost", *names])
    chosen(names)  # a wrong name fails before anything is printed
    sys.stdout.write(heading(command) + "\n")
    for line in table(names, limit=limit, memory=memory, timed=timed):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
