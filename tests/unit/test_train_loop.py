"""The training loop: exact continuation, kills, bad numbers, broken images, ranks, export."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from comit_bench import load_tokenizer
from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError
from comit_bench.nn.teachers import ScenesTeacherNet, ScenesTeacherSpec
from comit_bench.train import checkpoint
from comit_bench.train.config import TrainConfig, load_config
from comit_bench.train.data import Steps, TrainBatch, open_images, read_all
from comit_bench.train.ema import Ema
from comit_bench.train.logs import read_rows
from comit_bench.train.loop import Stop, Trainer
from comit_bench.train.validation import float_psnr, perplexity, validate

ROOT = Path(__file__).resolve().parents[2]
ONLY_GLOBAL = "max_crops: 1, count_global: true, global_first: 1, global_first_among: encoded"
GLOBAL_FIRST = f"curriculum=[{{until: 2, {ONLY_GLOBAL}}}]"
TINY = (
    "model.depth=1", "model.width=16", "model.heads=2", "model.message_length=4",
    "model.representation_layer=0",    "global_batch=8", "data.count=30", "data.val_count=4",
    "optim.warmup_steps=4", GLOBAL_FIRST, "teacher.name=none", "objective.srepa_weight=0",
    "export.dtype=float32",
    "save_every=1", "validate_every=100", "log_every=3", "keep_last=50", "steps=12",
)  # fmt: skip
if not hasattr(torch.optim, "Muon"):  # before torch 2.9
    TINY = (*TINY, "optim.name=adam")
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(output: Path, *overrides: str) -> TrainConfig:
    return load_config("comit-nano", (*TINY, f"output={output}", *overrides))


def train(output: Path, *overrides: str, resume: str = "auto") -> Trainer:
    trainer = Trainer(settings(output, *overrides), device="cpu", resume=resume, progress=False)
    trainer.fit()
    return trainer


def checkpoint_at(output: Path, step: int) -> Path:
    return output / "comit-nano" / "checkpoints" / f"step-{step:08d}"


def assert_same(one: Path, other: Path) -> None:
    for name in FILES:
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys()
        assert a
        assert all(torch.equal(a[key], b[key]) for key in a), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("straight")
    torch.set_num_threads(1)
    train(output)
    return output


def test_training_moves_the_weights(straight: Path) -> None:
    first, last = (load_file(checkpoint_at(straight, n) / "model.safetensors") for n in (1, 12))
    moved = [key for key in first if not torch.equal(first[key], last[key])]
    assert "model.predictor.x_embedder.proj.weight" in moved
    assert "model.predictor.r_final_layer.linear.weight" in moved
    assert "model.predictor.y_pos_offset" not in moved


@pytest.mark.parametrize("attempt", range(3))
def test_resumed_runs_equal_straight_ones_bit_for_bit(straight: Path, tmp_path: Path, attempt: int) -> None:
    step = random.SystemRandom().randrange(1, 12)
    shutil.copytree(checkpoint_at(straight, step), checkpoint_at(tmp_path, step))
    (checkpoint_at(tmp_path, step).parent / ".step-00000009.x.part").mkdir()  # half-written when killed
    shutil.copy(straight / "comit-nano" / "log.csv", tmp_path / "comit-nano" / "log.csv")
    train(tmp_path)
    assert_same(checkpoint_at(straight, 12), checkpoint_at(tmp_path, 12))
    logs = []
    for root in (straight, tmp_path):
        with (root / "comit-nano" / "log.csv").open() as stream:
            logs.append([{**row, "images_per_s": ""} for row in csv.DictReader(stream)])
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0]] == ["3", "6", "9", "12"]
    assert not list(checkpoint_at(tmp_path, 1).parent.glob(".*"))


def command(output: Path, *overrides: str) -> list[str]:
    return ["-m", "comit_bench.train", "--config", "comit-nano", "--device", "cpu", "-q", *TINY,
            f"output={output}", *overrides]  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_kill_9_at_any_moment(straight: Path, tmp_path: Path) -> None:
    """The log stops anywhere; the same command ends with the same bits."""
    process = subprocess.Popen(
        [sys.executable, *command(tmp_path, "steps=100000")], env=environment(), stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not checkpoint_at(tmp_path, 2).is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.SystemRandom().random() * 0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    found = checkpoint.found(checkpoint_at(tmp_path, 1).parent)
    assert found
    for directory in found:
        if checkpoint.step_of(directory) > 8:  # a fast machine went past the reference
            shutil.rmtree(directory)
    train(tmp_path)
    assert_same(checkpoint_at(straight, 12), checkpoint_at(tmp_path, 12))


class Signalled(Trainer):
    def _step(self, batch: TrainBatch, stop: Stop) -> tuple[list[float], bool]:
        if batch.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return super()._step(batch, stop)


def test_a_signal_saves_and_stops(tmp_path: Path) -> None:
    trainer = Signalled(settings(tmp_path, "save_every=100"), device="cpu", progress=False)
    assert trainer.fit() is None
    assert [p.name for p in checkpoint.found(trainer.checkpoints)] == ["step-00000005"]
    assert trainer.counters.step == 5


class Poisoned(Trainer):
    bad: tuple[int, ...] = ()

    def _gradients(self, batch: TrainBatch) -> torch.Tensor:
        means = super()._gradients(batch)
        if batch.step in self.bad:
            self.parameters[0].grad = torch.full_like(self.parameters[0], float("nan"))
        return means


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    trainer = Poisoned(settings(tmp_path, "steps=6"), device="cpu", progress=False)
    trainer.bad = (2, 3)
    trainer.fit()
    assert (trainer.counters.skipped, trainer.counters.bad_run, trainer.counters.step) == (2, 0, 6)
    assert_same(checkpoint_at(tmp_path, 2), checkpoint_at(tmp_path, 4))


def test_many_bad_steps_in_a_row_stop_with_the_sample_ids(tmp_path: Path) -> None:
    trainer = Poisoned(settings(tmp_path, "max_bad_steps=3"), device="cpu", progress=False)
    trainer.bad = tuple(range(2, 12))
    with pytest.raises(BenchError, match=r"3 steps in a row.*step 5 with the images scenes/train/0000\d\d@1"):
        trainer.fit()
    assert len((tmp_path / "comit-nano" / "bad-steps.jsonl").read_text().splitlines()) == 3


def test_ranks_share_one_order(tmp_path: Path) -> None:
    config = settings(tmp_path)
    images, _ = open_images(config)
    whole = Steps(config, images)[5]
    parts = [Steps(config, images, rank=rank, ranks=2)[5] for rank in (0, 1)]
    assert isinstance(whole, TrainBatch)
    assert tuple(name for part in parts if isinstance(part, TrainBatch) for name in part.ids) == whole.ids
    for name in ("images", "ids"):
        assert len(getattr(whole, name)) == 8
    assert list(whole.ids) == Steps(config, images).global_ids(5)
    noise = torch.cat([part.plan.noise for part in parts if isinstance(part, TrainBatch)])
    assert torch.equal(noise, whole.plan.noise)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Under gloo; also gradient accumulation in pieces of different size. Adam's eps is large so that
    its division does not blow up rounding errors of tiny gradients."""
    extra = ("steps=3", "optim.eps=0.01", "optim.learning_rate=0.05")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    started = subprocess.Popen(
        [sys.executable, *launch, *command(tmp_path / "two", *extra)],
        env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    train(tmp_path / "one", *extra, "device_batch=2")
    _, errors = started.communicate(timeout=120)
    assert started.returncode == 0, errors[-3000:]
    moved = 0.0
    for name in FILES[:2]:
        one, two = (load_file(checkpoint_at(tmp_path / run, 3) / name) for run in ("one", "two"))
        first = load_file(checkpoint_at(tmp_path / "one", 1) / name)
        assert one.keys() == two.keys()
        for key in one:
            assert (one[key] - two[key]).abs().max() < 1e-5, key
            moved = max(moved, float((one[key] - first[key]).abs().max()))
    assert moved > 1e-2


def test_other_settings_are_refused_in_one_message(straight: Path) -> None:
    with pytest.raises(UsageError) as refused:
        train(straight, "optim.clip=2", "seed=4", "log_every=5", "steps=13")
    assert "optim.clip: 1.0 -> 2" in str(refused.value)
    assert "seed: 0 -> 4" in str(refused.value)
    assert "log_every" not in str(refused.value)
    assert "steps" not in str(refused.value).replace("warmup_steps", "")


def test_resume_never_and_by_name(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds checkpoints up to step 12"):
        train(straight, resume="never")
    with pytest.raises(UsageError, match="later checkpoints"):
        train(straight, resume=str(checkpoint_at(straight, 4)))
    with pytest.raises(MissingError, match="auto, never or a checkpoint"):
        train(tmp_path, resume=str(tmp_path))
    trainer = train(tmp_path, "steps=11", resume=str(checkpoint_at(straight, 10)))
    assert trainer.counters.step == 11
    assert_same(checkpoint_at(straight, 11), checkpoint_at(tmp_path, 11))


def test_damaged_checkpoints_are_named(straight: Path, tmp_path: Path) -> None:
    target = checkpoint_at(tmp_path, 3)
    shutil.copytree(checkpoint_at(straight, 3), target)
    (target / "ema.safetensors").write_bytes(b"short")
    with pytest.raises(CorruptFileError, match=r"ema\.safetensors"):
        train(tmp_path)


def test_only_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    trainer = train(tmp_path, "keep_last=2", "validate_every=2", "steps=6")
    steps = {checkpoint.step_of(p) for p in checkpoint.found(trainer.checkpoints)}
    assert steps == {5, 6, trainer.counters.best_step}
    checkpoint.tidy(trainer.checkpoints, keep_last=1, best=5)
    assert {checkpoint.step_of(p) for p in checkpoint.found(trainer.checkpoints)} == {5, 6}


def test_the_export_is_a_tokenizer(straight: Path) -> None:
    folder = straight / "comit-nano" / "export" / "comit-nano"
    tokenizer = load_tokenizer(str(folder), device="cpu")
    assert tokenizer.info.name == "comit-nano"
    assert tokenizer.info.trained
    assert tokenizer.info.training_data == "scenes-recognition train (30 scenes)"
    assert tokenizer.info.weights_licence == "Apache-2.0"
    weights = load_file(folder / "model.safetensors")
    averages = load_file(checkpoint_at(straight, 12) / "ema.safetensors")
    assert all(torch.equal(weights[f"predictor.{key}"], value) for key, value in averages.items())
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    assert tokenizer.encode(images).ids is not None
    card = (folder / "README.md").read_text()
    assert "one-step PSNR lost" in card
    with Image.open(folder / "reconstructions.png") as picture:
        assert picture.size == (150 + 4 * 166, 6 + 4 * 166)
    with (straight / "comit-nano" / "validation.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["step"] for row in rows] == ["12"]
    assert 5 < float(rows[0]["psnr_mean_colour"]) < 30


def test_trainings_of_several_seeds_share_a_group(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        run = train(tmp_path, f"seed={seed}", f"name=nano-{seed}", "group=nano", "steps=2")
        folder = run.directory / "export" / f"nano-{seed}"
        info = load_tokenizer(str(folder), device="cpu").info
        assert (info.name, info.group) == (f"nano-{seed}", "nano")
        found.append(load_file(folder / "model.safetensors"))
    assert any(not torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_alignment_with_a_teacher_is_logged(tmp_path: Path) -> None:
    spec = ScenesTeacherSpec()
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(asdict(spec)))
    save_file(ScenesTeacherNet(spec).state_dict(), tmp_path / "teacher" / "model.safetensors")
    weights = ("objective.repa_weight=0.5", "objective.srepa_weight=0.5", "objective.alignment_ramp=4")
    teacher = (
        "teacher.name=scenes-teacher",
        f"teacher.path={tmp_path}/teacher",
        "objective.projector_width=8",
    )
    train(tmp_path, *weights, *teacher, "steps=3", "device_batch=4")
    (row,) = read_rows(tmp_path / "comit-nano" / "log.csv")
    parts = {name: float(row[name]) for name in ("loss", "flow", "repa", "srepa", "ramp")}
    assert 0 < parts["srepa"] < 2
    assert 0 < parts["repa"] < 2
    assert parts["ramp"] == 0.5
    assert parts["flow"] < parts["loss"] < parts["flow"] + 0.25 * (parts["repa"] + parts["srepa"])
    with pytest.raises(MissingError, match="teacher"):
        train(tmp_path / "b", *weights, "teacher.name=scenes-teacher", f"teacher.path={tmp_path}/none")
    with pytest.raises(UsageError, match="this checkpoint does not fit ScenesTeacherNet"):
        (tmp_path / "teacher" / "config.json").write_text(json.dumps({**asdict(spec), "dim": spec.dim * 2}))
        train(tmp_path / "b", *weights, *teacher)


def image_tree(root: Path, count: int, broken: int) -> None:
    root.mkdir()
    for i in range(count):
        path = root / f"{i:03d}.png"
        Image.new("RGB", (32, 32), (i * 5, 90, 40)).save(path)
        if i < broken:
            path.write_bytes(b"no image")


def test_broken_images_are_replaced_counted_and_limited(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image_tree(tmp_path / "data", 40, 3)
    folders = ("data.kind=class-folders", f"data.source={tmp_path}/data", "steps=6", "log_every=6")
    trainer = train(tmp_path, *folders, "data.max_broken=0.2")
    broken = sorted(trainer.objective.broken.seen)
    assert broken
    assert set(broken) <= {"000.png", "001.png", "002.png"}
    batches = [trainer.steps[n] for n in range(5)]
    assert all(isinstance(b, TrainBatch) and bool(b.images.flatten(1).any(1).all()) for b in batches)
    with pytest.raises(BenchError, match=r"training images are broken .*data\.max_broken"):
        train(tmp_path / "again", *folders, "data.max_broken=0.01")


def test_averages_return_the_own_weights_exactly() -> None:
    layer = torch.nn.Linear(3, 3)
    own = layer.weight.detach().clone()
    ema = Ema(layer, 0.5)
    with torch.no_grad():
        layer.weight.add_(1.0)
    ema.update(0)
    with ema.applied():
        assert torch.allclose(layer.weight, own + 0.5)
    assert torch.equal(layer.weight, own + 1.0)
    warm = Ema(layer, 0.999, warmup=True)
    before = layer.bias.detach().clone()
    with torch.no_grad():
        layer.bias.add_(1.0)
    warm.update(0)
    assert torch.allclose(warm.averages["bias"], before + 0.9)


def test_measures() -> None:
    image = torch.zeros(2, 3, 4, 4)
    assert float_psnr(image, image + 0.2).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)
    assert perplexity(torch.tensor([3, 3, 0, 3])) == pytest.approx(3.0)


@pytest.mark.slow
def test_64_scenes_are_overfitted(tmp_path: Path) -> None:
    """The first gate of the shipped weights: a network that sees 64 scenes only learns them by heart.

    CardText ten minutes on one core. Reconstructions of the training scenes from their messages alone come
    near the 32 dB that the autoencoder itself reaches, far from the 13 dB of the mean colour.
    """
    run = load_config(
        "comit-nano-no-local-crops",
        ("steps=1200", "optim.cosine_steps=1200", "data.count=64", "data.val_count=8", "objective.skip=0",
         "teacher.name=none", "objective.srepa_weight=0", "validate_every=1200", "save_every=1200",
         f"output={tmp_path}"),
    )  # fmt: skip
    trainer = Trainer(run, device="cpu", progress=False)
    trainer.fit()
    scenes = read_all(open_images(run)[0])
    with trainer.state.ema.applied():
        values, _ = validate(trainer.objective.network, run, scenes, device=torch.device("cpu"))
    sys.stdout.write(f"{ {name: round(value, 2) for name, value in values.items()} }\n")
    assert values["psnr_one_step"] > 22
    assert values["psnr_guided"] > 26
    assert values["shuffled_gap"] > 10
    assert values["psnr_mean_colour"] < 15
