"""What the machine is, what is missing on it, and its two rates: matrix products and memory."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from common import Day

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("pytest", "hypothesis")


def missing_packages() -> list[str]:
    """Requirements of pyproject.toml that are not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.match(r"[A-Za-z0-9._-]+", text) for text in (*project["dependencies"], *TESTS)]
    found = []
    for name in (match[0] for match in names if match):
        try:
            version(name)
        except PackageNotFoundError:
            found.append(name)
    return found


def driver() -> str:
    """Version of the NVIDIA driver, or why it is not known."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"


def commit() -> str:
    """Of the checkout, where git knows."""
    try:
        asked = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            timeout=20,
        )
        return asked.stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def rates(day: Day) -> dict[str, float]:
    """FLOP/s of one large matrix product per type, and bytes/s of a copy on the device."""
    from train_step import matrix_rate

    side = 256 if day.tiny else 8192
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        found[f"{name}_flops"] = matrix_rate(day.device, dtype, side)
    if day.on_gpu:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        found["tf32_flops"] = matrix_rate(day.device, torch.float32, side)
        torch.backends.cuda.matmul.allow_tf32 = before
    size = (1 << 16) if day.tiny else (1 << 30)
    source = torch.zeros(size, dtype=torch.uint8, device=day.device)
    target = torch.empty_like(source)
    seconds = day.best_of(lambda: target.copy_(source), budget=1.0)
    found["copy_bytes_per_s"] = 2 * source.numel() / seconds
    return found


def run(day: Day) -> None:
    """Write facts first: they are needed to read everything else."""
    gpu = torch.cuda.get_device_properties(day.device) if day.on_gpu else None
    day.write(
        what="machine",
        device=gpu.name if gpu else f"CPU with {os.cpu_count()} cores",
        memory_gib=round(gpu.total_memory / 2**30, 1) if gpu else None,
        driver=driver() if gpu else None,
        cuda=torch.version.cuda,
        torch=torch.__version__,
        python=platform.python_version(),
        commit=commit(),
        missing=missing_packages(),
        tiny=day.tiny,
    )
    day.attempt({"what": "rates"}, lambda: rates(day))
