"""Training of the small autoencoders: gradients, restarts of the codebook, resuming, the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from typer.testing import CliRunner
from versions import needs_muon

from comit_bench.commands.app import app
from comit_bench.errors import CorruptFileError, UsageError
from comit_bench.tokenizers.load import load_tokenizer
from comit_bench.tokenizers.titok.model import Titok
from comit_bench.tokenizers.vq_grid.model import VqGrid
from comit_bench.train.config import AutoencoderRun, load_config
from comit_bench.train.data import paint_scenes
from comit_bench.train.loop import Trainer
from comit_bench.train.objectives import autoencoder
from comit_bench.train.objectives.autoencoder import PixelLoss, make_network, measure, straight_through
from comit_bench.train.optimizers import make_optimizer

NAMES = ("vq-grid-nano", "titok-nano")
SMALL = ("steps=6", "batch=4", "count=24", "val_count=8", "save_every=2", "validate_every=3", "log_every=2")


def run(name: str, output: Path, *overrides: str) -> AutoencoderRun:
    often = ("restart_every=2", "restart_until=6") if name == "titok-nano" else ()
    settings = load_config(name, (*SMALL, *often, f"output={output}", *overrides))
    assert isinstance(settings, AutoencoderRun)
    return settings


def fit(settings: AutoencoderRun, command: str = "") -> Path:
    folder = Trainer(settings, device="cpu", progress=False, command=command).fit()
    assert folder is not None
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_presets_have_the_budget_of_comit_nano(name: str) -> None:
    settings, comit = load_config(name), load_config("comit-nano")
    assert isinstance(settings, AutoencoderRun)
    assert (settings.name, settings.model) == (name, name)
    assert (settings.steps, settings.batch) == (comit.steps, comit.global_batch)
    assert (settings.count, settings.val_count) == (comit.data.count, comit.data.val_count)
    assert settings.optim == comit.optim.model_copy(update={"ema": 0, "ema_warmup": False})


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_the_codes_reaches_the_encoder(name: str) -> None:
    network = make_network(run(name, Path("unused")))
    pixels = paint_scenes("train", 0, 4, 32).images.float() / 255
    z = network.vectors(pixels).detach().requires_grad_()
    codes, table, commit, ids = straight_through(network, z)
    if isinstance(network, Titok):
        assert torch.allclose(codes, network.quantize.codes(ids), atol=1e-6)
        unit = F.normalize(z.detach(), dim=-1)
        distance = (unit - network.quantize.codes(ids)).square().mean()
        assert torch.allclose(table, distance) and torch.allclose(commit, distance)
        (pull,) = torch.autograd.grad(table, network.quantize.embedding.weight, retain_graph=True)
        assert set(pull.norm(dim=1).nonzero().flatten().tolist()) <= set(ids.flatten().tolist())
        assert torch.autograd.grad(table, z, allow_unused=True, retain_graph=True)[0] is None
        assert torch.autograd.grad(commit, z, retain_graph=True)[0].norm() > 0
    else:
        assert torch.equal(codes.detach(), network.quantizer.codes(network.quantizer.ids(codes)))
        assert float(table) == float(commit) == 0.0
    direction = torch.randn(codes.shape, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad((codes * direction).sum(), z)
    smooth = z.detach().requires_grad_()
    relaxed = (
        network.quantizer.relaxed(smooth) if isinstance(network, VqGrid) else F.normalize(smooth, dim=-1)
    )
    (want,) = torch.autograd.grad((relaxed * direction).sum(), smooth)
    assert torch.allclose(grad, want, atol=1e-6)


def test_the_loss_is_that_of_images_between_minus_one_and_one() -> None:
    settings = run("vq-grid-nano", Path("unused"))
    module = PixelLoss(make_network(settings), settings)
    pixels = paint_scenes("train", 0, 4, 32).images
    with torch.no_grad():
        loss, error, codebook = module(pixels).tolist()
        codes = module.network.encode(pixels.float() / 255)[1]
        drawn = 2 * module.network.decode(codes) - 1
        want = float((drawn - (pixels.double() / 127.5 - 1)).square().mean())
    assert abs(error - want) < 1e-5 * want and loss == error and codebook == 0.0


@needs_muon
def test_rows_that_nobody_chose_become_vectors_of_the_batch() -> None:
    settings = run("titok-nano", Path("unused"))
    network = make_network(settings)
    assert isinstance(network, Titok)
    module = PixelLoss(network, settings)
    optimizer = make_optimizer(module, settings, torch.device("cpu"))
    pixels = paint_scenes("train", 0, 4, 32).images
    module(pixels)[0].backward()
    optimizer.step()
    assert module.used is not None and int(module.used.sum()) == 4 * 16
    chosen = module.used > 0
    table = network.quantize.embedding.weight
    before = table.detach().clone()
    moments = optimizer.parts[0].state[table]["exp_avg"]
    moments.fill_(1.0)
    changed = module.restart(pixels, torch.Generator().manual_seed(0), optimizer)
    assert changed == int((~chosen).sum()) > 1000 and int(module.used.sum()) == 0
    assert torch.equal(table[chosen], before[chosen])
    with torch.no_grad():
        z = F.normalize(network.vectors(pixels.float() / 255).flatten(0, 1), dim=-1)
    assert float(torch.cdist(table[~chosen].detach(), z).amin(1).max()) < 1e-3
    assert float(moments[chosen].min()) == 1.0 and float(moments[~chosen].abs().max()) == 0.0


def _stop_after(settings: AutoencoderRun, steps: int) -> None:
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


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        found = list(csv.DictReader(stream))
    for row in found:
        row.pop("images_per_s", None)  # the only column that a clock writes
    return found


@needs_muon
@pytest.mark.parametrize("name", NAMES)
def test_training_continues_bit_for_bit_and_exports(name: str, tmp_path: Path) -> None:
    straight = fit(run(name, tmp_path / "a"), "the command")
    halfway = run(name, tmp_path / "b", "group=three-seeds")
    _stop_after(halfway, 4)
    resumed = fit(halfway)
    one, other = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert all(value.dtype == torch.float16 for value in one.values())
    for log, steps in (("log.csv", ["2", "4", "6"]), ("validation.csv", ["3", "6"])):
        first, second = (rows(folder.parents[1] / log) for folder in (straight, resumed))
        assert first == second and [row["step"] for row in first] == steps
    fresh = make_network(run(name, tmp_path / "c"))
    fresh_weights = fresh.state_dict()
    assert any(not torch.equal(one[k].float(), fresh_weights[k].half().float()) for k in one)

    tokenizer = load_tokenizer(str(straight), device="cpu")
    info = tokenizer.info
    assert info.trained and info.training_data == "scenes-recognition train (24 scenes)"
    assert info.weights_licence == "Apache-2.0"
    assert info.group == "" and '"group"' not in (straight / "config.json").read_text()
    assert load_tokenizer(str(resumed), device="cpu").info.group == "three-seeds"
    card = (straight / "README.md").read_text()
    held = paint_scenes("val", autoencoder.PROBE_VAL_SCENES, 8, 32).images
    assert "\nthe command\n" in card and f"{info.parameters:,} (stored as float16)" in card
    found = measure(tokenizer.model.cpu(), held)  # type: ignore[attr-defined]
    assert f"| PSNR (dB) | {found['psnr']:.4g} |" in card
    assert ("TiTok does not do this" in card) == (name == "titok-nano")

    with pytest.raises(UsageError, match=r"optim\.learning_rate: 0\.002 -> 0\.0001"):
        fit(run(name, tmp_path / "a", "optim.learning_rate=1e-4"))
    (tmp_path / "a" / name / "checkpoints" / "step-00000006" / "state.json").write_text("{")
    with pytest.raises(CorruptFileError, match="not the state of a checkpoint"):
        fit(run(name, tmp_path / "a"))
    (tmp_path / "old" / name / "checkpoint").mkdir(parents=True)
    with pytest.raises(UsageError, match="a checkpoint of an earlier version"):
        fit(run(name, tmp_path / "old"))


def test_measures_are_those_of_the_8_bit_images() -> None:
    network = make_network(run("vq-grid-nano", Path("unused")))
    pixels = paint_scenes("val", 1000, 6, 32).images
    found = measure(network, pixels)
    with torch.no_grad():
        ids, codes = network.encode(pixels.float() / 255)
        drawn = network.decode(codes).clamp(0, 1).mul(255).round()
    error = (drawn - pixels.float()).square().flatten(1).mean(1)
    other = (drawn.roll(1, 0) - pixels.float()).square().flatten(1).mean(1)
    quality = 10 * torch.log10(255**2 / error)
    assert found["psnr"] == pytest.approx(float(quality.mean()), abs=1e-4)
    gap = quality - 10 * torch.log10(255**2 / other)
    assert found["shuffled_gap"] == pytest.approx(float(gap.mean()), abs=1e-4)
    assert found["ids_used"] == len(torch.unique(ids))
    batched = measure(network, pixels, batch=2)
    assert batched == pytest.approx(found, abs=1e-3)


@needs_muon
def test_sixteen_scenes_are_learnt_by_heart(tmp_path: Path) -> None:
    """A few steps on the same images must bring them well above the mean colour."""
    folder = fit(
        run("vq-grid-nano", tmp_path, "steps=150", "batch=16", "count=16", "optim.warmup_steps=10",
            "optim.cosine_steps=150", "validate_every=150", "save_every=150")
    )  # fmt: skip
    tokenizer = load_tokenizer(str(folder), device="cpu")
    found = measure(tokenizer.model, paint_scenes("train", 0, 16, 32).images)  # type: ignore[attr-defined]
    assert found["psnr"] > found["psnr_mean_colour"] + 5 and found["shuffled_gap"] > 5


@needs_muon
def test_the_command_plans_and_refuses(tmp_path: Path) -> None:
    runner = CliRunner()
    plan = runner.invoke(app, ["train", "--config", "titok-nano", *SMALL, "--dry-run"])
    assert plan.exit_code == 0 and "output: runs/titok-nano" in plan.output
    done = runner.invoke(app, ["train", "--config", "vq-grid-nano", *SMALL, f"output={tmp_path}", "-q"])
    folder = tmp_path / "vq-grid-nano" / "export" / "vq-grid-nano"
    assert done.exit_code == 0 and str(folder) in done.output
    assert json.loads((folder / "config.json").read_text())["comit_bench"]["steps"] == 6
    assert "output=" not in (folder / "README.md").read_text()
    with pytest.raises(UsageError, match="no codebook to restart"):
        load_config("vq-grid-nano", ("restart_every=5",))
    with pytest.raises(UsageError, match=r"optim\.ema"):
        load_config("titok-nano", ("optim.ema=0.9",))
    with pytest.raises(UsageError, match="commitment"):
        load_config("titok-nano", ("comitment=3",))
