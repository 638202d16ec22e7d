"""Probes on CUDA: codes, targets and texts on one device, and no waiting per batch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from cuda_device import Cuda

from comit_bench import evaluate
from comit_bench.probing.fit import Examples, FitTask, MessageSource
from comit_bench.recipes.specs import ProbeSpec

SPEC = ProbeSpec(
    width=32, depth=2, heads=4, batch_size=16, learning_rate=3e-3, max_epochs=8, patience=8, mlp_ratio=1
)


def task(count: int, **changes: object) -> FitTask:
    """Token 0 names the class, the others are noise."""
    g = torch.Generator().manual_seed(0)
    total = count + 60
    targets = torch.randint(0, 4, (total,), generator=g)
    codes = torch.randn(total, 5, 6, generator=g)
    codes[:, 0] = 3 * torch.eye(4, 6)[targets]
    bounds = {"train": (0, count), "early_stop": (count, count + 30), "report": (count + 30, total)}
    parts = {name: Examples(MessageSource(codes=codes[a:b]), targets[a:b]) for name, (a, b) in bounds.items()}
    spec = SPEC.model_copy(update={k: changes.pop(k) for k in list(changes) if k in ProbeSpec.model_fields})
    return FitTask(spec=spec, outputs=4, **parts, **changes)  # type: ignore[arg-type]


def test_a_probe_is_fitted(cuda: Cuda) -> None:
    job = task(120)
    done = job.fit(0, device=cuda.device)
    assert done.outputs is not None and done.outputs.device.type == "cpu"
    assert all(math.isfinite(entry.train_loss) for entry in done.history)
    assert {value.device.type for value in done.state.values()} == {"cpu"}
    if cuda.real:  # a pretended device has no gradients
        right = done.outputs.argmax(1) == job.report.targets  # type: ignore[union-attr]
        assert float(right.float().mean()) > 0.9


@pytest.mark.parametrize("cuda", [pytest.param("real", marks=pytest.mark.gpu)], indirect=True)
def test_a_fit_is_that_of_the_cpu(cuda: Cuda) -> None:
    """Order, initial weights and early stopping are keyed; only rounding differs.

    A pretended device has no gradients.
    """
    job = task(200)
    one, other = job.fit(3, device=cuda.device), job.fit(3, device="cpu")
    assert [e.epoch for e in one.history] == [e.epoch for e in other.history]
    for a, b in zip(one.history, other.history, strict=True):
        assert a.train_loss == pytest.approx(b.train_loss, rel=1e-2, abs=1e-3)
    assert torch.allclose(one.outputs, other.outputs, atol=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("cuda", [pytest.param("real", marks=pytest.mark.gpu)], indirect=True)
def test_rounded_products_score_the_same(cuda: Cuda) -> None:
    """What probes on CUDA compute in; the same on the CPU: ``tests/unit/test_fit.py``."""
    scores = {}
    for precision in ("float32", "bfloat16"):
        job = task(400, precision=precision)
        done = [job.fit(seed, device=cuda.device) for seed in range(3)]
        right = [one.outputs.argmax(1) == job.report.targets for one in done]  # type: ignore[union-attr]
        scores[precision] = float(torch.stack(right).float().mean())
    assert min(scores.values()) > 0.9 and abs(scores["float32"] - scores["bfloat16"]) < 0.03


@pytest.mark.parametrize("cuda", ["pretended"], indirect=True)
def test_rounded_products_answer_in_float32(cuda: Cuda) -> None:
    done = task(60, max_epochs=1, patience=1, precision="bfloat16").fit(0, device=cuda.device)
    assert done.outputs is not None and done.outputs.dtype == torch.float32


@pytest.mark.parametrize("cuda", ["pretended"], indirect=True)
def test_the_number_of_waits_does_not_grow_with_the_batches(cuda: Cuda) -> None:
    """A real device does not count."""
    assert cuda.mode is not None
    counts = []
    for images in (32, 160):
        cuda.mode.syncs.clear()
        task(images, max_epochs=2, patience=2).fit(0, device=cuda.device)
        counts.append(len(cuda.mode.syncs))
    assert counts[0] == counts[1] > 0


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes are painted, and tokens made, once."""
    return tmp_path_factory.mktemp("tasks")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "recognition-scenes", "pairs-scenes", "relations-scenes", "objectness-scenes", "retrieval-scenes",
        "reconstruction-scenes", "codebook-scenes", "counterfactual-scenes", "gather-scenes",
    ],
)  # fmt: skip
def test_every_kind_of_task_runs_on_the_device(cuda: Cuda, name: str, cache: Path, tmp_path: Path) -> None:
    with torch.enable_grad():
        records = evaluate(
            "comit-nano",
            [name],
            device="cuda",
            limit=40,
            seeds=1,
            output=tmp_path / "results",
            cache=cache / ("real" if cuda.real else "pretended"),
            progress=False,
        )
    values = [metric.value for metric in records[-1].metrics.values()]
    assert values and all(value is None or math.isfinite(value) for value in values)
