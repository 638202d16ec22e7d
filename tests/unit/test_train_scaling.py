"""Recomputed and compiled blocks, and sharded weights: the same numbers as without them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from versions import needs_fsdp2_on_cpu

from comit_bench.nn.teachers import ScenesTeacher
from comit_bench.nn.vae import DctVae
from comit_bench.tokenizers.comit.codec import encode
from comit_bench.tokenizers.comit.crops import CropPolicy
from comit_bench.tokenizers.comit.fast import FastPredictor, run_block
from comit_bench.tokenizers.comit.model import PRESETS, Comit
from comit_bench.train import scaling
from comit_bench.train.config import TrainConfig, load_config
from comit_bench.train.data import TrainBatch
from comit_bench.train.loop import Trainer
from comit_bench.train.objectives.comit import TrainingModule
from comit_bench.train.sampling import TrainPlan, crop_counts, plan_step
from comit_bench.train.scaling import block_runner
from comit_bench.train.setup import make_model, make_teacher
from comit_bench.train.sharding import whole_copy

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "model.depth=2", "model.width=16", "model.heads=2", "model.message_length=4",
    "model.representation_layer=0", "global_batch=8", "data.count=30", "data.val_count=4",
    "optim.warmup_steps=4", "curriculum=[]", "crops.max_crops=2", "save_every=1",
    "validate_every=100", "keep_last=50", "teacher.name=none", "objective.srepa_weight=0",
    "optim.name=adam", "export.dtype=float32",
)  # fmt: skip
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
Gradients = dict[str, Tensor]


def settings(*overrides: str) -> TrainConfig:
    return load_config("comit-nano", (*TINY, *overrides))


def module(config: TrainConfig) -> TrainingModule:
    model = Comit(config.model.spec(), DctVae(4))
    model.predictor.init_weights(torch.Generator().manual_seed(0), zero_gates=False)
    return TrainingModule(model, config, None).train()


def plan(config: TrainConfig, images: int, crops: int) -> TrainPlan:
    """The first step's plan with this many crops; nobody is skipped, so that batch sizes are known."""
    step = next(s for s in range(1000) if crop_counts(config.crops, seed=config.seed, step=s)[0] == crops)
    return plan_step(config, step=step, samples=range(images))


def gradients(train: TrainingModule, images: int, crops: int) -> tuple[Tensor, Gradients]:
    train.zero_grad(set_to_none=True)
    pixels = torch.rand(images, 3, 32, 32, generator=torch.Generator().manual_seed(images)) * 2 - 1
    total = train(pixels, plan(train.config, images, crops), None, 1.0).total
    total.backward()
    return total.detach(), {n: p.grad.clone() for n, p in train.named_parameters() if p.grad is not None}


def test_recomputed_blocks_give_the_same_bits_and_keep_less() -> None:
    config = settings("crops.max_crops=3", "objective.backprop_updates=2")
    train = module(config)
    kept: list[int] = []

    def run() -> tuple[Tensor, Gradients]:
        kept.append(0)
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: count(x), lambda x: x)
        with hooks:
            return gradients(train, 6, 3)

    def count(x: Tensor) -> Tensor:
        kept[-1] += x.numel()
        return x

    plain = run()
    train.runner = block_runner(compile=False, recompute=True)
    again = run()
    assert torch.equal(plain[0], again[0])
    assert plain[1].keys() == again[1].keys()
    assert all(torch.equal(plain[1][name], again[1][name]) for name in plain[1])
    assert any(bool(g.any()) for g in plain[1].values())
    assert kept[1] < 0.6 * kept[0]


def test_a_recomputed_run_writes_the_same_files(tmp_path: Path) -> None:
    for name, value in (("plain", "false"), ("again", "true")):
        config = settings(f"output={tmp_path / name}", f"activation_checkpointing={value}", "steps=2")
        Trainer(config, device="cpu", progress=False).fit()
    for file in FILES:
        one, two = (load_file(last(tmp_path / run, 2) / file) for run in ("plain", "again"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), file


def check_compiled(backend: str, *, recompute: bool) -> None:
    """Loss and gradients, for several batch sizes, kinds of crops and both kinds of calls."""
    train = module(settings("objective.skip=0"))
    names = list(train.state_dict())
    batches = [(6, 1), (5, 1), (4, 2), (6, 2)]
    plain = [gradients(train, *batch) for batch in batches]
    train.runner = block_runner(compile=True, recompute=recompute, backend=backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for batch, (loss, wanted) in zip(batches, plain, strict=True):
        value, got = gradients(train, *batch)
        assert torch.allclose(value, loss, rtol=1e-5)
        assert got.keys() == wanted.keys()
        # Inductor's arithmetic on a CPU is not the plain one: 4e-4 of the gradient's length was measured
        # (torch 2.15), a thousand times what a change of the weights in the last bit does.
        error = sum(float((got[name] - gradient).square().sum()) for name, gradient in wanted.items())
        length = sum(float(gradient.square().sum()) for gradient in wanted.values())
        limit = 2e-3 if backend == "inductor" else 1e-5
        assert error**0.5 <= limit * length**0.5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1  # it was compiled,
    assert not torch._dynamo.utils.counters["graph_break"]  # in one piece
    assert list(train.state_dict()) == names
    assert not any("_orig_mod" in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_traced_blocks_equal_plain_ones(recompute: bool) -> None:
    check_compiled("aot_eager", recompute=recompute)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_compiled_blocks_equal_plain_ones() -> None:
    check_compiled("inductor", recompute=False)


def test_a_traced_runner_calls_every_block() -> None:
    """Decoding calls of one traced kind: quick enough for every run."""
    model = Comit(replace(PRESETS["comit-nano"], depth=1, width=16, heads=2), DctVae(4))
    model.predictor.init_weights(torch.Generator().manual_seed(0), zero_gates=False)
    calls: list[int] = []
    traced = block_runner(compile=True, recompute=False, backend="aot_eager")
    assert traced is not None

    def counted(*args: object) -> Tensor:
        calls.append(1)
        return traced(*args)  # type: ignore[arg-type]

    def velocity(network: FastPredictor) -> Tensor:
        condition = network.condition(model.prior(3, torch.device("cpu")), torch.zeros(3, 2))
        state = network.time_state(torch.tensor([0.1, 0.5, 0.9]))
        return network.velocity(torch.ones(3, 12, 8, 8), condition, state)

    plain = velocity(FastPredictor(model.predictor))
    assert torch.allclose(velocity(FastPredictor(model.predictor, counted)), plain, atol=1e-6)
    assert len(calls) == 1


def test_the_runner_is_for_training_only() -> None:
    train, calls = module(settings("objective.skip=0", "crops.global_first=1")), []

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return run_block(*args)

    train.runner = counted
    images = torch.zeros(2, 3, 32, 32)
    with torch.no_grad():
        encode(train.model, images, CropPolicy(global_crop=True, num_crops=1))
        assert not calls
        train(images, plan(train.config, 2, 1), None, 1.0)
    assert len(calls) == 2 * 2  # one crop and one velocity, two blocks each


def last(output: Path, step: int) -> Path:
    return output / "comit-nano" / "checkpoints" / f"step-{step:08d}"


def two_processes(output: Path, *overrides: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port),
        "-m", "comit_bench.train", "--config", "comit-nano", "--device", "cpu", "-q", *TINY,
        f"output={output}", *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_close(one: Path, other: Path) -> None:
    for file in FILES:
        a, b = load_file(one / file), load_file(other / file)
        assert a.keys() == b.keys()
        assert all(a[key].shape == b[key].shape for key in a)
        assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-5, file


@needs_fsdp2_on_cpu
def test_sharded_processes_equal_one_and_either_continues(tmp_path: Path) -> None:
    """Two processes with FSDP2, in pieces, continue what one began, and one what they did. Adam's eps is
    large so that its division does not blow up rounding errors. The crops are such that the processes
    call the network a different number of times (asserted), which must not lock them up."""
    extra = ("optim.eps=0.01", "optim.learning_rate=0.05", "optim.clip=0.1", "crops.global_first=0.3")
    one = Trainer(settings(*extra, "steps=4", f"output={tmp_path / 'one'}"), device="cpu", progress=False)
    calls = set()
    for step in (1, 2):
        batch = one.steps[step]
        assert isinstance(batch, TrainBatch)
        whole = [part[0, :, 0] < 0 for part in batch.plan.corners.split(2, dim=1)]
        pieces = [len(part.unique()) for part in whole]  # first two: rank 0, last two: rank 1
        calls |= set(zip(pieces[:2], pieces[2:], strict=True))
    assert any(a != b for a, b in calls)
    one.fit()
    shutil.copytree(last(tmp_path / "one", 1), last(tmp_path / "two", 1))
    two_processes(tmp_path / "two", *extra, "steps=3", "device_batch=2", "sharding=fsdp2")
    assert_close(last(tmp_path / "one", 3), last(tmp_path / "two", 3))
    first, third = (load_file(last(tmp_path / "two", n) / FILES[0]) for n in (1, 3))
    assert max(float((first[k] - third[k]).abs().max()) for k in first) > 1e-2
    export = tmp_path / "two" / "comit-nano" / "export" / "comit-nano" / "model.safetensors"
    averages = load_file(last(tmp_path / "two", 3) / "ema.safetensors")
    weights = load_file(export)
    assert all(torch.equal(weights[f"predictor.{key}"], value) for key, value in averages.items())

    # as if killed while step 3 was written: one process takes over after step 2
    shutil.rmtree(last(tmp_path / "two", 3))
    (last(tmp_path / "two", 3).parent / ".step-00000003.x.part").mkdir()
    resumed = settings(*extra, "steps=4", f"output={tmp_path / 'two'}", "sharding=fsdp2")
    Trainer(resumed, device="cpu", progress=False).fit()
    assert_close(last(tmp_path / "one", 4), last(tmp_path / "two", 4))


def test_a_whole_copy_has_its_own_weights_and_all_names() -> None:
    config = settings()
    train = module(config)
    weights = {k: v.clone() for k, v in train.model.predictor.state_dict().items()}
    copy = whole_copy(train.model, weights)
    assert list(copy.state_dict()) == list(train.model.state_dict())
    assert copy.vae is train.model.vae
    x = copy.predictor.x_embedder.proj.weight
    assert torch.equal(x, train.model.predictor.x_embedder.proj.weight)
    assert x.data_ptr() != train.model.predictor.x_embedder.proj.weight.data_ptr()
    assert not x.requires_grad
    assert train.model.predictor.x_embedder.proj.weight.requires_grad


def test_a_compiled_teacher_gives_the_same_features() -> None:
    config = load_config("comit-nano", ("export.dtype=float32",))
    model, images = make_model(config), torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    teacher = make_teacher(config, torch.device("cpu"))
    assert isinstance(teacher, ScenesTeacher)
    plain, names = teacher.features(images * 2 - 1), list(teacher.network.state_dict())
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        calls.append(1)
        return graph.forward

    scaling.compile_frozen(model, teacher, backend)  # type: ignore[arg-type]
    traced = teacher.features(images * 2 - 1)
    assert calls and list(teacher.network.state_dict()) == names
    assert torch.allclose(traced.cls, plain.cls, atol=1e-5)
    assert torch.allclose(traced.patches, plain.patches, atol=1e-5)
