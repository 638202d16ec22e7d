"""The scenes-teacher: its targets, its training, what ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from comit_bench.commands.app import app
from comit_bench.errors import CorruptFileError, UsageError
from comit_bench.files import shipped_weights
from comit_bench.nn.teachers import ScenesTeacher, load_teacher
from comit_bench.train.config import TeacherRun, load_config
from comit_bench.train.loop import Trainer
from comit_bench.train.objectives.teacher import InverseRendering, paint_with_targets, read_out
from comit_bench.train.setup import make_teacher

SMALL = ("steps=6", "batch=4", "count=100", "val_count=100", "width=8", "depth=0", "dim=8", "save_every=2")


def run(output: Path, *overrides: str) -> TeacherRun:
    settings = load_config("scenes-teacher", (*SMALL, f"output={output}", *overrides))
    assert isinstance(settings, TeacherRun)
    return settings


def fit(settings: TeacherRun, command: str = "") -> Path:
    folder = Trainer(settings, device="cpu", progress=False, command=command).fit()
    assert folder is not None
    return folder


def test_targets_are_where_the_painter_painted() -> None:
    pixels, cover = paint_with_targets("pairs", "train", 4000, 5, 32)
    assert pixels.shape == (5, 3, 32, 32) and pixels.dtype == torch.uint8
    assert cover.shape == (5, 32, 32) and cover.dtype == torch.bool
    inside = pixels.float().amax(1)[cover].mean()
    assert inside > 2 * pixels.float().amax(1)[~cover].mean()  # bright digits on dark photographs


def test_the_loss_is_the_mean_square_of_three_targets() -> None:
    settings = run(Path("unused"))
    module = InverseRendering(settings)
    with torch.no_grad():  # heads that say 0: the loss is the power of the targets
        for head in (module.cover, module.colour, module.patch):
            head.weight.zero_()
    pixels, cover = paint_with_targets("recognition", "train", 4000, 3, 32)
    mask = cover.double()
    alone = pixels.double() / 127.5 * mask[:, None]

    def power(x: torch.Tensor, cell: int) -> float:
        return float(x.unfold(-2, cell, cell).unfold(-2, cell, cell).mean((-1, -2)).square().mean())

    patches = (16 * power(mask, 1) + 3 * power(alone, 4)) / 19
    want = power(mask, 2) + power(alone, 4) + 0.5 * patches
    assert abs(module(pixels, cover)[0].item() - want) < 1e-4


def test_training_continues_bit_for_bit_and_exports(tmp_path: Path) -> None:
    straight = fit(run(tmp_path / "a"), "the command")
    halfway = run(tmp_path / "b", "steps=6")
    _stop_after(halfway, 4)
    resumed = fit(halfway)
    one, other = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    card = (straight / "README.md").read_text()
    assert "\nthe command\n" in card and "renderer-supervised" in card
    teacher = load_teacher("scenes-teacher", path=straight, grid=8)
    pixels, _ = paint_with_targets("recognition", "train", 4000, 64, 32)
    assert teacher is not None and teacher.dims == (8, 8)
    features = teacher.features(pixels.float() / 127.5 - 1)
    assert features.cls.shape == (64, 8) and features.patches.shape == (64, 64, 8)
    assert features.cls.mean(0).abs().max() < 1.0 and 0.3 < float(features.cls.std(0).mean()) < 2.0
    card = (fit(run(tmp_path / "b")) / "README.md").read_text()
    assert (
        "| nan |" not in card and "| training loss at the end | " in card
    )  # exported again, without a step to take
    with pytest.raises(UsageError, match=r"learning_rate: 0\.002 -> 0\.0001"):
        fit(run(tmp_path / "a", "learning_rate=1e-4"))
    with pytest.raises(UsageError, match=r"steps: 6 -> 8"):  # the cosine ends with the last step
        fit(run(tmp_path / "a", "steps=8"))
    (tmp_path / "a" / "scenes-teacher" / "checkpoints" / "step-00000006" / "state.json").write_text("{")
    with pytest.raises(CorruptFileError, match="checkpoint"):
        fit(run(tmp_path / "a"))


def _stop_after(settings: TeacherRun, steps: int) -> None:
    """Train until a checkpoint after ``steps`` exists, then stop as a kill would."""

    class Killed(BaseException):
        pass

    save, kept = Trainer._save, []

    def save_and_die(self: Trainer) -> None:
        save(self)
        kept.append(self.counters.step)
        if self.counters.step >= steps:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save", save_and_die)
        with pytest.raises(Killed):
            fit(settings)
    assert kept == [2, 4]


def test_the_command_trains_and_refuses(tmp_path: Path) -> None:
    runner = CliRunner()
    plan = runner.invoke(app, ["train", "--config", "scenes-teacher", *SMALL, "--dry-run"])
    assert plan.exit_code == 0 and "output: runs/scenes-teacher" in plan.output
    with pytest.raises(UsageError, match="power of two"):
        load_config("scenes-teacher", ("patch=3",))
    with pytest.raises(UsageError, match="learning_rate"):
        load_config("scenes-teacher", ("learning_rat=3",))
    path = tmp_path / "other.yaml"
    path.write_text("kind: vqgan\nname: x\n")
    with pytest.raises(UsageError, match="expected comit"):
        load_config(str(path))


def test_the_shipped_teacher_reads_digits_and_colours() -> None:
    """Its card says .96 and 1.0 on 1000 scenes; it never saw a label."""
    folder = shipped_weights("scenes-teacher")
    assert (folder / "model.safetensors").stat().st_size < 5e6
    assert json.loads((folder / "config.json").read_text())["dim"] == 128
    teacher = make_teacher(load_config("comit-nano"), torch.device("cpu"))
    assert isinstance(teacher, ScenesTeacher)
    scores = read_out(teacher.network, 1500, 300, 32)
    assert scores["digit"] > 0.88 and scores["colour"] > 0.97


def test_weights_that_do_not_ship_are_named() -> None:
    with pytest.raises(FileNotFoundError, match="come with comit_bench"):
        shipped_weights("comit-enormous")
