"""Wall time of the probe at the size of the embedded recipe. No limits: numbers are for comparing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from comit_bench.probing.fit import Examples, FitTask, MessageSource, build_probe, one_thread
from comit_bench.recipes.specs import TaskSpec, parse_recipe

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.perf
RECIPE = Path(__file__).parents[2] / "probes" / "recognition-scenes" / "task.yaml"


def data(count: int, code_dim: int) -> Examples:
    generator = torch.Generator().manual_seed(count)
    codes = torch.randn(count, 16, code_dim, generator=generator)
    return Examples(MessageSource(codes=codes), torch.randint(100, (count,), generator=generator))


@pytest.mark.parametrize("code_dim", [6, 48, 192])
def test_one_epoch_of_3600_messages(benchmark, code_dim: int) -> None:  # type: ignore[no-untyped-def]
    spec = parse_recipe(RECIPE, TaskSpec).probe.model_copy(update={"max_epochs": 1})
    task = FitTask(spec=spec, outputs=100, train=data(3600, code_dim), early_stop=data(400, code_dim))
    result = benchmark.pedantic(task.fit, args=(0,), rounds=3, warmup_rounds=1)
    assert len(result.history) == 1


def test_one_training_step(benchmark) -> None:  # type: ignore[no-untyped-def]
    spec = parse_recipe(RECIPE, TaskSpec).probe
    probe = build_probe(spec, code_shape=(16, 48), outputs=100, seed=0)
    batch = data(spec.batch_size, 48)
    codes = batch.messages.take(batch.index())

    def step() -> None:
        probe.zero_grad(set_to_none=True)
        F.cross_entropy(probe(codes), batch.targets).backward()

    with one_thread():
        benchmark(step)
    assert probe.head.weight.grad is not None


def test_outputs_for_1000_messages(benchmark) -> None:  # type: ignore[no-untyped-def]
    spec = parse_recipe(RECIPE, TaskSpec).probe
    probe = build_probe(spec, code_shape=(16, 48), outputs=100, seed=0)
    codes = torch.randn(1000, 16, 48, generator=torch.Generator().manual_seed(0))
    with one_thread(), torch.inference_mode():
        assert benchmark(probe, codes).shape == (1000, 100)
