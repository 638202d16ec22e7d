"""Kind reconstruction end to end: definitions, invariance, resume, refusals, missing weights."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from judges import write_random_inception, write_random_squeezenet
from PIL import Image
from processes import free_port, start
from tiny import VAL, write_images, write_recipes
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from comit_bench import evaluate
from comit_bench.commands import app as cli
from comit_bench.commands.listing import examine
from comit_bench.errors import CorruptFileError, MissingError, UsageError
from comit_bench.metrics import perceptual
from comit_bench.metrics.similarity import psnr
from comit_bench.metrics.statistics import estimate
from comit_bench.pipeline.evaluate import run_jobs
from comit_bench.pipeline.inputs import roles_of
from comit_bench.pipeline.jobs import Settings, make_jobs
from comit_bench.pipeline.session import Session
from comit_bench.recipes.specs import TaskSpec, find_tasks
from comit_bench.results.outcomes import Outcomes, read_outcomes
from comit_bench.results.schema import Record
from comit_bench.results.table import build_table
from comit_bench.tasks import reconstruction, shards
from comit_bench.tokenizers.base import Tokens, decodes_with_noise
from comit_bench.tokenizers.load import load_tokenizer
from comit_bench.tokenizers.pixels import PixelOracleTokenizer

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 4 * VAL
SECTION = {"features": "scenes-teacher", "lpips": None}
FAST = {"options": {"steps": 2}}  # solver steps of comit-nano


def write_bench(root: Path, **section: object) -> Path:
    write_images(root / "data")
    write_recipes(root / "recipes", kind="classification")
    write_task(root, "tiny-back", **section)
    return root


def write_task(root: Path, name: str, seeds: int = 1, **section: object) -> None:
    task = {
        "name": name,
        "version": 1,
        "title": "Pixels there and back",
        "kind": "reconstruction",
        "suite": "extra",
        "dataset": "tiny",
        "split": {"report": "val"},
        "seeds": seeds,
        "reconstruction": {**SECTION, **section},
    }
    folder = root / "recipes" / "probes" / name
    folder.mkdir(parents=True)
    (folder / "task.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def settings_in(root: Path, output: str = "out", **changes: Any) -> dict[str, Any]:
    return {
        "data_root": root / "data",
        "include": (root / "recipes",),
        "cache": root / "cache",
        "output": root / output,
        "device": "cpu",
        **changes,
    }


def measure(
    tokenizer: Any, root: Path, output: str = "out", task: str = "tiny-back", **changes: Any
) -> Record:
    chosen = settings_in(root, output, **changes)
    (record,) = evaluate(tokenizer, [task], references=False, **chosen)
    return record


def values(record: Record) -> dict[str, Any]:
    return {name: metric.model_dump() for name, metric in record.metrics.items()}


def per_image(root: Path, output: str = "out") -> dict[str, list[Any]]:
    (path,) = (root / output / "records").rglob("*.parquet")
    return dict(pq.read_table(path).to_pydict())


def outcomes_of(root: Path, record: Record, output: str = "out") -> Outcomes:
    (path,) = (root / output / "records").rglob("*.json")
    found = read_outcomes(path, record)
    assert found is not None
    return found


def references(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "cache" / "references").glob("*.npz")}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_bench(tmp_path)


class Shifted(PixelOracleTokenizer):
    """Gives back every image a little brighter: a decoder whose error is known."""

    def __init__(self, step: int) -> None:
        super().__init__(device="cpu")
        self.step = step
        self.info = replace(self.info, name=f"shifted-{step}")

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        return (super().decode(tokens, seeds=seeds).int() + self.step).clamp(0, 255).to(torch.uint8)


class Noisy(Shifted):
    """Adds noise from the seed of every image."""

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        images = PixelOracleTokenizer.decode(self, tokens, seeds=seeds)
        noise = [torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return (images + self.step * torch.stack(noise)).clamp(0, 255).to(torch.uint8)


class EncoderOnly(PixelOracleTokenizer):
    """Has the method and refuses, as the contract says."""

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        raise NotImplementedError("encoder only")


def originals(root: Path) -> tuple[list[str], Tensor]:
    paths = sorted((root / "data" / "tiny" / "val").rglob("*.png"))
    images = [torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1) for path in paths]
    return [f"{path.parent.name}/{path.stem}" for path in paths], torch.stack(images)


# ------------------------------------------------------------------ definitions


def test_a_decoder_that_returns_the_original(root: Path) -> None:
    record = measure("pixel-oracle", root)
    assert record.metrics["psnr"].value == 100.0 and record.metrics["ssim"].value == 1.0
    assert 0 <= record.metrics["fd_scenes_teacher"].value < 1e-6
    assert record.details["identical"] == IMAGES
    assert "rfid" not in record.metrics and record.metrics["psnr"].n == IMAGES


def test_numbers_are_those_of_the_files(root: Path) -> None:
    record = measure(Shifted(9), root)
    ids, images = originals(root)
    shifted = (images.int() + 9).clamp(0, 255).to(torch.uint8)
    expected = psnr(images, shifted).numpy()
    table = per_image(root)
    order = [next(i for i, name in enumerate(ids) if name in told) for told in table["id"]]
    np.testing.assert_allclose(table["psnr"], expected[order], rtol=1e-12)
    metric = record.metrics["psnr"]
    assert metric.value == pytest.approx(expected.mean()) and metric.unit == "dB" and metric.std is None
    assert metric.stderr == pytest.approx(expected.std(ddof=1) / np.sqrt(IMAGES))
    worst = [entry["psnr"] for entry in record.details["worst"]]  # type: ignore[index, union-attr]
    best = [entry["psnr"] for entry in record.details["best"]]  # type: ignore[index, union-attr]
    assert worst == sorted(table["psnr"])[:10] and best == sorted(table["psnr"], reverse=True)[:10]


def test_null_levels_are_those_of_one_colour(root: Path) -> None:
    record = measure(Shifted(9), root)
    _, images = originals(root)
    colour = images.double().mean(dim=(0, 2, 3)).round().to(torch.uint8)[None, :, None, None]
    painted = colour.expand(images.shape)
    assert record.metrics["psnr"].chance == pytest.approx(psnr(images, painted).mean().item(), rel=1e-12)
    own = images.double().mean(dim=(2, 3), keepdim=True).round().to(torch.uint8).expand(images.shape)
    assert record.details["psnr_own_mean_colour"] == pytest.approx(psnr(images, own).mean().item(), rel=1e-12)
    network = perceptual.ScenesTeacherFeatures(torch.device("cpu"))
    features, point = network(images).double().numpy(), network(painted[:1])[0].double().numpy()
    expected = ((features.mean(axis=0) - point) ** 2).sum() + np.trace(np.cov(features, rowvar=False))
    assert record.metrics["fd_scenes_teacher"].chance == pytest.approx(expected, rel=1e-6)


def test_more_damage_scores_worse_everywhere(root: Path) -> None:
    write_task(root, "tiny-all", kid=True, precision_recall=True)
    little, much = (measure(Noisy(step), root, task="tiny-all").metrics for step in (10, 80))
    assert set(little) == {
        "psnr", "ssim", "fd_scenes_teacher", "kd_scenes_teacher", "precision", "recall"
    }  # fmt: skip
    for name, metric in little.items():
        better = metric.value - much[name].value
        assert better >= 0 if metric.higher_is_better else better <= 0, name
    assert little["psnr"].value > much["psnr"].value and little["fd_scenes_teacher"].value > 0


def test_every_seed_is_another_noise_and_the_spread_is_told(root: Path) -> None:
    write_task(root, "tiny-three", seeds=3)
    record = measure(Noisy(30), root, task="tiny-three")
    metric = record.metrics["psnr"]
    assert len(set(metric.per_seed)) == 3 and metric.std is not None and metric.std > 0
    assert len(set(record.metrics["fd_scenes_teacher"].per_seed)) == 3
    found = outcomes_of(root, record)
    assert found.seeds == (0, 1, 2) and set(found.values) == {"psnr", "ssim"}
    seeds = found.values["psnr"]
    np.testing.assert_allclose(seeds.mean(axis=1), metric.per_seed)
    assert (seeds[0] != seeds[1]).all() and record.details["decodings"] == 3
    assert metric.stderr == pytest.approx(estimate(seeds).stderr)
    worst = [entry["psnr"] for entry in record.details["worst"]]  # type: ignore[index, union-attr]
    np.testing.assert_allclose(worst, sorted(seeds.mean(axis=0))[:10])


def test_a_decoder_without_noise_decodes_once_for_all_seeds(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(root, "tiny-three", seeds=3, kid=True)
    decoded, decode = [], PixelOracleTokenizer.decode

    def counting(self: Any, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        decoded.append(len(seeds))
        return (decode(self, tokens, seeds=seeds) + 9).clamp(0, 200)

    monkeypatch.setattr(PixelOracleTokenizer, "decode", counting)
    record = measure("pixel-oracle", root, task="tiny-three")
    assert sum(decoded) == IMAGES and record.details["decodings"] == 1 and record.seeds == (0, 1, 2)
    once = measure("pixel-oracle", root, "once")
    for name, metric in record.metrics.items():
        assert metric.std == 0 and len(set(metric.per_seed)) == 1 and len(metric.per_seed) == 3
        if name in once.metrics:
            assert metric.value == pytest.approx(once.metrics[name].value, rel=1e-12)
            assert metric.stderr == pytest.approx(once.metrics[name].stderr)
    assert outcomes_of(root, record).values["psnr"].shape == (3, IMAGES)


class Wrapped:
    """Hands everything on to another tokenizer."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Declared(Noisy):
    decodes_with_noise = False


def test_who_draws_noise_when_decoding() -> None:
    oracle = PixelOracleTokenizer(device="cpu")
    assert not decodes_with_noise(oracle) and not decodes_with_noise(Wrapped(oracle))
    assert decodes_with_noise(Noisy(3))  # a decoder of its own, whatever it inherits
    assert decodes_with_noise(Wrapped(SimpleNamespace())) and not decodes_with_noise(Declared(3))
    oracle.decode = Noisy(3).decode  # type: ignore[method-assign]
    assert decodes_with_noise(oracle)
    assert not decodes_with_noise(SimpleNamespace(decodes_with_noise=False))


@pytest.mark.parametrize(
    ("name", "noise", "options"),
    [
        ("comit-nano", True, {}),
        ("titok-nano", False, {}),
        ("vq-grid-nano", False, {}),
        ("flextok-d12-d12", True, {}),
        ("selftok-512", True, {}),
        ("selftok-512", False, {"decoder": "renderer"}),
        ("alit-small", False, {}),
    ],
)
def test_every_family_says_whether_it_draws_noise(name: str, noise: bool, options: dict[str, Any]) -> None:
    weights = None if name.endswith("nano") else "random"
    device = "cpu" if name.endswith("nano") else "meta"
    assert decodes_with_noise(load_tokenizer(name, weights=weights, device=device, **options)) == noise


def test_the_teacher_of_some_rows_is_no_judge_to_rank_by(root: Path) -> None:
    write_task(root, "tiny-all", kid=True, precision_recall=True)
    record = measure(Noisy(30), root, task="tiny-all")
    ranked = {name for name, metric in record.metrics.items() if not metric.unranked}
    assert ranked == {"psnr", "ssim"}
    stored = json.loads(record.to_json())["metrics"]
    assert stored["fd_scenes_teacher"]["unranked"] is True and "unranked" not in stored["psnr"]
    assert record.metrics["fd_scenes_teacher"].stderr is None
    assert Record.model_validate_json(record.to_json()).metrics == record.metrics


# ------------------------------------------------------------------- invariance


def test_batch_size_changes_nothing(root: Path) -> None:
    one = measure("comit-nano", root, "a", batch_size=7, **FAST)
    two = measure("comit-nano", root, "b", batch_size=64, overwrite="always", **FAST)
    assert values(one) == values(two) and one.protocol_digest == two.protocol_digest
    assert per_image(root, "a") == per_image(root, "b")
    assert one.metrics["psnr"].value < 100


SCRIPT = """
import os, sys
from pathlib import Path
import comit_bench.tasks.shards as shards
from comit_bench.pipeline.evaluate import run_jobs
from comit_bench.pipeline.session import Session
from comit_bench.pipeline.jobs import Settings, make_jobs

root, out, fail = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
shards.SHARD = 6
if fail == os.environ.get("RANK"):
    save, made = shards.save_columns, []
    def dying(path, columns):
        if len(made) == 2:
            os._exit(9)
        made.append(path)
        save(path, columns)
    shards.save_columns = dying
settings = Settings(output=out, data_root=root / "data", include=(root / "recipes",), cache=out / "cache",
                    progress=False, device="cpu", options={"steps": 2})
session = Session(settings)
outcome = run_jobs(make_jobs(["comit-nano"], ["tiny-back"], settings), session)
session.ranks.leave()
print(len(outcome.records), [str(error) for _, error in outcome.failures])
"""


def kept(out: Path) -> tuple[dict[str, Any], dict[str, list[Any]], dict[str, bytes]]:
    (record,) = (out / "records").rglob("*.json")
    metrics = json.loads(record.read_text(encoding="utf-8"))["metrics"]
    (images,) = (out / "records").rglob("*.parquet")
    stored = {path.name: path.read_bytes() for path in (out / "cache" / "references").glob("*.npz")}
    return metrics, dict(pq.read_table(images).to_pydict()), stored


def test_two_processes_and_a_death_change_no_bit(root: Path) -> None:
    alone, both, port = root / "alone", root / "both", free_port()
    one = start(SCRIPT, root, alone, 0, 1, 0)
    assert one.communicate(timeout=600)[0].startswith("1 []")
    # the second process dies in its third shard; a launcher would then end the first
    first, second = (start(SCRIPT, root, both, rank, 2, port, fail="1") for rank in (0, 1))
    assert second.wait(timeout=600) == 9
    first.kill()
    first.communicate()
    begun = list((both / "cache" / "unfinished").rglob("*.npz"))
    assert len(begun) >= 2 and not list((both / "records").rglob("*.json"))
    stamps = {path: path.stat().st_mtime_ns for path in begun}
    port = free_port()
    pair = [start(SCRIPT, root, both, rank, 2, port) for rank in (0, 1)]
    said = [process.communicate(timeout=600) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert said[0][0].startswith("1 []") and said[1][0].startswith("0 []")
    assert kept(both) == kept(alone)  # metrics, numbers per image, statistics of the originals
    assert len(kept(alone)[2]) == 1
    assert stamps and not list((both / "cache" / "unfinished").rglob("*.npz")), (
        "finished work is cleared away"
    )


def test_shards_that_are_there_are_not_computed_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", 6)
    whole = measure(Noisy(30), root, "whole")
    (root / "cache" / "references").rename(root / "first-references")
    decoded: list[int] = []
    decode, stop = Noisy.decode, 4

    def counting(self: Noisy, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        if len(decoded) == stop:
            raise KeyboardInterrupt
        decoded.append(len(seeds))
        return decode(self, tokens, seeds=seeds)

    monkeypatch.setattr(Noisy, "decode", counting)
    with pytest.raises(KeyboardInterrupt):
        measure(Noisy(30), root, "again")
    assert sum(decoded) == 4 * 6
    stop = 100
    record = measure(Noisy(30), root, "again")
    assert sum(decoded) == IMAGES
    assert values(record) == values(whole) and per_image(root, "again") == per_image(root, "whole")
    first = {path.name: path.read_bytes() for path in (root / "first-references").glob("*.npz")}
    assert references(root) == first


def test_tokenizers_share_the_statistics_of_the_originals(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = measure(Noisy(30), root, "alone")
    assert len(references(root)) == 1
    seen: list[int] = []
    call = perceptual.ScenesTeacherFeatures.__call__

    def counting(self: Any, images: Tensor) -> Tensor:
        seen.append(len(images))
        return call(self, images)

    monkeypatch.setattr(perceptual.ScenesTeacherFeatures, "__call__", counting)
    measure(Noisy(20), root, "second")
    assert sum(seen) == IMAGES + 1  # reconstructions and one plain image, no original
    again = measure(Noisy(30), root, "again")
    assert values(again) == values(alone)


# ------------------------------------------------- protocol, count, broken images


def test_the_column_says_resolution_and_number_of_images(root: Path) -> None:
    small = measure("pixel-oracle", root)
    large = measure(PixelOracleTokenizer(resolution=48, device="cpu"), root, "large")
    table = build_table([small, large])
    assert sorted(group.subtitle.split(", ")[1] for group in table.groups) == ["32 px", "48 px"]
    assert all(f"{IMAGES} images" in group.subtitle for group in table.groups)
    assert small.protocol["view"] == "as they are, 32 px"
    assert large.protocol["view"] == "centred square, 48 px, bilinear"


@pytest.mark.parametrize(
    ("recipe", "view"),
    [
        ("center_crop|resize(48,bicubic)", "centred square, 48 px, bicubic"),
        ("resize_short(48,bicubic)|center_crop(48)", "centred square, 48 px, bicubic"),
        ("center_crop(48)", "center_crop(48)"),
        ("resize(48,bicubic)", "resize(48,bicubic)"),
        ("resize_short(64,bicubic)|center_crop(48)", "resize_short(64,bicubic)|center_crop(48)"),
        ("center_crop|resize(32,bilinear)", "as they are, 32 px"),
        ("resize_short(32,bicubic)|center_crop(32)", "as they are, 32 px"),
        ("center_crop(16)|resize(32,bilinear)", "center_crop(16)|resize(32,bilinear)"),
    ],
)
def test_views(root: Path, recipe: str, view: str) -> None:
    settings = Settings(**settings_in(root))
    session = Session(settings)
    (job,) = make_jobs(["pixel-oracle"], ["tiny-back"], settings)
    roles = roles_of(job, session.data(job.dataset), settings)
    assert reconstruction.view_of(recipe, roles["report"]) == view


def test_a_count_takes_the_same_images_for_everyone_and_is_part_of_the_recipe(root: Path) -> None:
    write_task(root, "tiny-some", count=11)
    record = measure(Shifted(9), root, task="tiny-some")
    other = measure(Shifted(5), root, "other", task="tiny-some")
    assert record.metrics["psnr"].n == 11 and "11 images" in str(record.protocol["column"])
    assert per_image(root)["id"] == per_image(root, "other")["id"]
    assert len(set(per_image(root)["id"])) == 11
    tasks = find_tasks((root / "recipes",))
    assert tasks["tiny-some"].digest != tasks["tiny-back"].digest
    assert other.protocol_digest == record.protocol_digest


def test_broken_images_are_left_out_and_counted(root: Path) -> None:
    (root / "data" / "tiny" / "val" / "red_a" / "0003.png").write_bytes(b"no image")
    record = measure(Shifted(9), root)
    assert record.metrics["psnr"].n == IMAGES - 1 and record.counts is not None and record.counts.broken == 1
    assert len(per_image(root)["id"]) == IMAGES - 1
    assert not any("red_a/0003" in name for name in per_image(root)["id"])


def test_one_image_has_no_distance_between_sets(root: Path) -> None:
    record = measure(Shifted(9), root, limit=1)
    assert set(record.metrics) == {"psnr", "ssim"} and not record.complete
    assert any("at least two images" in note for note in record.notes)


# -------------------------------------------------------- refusals, missing files


def outcome_of(tokenizers: list[Any], root: Path) -> Any:
    settings = Settings(**settings_in(root), progress=False)
    return run_jobs(make_jobs(tokenizers, ["tiny-back"], settings), Session(settings))


def test_a_tokenizer_without_a_decoder_is_refused_and_the_rest_is_done(root: Path) -> None:
    without = PixelOracleTokenizer(device="cpu")
    without.info = replace(without.info, name="encoder")
    without.decode = None  # type: ignore[method-assign, assignment]
    refusing = EncoderOnly(device="cpu")
    refusing.info = replace(refusing.info, name="refuser")
    outcome = outcome_of([without, refusing, Shifted(9)], root)
    assert [record.tokenizer.name for record in outcome.records] == ["shifted-9"] and not outcome.failures
    assert len(outcome.refused) == 2
    assert re.search("encoder is left out of tiny-back: it has no decoder", outcome.refused[0])
    assert re.search("refuser is left out of tiny-back: it cannot decode .encoder only", outcome.refused[1])


def test_images_too_small_for_ssim_are_refused(root: Path) -> None:
    small = PixelOracleTokenizer(resolution=8, patch=4, device="cpu")
    (reason,) = outcome_of([small], root).refused
    assert "11 px" in reason and "8 px" in reason


def arguments(root: Path, task: str = "tiny-back") -> list[str]:
    places = ["--data-root", root / "data", "--include-path", root / "recipes", "--output", root / "out"]
    return [str(part) for part in ["run", *places, "--tasks", task, "-q", "--tokenizer", "pixel-oracle"]]


def test_missing_inception_weights_end_with_3_before_any_work(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(root, "tiny-rfid", features="inception")
    monkeypatch.setenv("TORCH_HOME", str(root / "torch"))
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(root / "cache"))
    monkeypatch.delenv(perceptual.INCEPTION_VARIABLE, raising=False)
    for named, told in ((None, "curl -L"), (str(root / "nowhere.pth"), "nowhere.pth: no such file")):
        if named:
            monkeypatch.setenv(perceptual.INCEPTION_VARIABLE, named)
        monkeypatch.setattr(sys, "argv", ["comit-bench", *arguments(root, "tiny-rfid")])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 3
        said = capsys.readouterr()
        assert told in said.out + said.err and perceptual.INCEPTION_URL in said.out + said.err
    assert not (root / "out").exists() and not (root / "cache" / "tokens").exists()


def test_rfid_with_weights_from_a_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task(root, "tiny-rfid", features="inception", ssim=False, count=4)
    path = write_random_inception(root / "inception.pth")
    monkeypatch.setenv(perceptual.INCEPTION_VARIABLE, str(path))
    monkeypatch.setattr(perceptual, "TILE", 2)
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 91)  # else it takes most of a minute
    record = measure(Noisy(60), root, task="tiny-rfid")
    assert set(record.metrics) == {"psnr", "rfid"} and record.metrics["rfid"].value > 0
    described = record.protocol["features"]
    assert isinstance(described, dict) and str(described["weights"]).startswith("sha256:")
    same = measure("pixel-oracle", root, "same", task="tiny-rfid")
    assert same.metrics["rfid"].value < 1e-6 < record.metrics["rfid"].value
    assert same.metrics["rfid"].chance == pytest.approx(record.metrics["rfid"].chance)


def test_other_weights_are_no_inception(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "small.pth")
    with pytest.raises(CorruptFileError, match="not the weights of torch-fidelity's Inception"):
        perceptual.InceptionFeatures(tmp_path / "small.pth", torch.device("cpu"))
    (tmp_path / "code.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CorruptFileError, match="not a readable weight file"):
        perceptual.read_plain_tensors(tmp_path / "code.pth")


def test_lpips_is_measured_when_its_weights_are_here_and_noted_when_not(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(root, "tiny-lpips", features=None, lpips="squeeze", count=5)
    monkeypatch.setenv("TORCH_HOME", str(root / "torch"))
    without = measure(Noisy(40), root, task="tiny-lpips")
    assert "lpips" not in without.metrics
    (note,) = [note for note in without.notes if "lpips" in note]
    assert "left_out" in note and "squeezenet1_1-b8a52dc0.pth" in note
    with pytest.raises(MissingError, match="LPIPS"):
        perceptual.load_lpips("squeeze", torch.device("cpu"))
    write_random_squeezenet(root / "torch")
    little, much = (measure(Noisy(s), root, f"o{s}", task="tiny-lpips").metrics["lpips"] for s in (20, 90))
    assert 0 < little.value < much.value and not little.higher_is_better
    same = measure("pixel-oracle", root, "same", task="tiny-lpips")
    assert same.metrics["lpips"].value == 0
    assert same.protocol_digest == without.protocol_digest or same.tokenizer != without.tokenizer


def test_doctor_says_which_judges_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    write_random_squeezenet(tmp_path)
    examine(None)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "lpips squeeze: ok" in lines
    assert any(
        line.startswith("lpips alex: the weights of its backbone are not here: curl") for line in lines
    )
    assert any(line.startswith("inception (rFID): missing") and "curl -L" in line for line in lines)


def test_sections_that_make_no_sense_are_refused(root: Path) -> None:
    base = {
        "name": "x", "version": 1, "title": "x", "kind": "reconstruction", "suite": "extra", "dataset": "tiny"
    }  # fmt: skip
    with pytest.raises(ValueError, match="name a network"):
        TaskSpec.model_validate({**base, "reconstruction": {"features": None, "kid": True}})
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        TaskSpec.model_validate({**base, "reconstruction": {"count": 1}})
    write_task(root, "tiny-wrong", features=None)
    recipe = root / "recipes" / "probes" / "tiny-wrong" / "task.yaml"
    text = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    recipe.write_text(yaml.safe_dump({**text, "main_metric": "rfid"}), encoding="utf-8")
    with pytest.raises(UsageError, match="rfid"):
        measure(Shifted(9), root, task="tiny-wrong")
