"""Ids on this device against the recorded ones (parity cases) and the CPU's (networks that ship).

Three ways each: float32 (TF32 off), TF32, bfloat16 autocast. Shares of ids that differ.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Day
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("comit-nano", "titok-nano", "vq-grid-nano")


@contextmanager
def precision(day: Day, name: str) -> Iterator[None]:
    """Inside, networks compute in ``float32``, ``tf32`` or ``bfloat16``."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = name == "tf32"
    try:
        with torch.no_grad(), torch.autocast(day.device.type, torch.bfloat16, enabled=name == "bfloat16"):
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def ways(day: Day) -> tuple[str, ...]:
    """A CPU has no TF32."""
    return ("float32", "tf32", "bfloat16") if day.on_gpu else ("float32", "bfloat16")


def share(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Share of ids that differ, and how many there are."""
    wrong = sum(int((a.cpu() != b.cpu()).sum()) for a, b in pairs)
    total = sum(a.numel() for a, _ in pairs)
    return {"differ": wrong / max(total, 1), "ids": total}


def of_case(day: Day, folder: Path, name: str) -> dict[str, Any]:
    """One parity case in one precision."""
    from parity import open_case

    case = open_case(folder, day.device)
    with precision(day, name):
        return share(list(case.ids().values()))


def of_shipped(day: Day, name: str, how: str, images: Tensor) -> dict[str, Any]:
    """One network with trained weights, scenes, whole images; the CPU's float32 ids are right."""
    from comit_bench.tokenizers.comit.codec import encode
    from comit_bench.tokenizers.comit.crops import CropPolicy
    from comit_bench.tokenizers.load import load_tokenizer

    def ids(device: str) -> Tensor:
        tokenizer: Any = load_tokenizer(name, device=device)
        pixels = images.to(device).float().div(255)
        if name.startswith("comit"):
            whole = CropPolicy(global_crop=True, num_crops=1)
            return encode(tokenizer.model, pixels.sub(0.5).div(0.5), whole).ids
        found: Tensor = tokenizer.model.encode(pixels)[0]
        return found

    with torch.no_grad():
        right = ids("cpu")
    with precision(day, how):
        return share([(ids(str(day.device)), right)])


def run(day: Day) -> None:
    """Cases first: they were recorded from the released programs."""
    from parity import family_of, find_cases

    from comit_bench.data.scenes.digits import paint
    from comit_bench.recipes.specs import GeneratorSpec

    given = os.environ.get("COMIT_BENCH_PARITY")
    roots = (
        [Path(part) for part in given.split(os.pathsep)] if given else [ROOT / "tests" / "parity" / "cases"]
    )
    folders = [folder for root in roots for folder in find_cases(root)]
    for folder in folders[:1] if day.tiny else folders:
        for how in ways(day):
            what = {"name": f"{family_of(folder)}/{folder.name}", "against": "recorded", "precision": how}
            day.attempt(what, partial(of_case, day, folder, how))
    count = 4 if day.tiny else 256
    painted = paint(GeneratorSpec(layout="recognition", image_size=32), "val", range(count)).images
    images = torch.from_numpy(painted).permute(0, 3, 1, 2).contiguous()
    for name in SHIPPED[:1] if day.tiny else SHIPPED:
        for how in ways(day):
            what = {"name": name, "against": "CPU float32", "precision": how}
            day.attempt(what, partial(of_shipped, day, name, how, images))
