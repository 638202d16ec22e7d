"""What the plan says before anything is done, and that ``doctor`` says the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import write_images, write_recipes

from comit_bench.commands import app as cli
from comit_bench.pipeline.evaluate import run_jobs
from comit_bench.pipeline.jobs import Job, Settings, make_jobs
from comit_bench.pipeline.plan import describe, make_plan
from comit_bench.pipeline.record import expected_seconds, images_of, note_seconds
from comit_bench.pipeline.session import Session

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``comit-bench <arguments>`` in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["comit-bench", *(str(a) for a in arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def settings_of(root: Path, **changes: Any) -> Settings:
    places = {"data_root": root / "data", "include": (root / "recipes",), "cache": root / "cache"}
    return Settings(**{"output": root / "out", "progress": False, **places, **changes})


def tiny(root: Path, **changes: Any) -> tuple[Settings, list[Job]]:
    write_images(root / "data", train=6, val=3)
    write_recipes(root / "recipes", **changes)
    settings = settings_of(root)
    return settings, make_jobs(["majority", "pixel-oracle"], ["tiny-colours"], settings)


def lines_of(jobs: list[Job], settings: Settings) -> list[str]:
    return describe(make_plan(jobs, Session(settings)), settings, suite="scenes", why="")


def test_every_job_is_listed_with_what_it_waits_for(tmp_path: Path, command: Command) -> None:
    code, _, err = command(
        *("run", "--suite", "paper", "--data-root", tmp_path, "--offline", "--dry-run"),
        *("-t", "comit-l", "-t", "kmeans-patch", "--tasks", "imagenet100,visual-genome"),
    )
    assert code == 3
    lines = [line.strip() for line in err.splitlines()]
    assert "imagenet100: majority waits for data" not in lines
    for line in (
        "imagenet100: majority: waits for data",
        "imagenet100: comit-l: waits for data and weights",
        "imagenet100: kmeans-patch: waits for data",
        "visual-genome: majority: waits for data and what the task needs",
        "visual-genome: blind: waits for data and what the task needs",
        "visual-genome: comit-l: waits for data and what the task needs and weights",
        "visual-genome: kmeans-patch: waits for data and what the task needs",
    ):
        assert line in lines, line
    assert not any(line.startswith("imagenet100: blind") for line in lines)
    missing = [line for line in lines if line.startswith("missing: ")]
    assert len(missing) == len(set(missing)) == 4  # two data sets, T5, comit-l: each once


def test_rows_that_cannot_be_are_left_out_in_the_plan(tmp_path: Path, command: Command) -> None:
    asked = ("--suite", "scenes", "--tasks", "objectness-scenes,counterfactual-scenes", "--output", tmp_path)
    code, _, err = command("run", "--dry-run", "-t", "kmeans-patch", *asked)
    assert code == 0
    assert "counterfactual-scenes: kmeans-patch is left out: it is fitted on training images, and " in err
    assert "scenes-counterfactual has no split 'train' (it has val)" in err
    assert not any(line.startswith("  counterfactual-scenes: kmeans-patch:") for line in err.splitlines())


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("patch=0", "patch 0"),
        ("vocab=0", "vocab"),
        ("vocab=1.5", "vocab"),
        ("resolution=9999999", "resolution"),
    ],
)
def test_settings_of_a_fit_are_checked_in_the_plan(
    option: str, words: str, tmp_path: Path, command: Command
) -> None:
    code, _, err = command("run", "--dry-run", "-t", "kmeans-patch", "--option", option, "--output", tmp_path)
    assert code == 2 and words in err and err.count("error: ") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": {"train": "training"}}, "split 'training' does not exist in tiny (it has train, val)"),
        ({"split": {"report": "test"}}, "split 'test' does not exist"),
        ({"split": {"early_stop": {"source": "dev"}}}, "split 'dev' does not exist"),
        (
            {"kind": "multilabel", "attributes": None},
            "needs data of kind multilabel, but tiny is of kind 'classes'",
        ),
        ({"dataset": "tinny"}, "unknown dataset 'tinny'. Did you mean 'tiny'"),
        ({"title": ""}, "title"),
        ({"title": "a\nb"}, "title"),
        ({"seeds": True}, "seeds is true"),
    ],
)
def test_recipes_that_do_not_fit_their_data(
    changes: dict[str, Any], words: str, tmp_path: Path, command: Command
) -> None:
    write_images(tmp_path / "data", train=2, val=2)
    write_recipes(tmp_path / "recipes", **changes)
    places = ("--data-root", tmp_path / "data", "--include-path", tmp_path / "recipes")
    code, _, err = command("run", *places, "--tasks", "tiny-colours", "-t", "kmeans-patch", "--dry-run")
    assert code == 2 and "task.yaml" in err and words in err
    code, out, _ = command("validate", tmp_path / "recipes" / "probes" / "tiny-colours" / "task.yaml")
    assert code == 2 and out.startswith("BAD ") and words in out


def test_validate_knows_the_data_sets_beside_a_recipe(tmp_path: Path, command: Command) -> None:
    write_recipes(tmp_path / "recipes")
    code, out, _ = command("validate", tmp_path / "recipes" / "probes" / "tiny-colours" / "task.yaml")
    assert code == 0 and "TaskSpec tiny-colours version 1" in out


def test_times_are_those_of_this_machine_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comit_bench.probing.pool.usable_cores", lambda: 1)
    settings, jobs = tiny(tmp_path, seeds=1)
    before = lines_of(jobs, settings)
    assert "  tiny-colours: pixel-oracle: 36 images, 1 probe seeds, time unknown" in before
    assert any("time unknown: nothing like it" in line for line in before)
    assert len(run_jobs(jobs, Session(settings)).records) == 2
    (note,) = (tmp_path / "cache" / "seconds").glob("*.json")
    noted = json.loads(note.read_text())
    assert noted["images"] == noted["encoded"] == 36 and noted["seconds"] > 0
    after = lines_of(jobs, settings)
    assert any(
        line.startswith("  tiny-colours: pixel-oracle: 36 images, 1 probe seeds, about ") for line in after
    )
    assert any(line.startswith("  in all about ") for line in after)


def test_times_scale_with_images_but_not_far(tmp_path: Path) -> None:
    settings, jobs = tiny(tmp_path)
    job = jobs[1]
    assert expected_seconds(job, settings, 100) is None
    note_seconds(job, settings, seconds=50.0, images=100, encoded=100)
    assert expected_seconds(job, settings, 200) == 100.0
    assert expected_seconds(job, settings, 10) == 5.0
    assert expected_seconds(job, settings, 5000) is None  # what takes 8 images a second may not take 5,000 so
    note_seconds(job, settings, seconds=1.0, images=100, encoded=0)  # a repetition finds its tokens made
    assert expected_seconds(job, settings, 100) == 50.0
    note_seconds(job, settings, seconds=3.0, images=8, encoded=8)
    assert expected_seconds(job, settings, 100) == 50.0
    note_seconds(job, settings, seconds=60.0, images=100, encoded=100)
    assert expected_seconds(job, settings, 100) == 60.0
    for change in ({"device": "cpu", "seeds": 7}, {"options": {"patch": 4}}, {"weights": "random"}):
        assert expected_seconds(job, settings_of(tmp_path, **change), 100) is None
    assert images_of(job, {"train": 1000, "val": 30}, settings_of(tmp_path, limit=50)) == 80
    for path in (tmp_path / "cache" / "seconds").glob("*.json"):
        path.write_text("{")
    assert expected_seconds(job, settings, 100) is None


# --------------------------------------------------------------------------------------- doctor


def missing_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if line.strip().startswith("missing: ")}


def test_doctor_says_what_the_paper_suite_says(tmp_path: Path, command: Command) -> None:
    ran, _, err = command("run", "--data-root", tmp_path, "--offline", "--dry-run")
    code, out, _ = command("doctor", "--data-root", tmp_path)
    assert code == ran == 3
    asked = {line.replace("--offline forbids a download", "were not fetched") for line in missing_lines(err)}
    assert asked and asked <= missing_lines(out)
    assert "google-t5/t5-base" in out and "  paper: MISSING (what `comit-bench run` does here" in out


def test_doctor_without_a_data_root_is_about_the_scenes(command: Command) -> None:
    ran, *_ = command("run", "--dry-run")
    code, out, _ = command("doctor")
    assert code == ran == 0
    assert "  scenes: ok (what `comit-bench run` does here" in out
    assert "  paper: MISSING\n" in out and "google-t5/t5-base" in out
    assert "visual-genome: comit-nano waits for data and what the task needs" in out


def test_doctor_finds_the_suite_that_lacks_only_the_text_encoder(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All data are there, T5 is not: this is what doctor once called well."""
    monkeypatch.setattr(
        "comit_bench.pipeline.plan.data_state", lambda recipe, session, dry: ("found", {"train": 5, "val": 5})
    )
    monkeypatch.setattr("comit_bench.data.pieces.missing_pieces", lambda spec, root: [])
    ran, _, err = command("run", "--data-root", tmp_path, "--offline", "--dry-run")
    code, out, _ = command("doctor", "--data-root", tmp_path)
    assert code == ran == 3 and len(missing_lines(err)) == 1 and "google-t5/t5-base" in err
    assert "google-t5/t5-base" in out


def test_doctor_names_extras(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError, version

    def without(name: str) -> str:
        if name in ("torchmetrics", "tensorboard"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("comit_bench.commands.listing.version", without)
    code, out, _ = command("doctor")
    assert code == 0
    assert "  missing  torchmetrics, needed for rFID and LPIPS: pip install 'comit-bench[metrics]'" in out
    assert "  missing  tensorboard, needed for training curves in TensorBoard" in out


@pytest.mark.parametrize("policy", ["raster:0", "raster:", "spiral:3", "order:99", "raster:²", "9" * 5000])
def test_policies_are_checked_in_the_plan(policy: str, tmp_path: Path, command: Command) -> None:
    code, _, err = command("run", "--dry-run", "-t", "comit-nano", "--policy", policy, "--output", tmp_path)
    assert code == 2 and err.startswith("error: --policy '") and len(err) < 1000
