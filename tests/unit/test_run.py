"""The main job end to end on a tiny benchmark: exit codes, resume, bad input, invariance."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import TRAIN, VAL, write_images, write_recipes

import comit_bench
from comit_bench.commands import app as cli
from comit_bench.errors import BenchError, MissingError, UsageError
from comit_bench.pipeline.jobs import Settings
from comit_bench.pipeline.suite import DEFAULT_TOKENIZERS, choose_tasks
from comit_bench.results.records import load_records
from comit_bench.results.schema import Record

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Bench:
    """A tiny data root, recipes, a cache and an output directory."""

    root: Path

    def options(self, output: str = "out") -> dict[str, Any]:
        return {
            "data_root": self.root / "data",
            "include": (self.root / "recipes",),
            "cache": self.root / "cache",
            "output": self.root / output,
        }

    def arguments(self, output: str = "out") -> list[str]:
        places = ["--data-root", self.root / "data", "--include-path", self.root / "recipes"]
        chosen = ["--suite", "scenes", "--tasks", "tiny-colours", "--output", self.root / output]
        return [str(part) for part in [*places, *chosen]]

    def records(self, output: str = "out") -> dict[str, Record]:
        return {r.tokenizer.name: r for r in load_records(self.root / output / "records", strict=True)}

    def evaluate(self, *tokenizers: Any, output: str = "out", **settings: Any) -> dict[str, Record]:
        found = comit_bench.evaluate(
            list(tokenizers), ["tiny-colours"], suite="scenes", **{**self.options(output), **settings}
        )
        return {r.tokenizer.name: r for r in found}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    write_images(tmp_path / "data")
    write_recipes(tmp_path / "recipes")
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("comit_bench.probing.pool.usable_cores", lambda: 1)
    return Bench(tmp_path)


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run ``comit-bench <arguments>`` in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["comit-bench", *(str(a) for a in arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


Command = Callable[..., tuple[int, str, str]]


def scores(records: dict[str, Record]) -> dict[str, Any]:
    return {name: {k: m.per_seed for k, m in r.metrics.items()} for name, r in sorted(records.items())}


def shards(cache: Path) -> list[Path]:
    return sorted((cache / "tokens").rglob("*.safetensors"))


def test_run_prints_a_table_and_leaves_records(bench: Bench, command: Command) -> None:
    code, out, err = command("run", *bench.arguments(), "-q")
    assert code == 0, err
    records = bench.records()
    assert set(records) == {"majority", "pixel-oracle", *DEFAULT_TOKENIZERS}
    for name in records:
        assert name in out
    assert "136 images" in err and "tiny-colours" in err
    for suffix in ("csv", "md", "tex"):
        assert (bench.root / "out" / "tables" / f"table.{suffix}").is_file()
    oracle = records["pixel-oracle"]
    assert oracle.metrics["hue"].value > 90 and oracle.counts is not None
    assert oracle.counts.report == 4 * VAL
    assert oracle.counts.train + oracle.counts.early_stop == 4 * TRAIN
    assert records["majority"].metrics["top1"].value == 25.0
    assert records["kmeans-patch"].tokenizer.weights.startswith("fitted:")
    nano = records["comit-nano"]
    assert nano.tokenizer.trained and nano.complete and nano.tokenizer.weights.startswith("sha256:")


def test_scores_and_tokens_do_not_depend_on_batch_size_or_workers(bench: Bench) -> None:
    runs = []
    for size, workers in ((7, 0), (64, 0), (5, 2)):
        cache = bench.root / f"cache-{size}"
        found = bench.evaluate(
            "kmeans-patch",
            "comit-nano",
            output=f"out-{size}",
            cache=cache,
            batch_size=size,
            num_workers=workers,
            policy="global+adaptive:2",
        )
        files = {path.relative_to(cache): path.read_bytes() for path in shards(cache)}
        runs.append((scores(found), files))
    assert runs[0] == runs[1] == runs[2]


def test_second_run_computes_nothing_and_table_rebuilds_from_records_alone(
    bench: Bench, command: Command
) -> None:
    bench.evaluate("kmeans-patch")
    stamps = {path: path.stat().st_mtime_ns for path in bench.root.rglob("*") if path.is_file()}
    code, out, _ = command("run", *bench.arguments(), "--tokenizer", "kmeans-patch", "--resume", "-q")
    assert code == 0
    changed = {p for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp}
    # digests of files that had just been written are looked at once more
    assert not {p for p in changed if not {"tables", "digests"} & set(p.parts)}
    code, again, _ = command("table", bench.root / "out" / "records", "--output", bench.root / "again")
    assert code == 0 and again == out
    first = (bench.root / "out" / "tables" / "table.csv").read_bytes()
    assert (bench.root / "again" / "table.csv").read_bytes() == first


def test_overwrite_policies(bench: Bench, command: Command) -> None:
    base = ["run", *bench.arguments(), "--tokenizer", "pixel-oracle", "--no-references", "-q"]
    assert command(*base)[0] == 0
    (path,) = (bench.root / "out" / "records").rglob("*.json")
    before = path.read_bytes()
    code, _, err = command(*base, "--overwrite", "never")
    assert code == 1 and "has a record already" in err and path.read_bytes() == before
    time.sleep(1.1)  # `created` has a resolution of one second
    assert command(*base, "--overwrite", "always")[0] == 0 and path.read_bytes() != before
    code, _, err = command(*base, "--overwrite", "allways")
    assert code == 2 and "Did you mean 'always'" in err
    code, _, err = command(*base, "--overwrite", "always", "--resume")
    assert code == 2 and "--resume" in err


def test_limit_takes_images_of_every_class_and_marks_the_record(bench: Bench, command: Command) -> None:
    code, out, _ = command("run", *bench.arguments(), "--tokenizer", "kmeans-patch", "--limit", "70", "-q")
    assert code == 0 and "incomplete" in out
    record = bench.records()["kmeans-patch"]
    assert not record.complete and record.limit == 70 and record.counts is not None
    assert record.counts.train + record.counts.early_stop == 70 and record.counts.report == 40


def test_permuted_labels_change_the_record_not_the_original(bench: Bench) -> None:
    true = bench.evaluate("pixel-oracle", references=False)["pixel-oracle"]
    control = bench.evaluate("pixel-oracle", references=False, control="permute-labels")["pixel-oracle"]
    assert control.control == "permute-labels" and control.protocol_digest != true.protocol_digest
    assert scores({"": control}) != scores({"": true}) and len(bench.records()) == 1
    assert len(list((bench.root / "out" / "records").rglob("*.json"))) == 2


def test_a_tokenizer_object_works_like_a_name(bench: Bench) -> None:
    by_name = bench.evaluate("comit-nano", references=False)
    loaded = comit_bench.load_tokenizer("comit-nano", device="cpu")
    by_object = bench.evaluate(loaded, references=False, output="other", cache=bench.root / "cache2")
    assert scores(by_name) == scores(by_object)


def test_policy_is_part_of_the_protocol(bench: Bench) -> None:
    one = bench.evaluate("comit-nano", references=False)["comit-nano"]
    two = bench.evaluate("comit-nano", references=False, policy="raster:2")["comit-nano"]
    assert one.protocol["tokenizer"]["policy"] == "global"  # type: ignore[index,call-overload]
    assert two.protocol["tokenizer"]["policy"] == "raster:2"  # type: ignore[index,call-overload]
    assert len(list((bench.root / "out" / "records").rglob("*.json"))) == 2


def test_several_policies_make_a_row_each(bench: Bench, command: Command) -> None:
    names = ["--tokenizer", "comit-nano", "--tokenizer", "kmeans-patch", "--no-references"]
    policies = ["--policy", "global", "--policy", "raster:2", "--policy", "global"]
    code, out, err = command("run", *bench.arguments(), "-q", *names, *policies)
    assert code == 0, err
    assert "comit-nano (raster:2)" in out and "comit-nano (global)" in out and out.count("kmeans-patch") == 1
    assert len(list((bench.root / "out" / "records").rglob("*.json"))) == 3
    stores = shards(bench.root / "cache")
    assert len(stores) == 2 * 3  # train and val for two policies and for k-means
    found = comit_bench.evaluate(
        "comit-nano", ["tiny-colours"], suite="scenes", references=False, policy=["raster:2", "global"],
        **bench.options(),
    )  # fmt: skip
    assert len(found) == 2 and shards(bench.root / "cache") == stores


def test_profile_says_where_the_time_went(bench: Bench, command: Command) -> None:
    base = ["run", *bench.arguments(), "-q", "--tokenizer", "pixel-oracle", "--no-references", "--profile"]
    code, _, err = command(*base)
    assert code == 0 and "profile of tokenization" in err and "encoding" in err and "decoded images" in err
    assert "no image was tokenized" in command(*base)[2]


@pytest.mark.parametrize("control", ["shuffle-tokens", "bag-of-tokens"])
def test_controls_without_positions_have_records_of_their_own(bench: Bench, control: str) -> None:
    record = bench.evaluate("pixel-oracle", references=False, control=control, seeds=1)["pixel-oracle"]
    assert record.control == control and record.protocol["control"] == control
    assert record.metrics["hue"].value > 80  # colours need no places


def test_records_say_where_both_recipes_came_from(bench: Bench) -> None:
    task = bench.evaluate("majority", references=False)["majority"].task
    assert task.origin == task.dataset.origin == str(bench.root / "recipes")


def test_a_control_is_asked_for_by_the_command_not_by_a_recipe(bench: Bench, command: Command) -> None:
    path = bench.root / "recipes" / "probes" / "tiny-colours" / "task.yaml"
    path.write_text(path.read_text() + "control: permute-labels\n")
    with pytest.raises(UsageError, match="control: unknown key"):
        bench.evaluate("pixel-oracle", references=False)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--tokenizer", "comit-nanno"], 2, "Did you mean 'comit-nano'"),
        (["--tasks", "tiny-colors"], 2, "Did you mean 'tiny-colours'"),
        (["--suite", "scene"], 2, "Did you mean 'scenes'"),
        (["--policy", "spiral:3"], 2, "cropping policy"),
        (["--device", "tpu9"], 2, "auto, cpu, cuda"),
        (["--dtype", "float16"], 2, "float32"),
        (["--batch-size", "many"], 2, "number or auto"),
        (["--limit", "0"], 2, "at least 1"),
        (["--control", "shuffle"], 2, "permute-labels"),
        (["--tasks", ","], 2, "empty"),
        (["--option", "posterior"], 2, "KEY=VALUE"),
        (["--option", "postrior=mode"], 2, "Did you mean 'posterior'"),
        (["--option", "posterior=median"], 2, "mode or sample, got 'median'"),
        (["--include-path", "/nonexistent/recipes"], 2, "not a directory"),
        (["--weights", "/nonexistent/weights"], 3, "no such file or directory"),
        (["--tokenizer", "./nowhere"], 3, "no such directory"),
        (["--tokenizer", "cvg-unibe/comit-zz", "--offline"], 3, "cvg-unibe/comit-zz"),
        (["--tokenizer", "comit-l", "--offline"], 3, "cvg-unibe/comit-l"),
        (["--data-root", "/nonexistent/data"], 3, "tiny"),
    ],
)
def test_wrong_arguments_end_before_any_work(
    bench: Bench, command: Command, arguments: list[str], code: int, says: str
) -> None:
    got, out, err = command("run", *bench.arguments(), "-q", *arguments)
    assert (got, out) == (code, "") and says in err and "Traceback" not in err
    assert not (bench.root / "out").exists() and not (bench.root / "cache" / "tokens").exists()


def test_options_reach_the_tokenizer_and_its_protocol(bench: Bench, command: Command) -> None:
    code, *_ = command(
        "run", *bench.arguments(), "-q", "--tokenizer", "comit-nano", "--option", "posterior=sample"
    )
    assert code == 0
    side: Any = bench.records()["comit-nano"].protocol["tokenizer"]
    assert side["options"]["posterior"] == "sample"


def test_paper_suite_on_an_empty_root_lists_what_is_missing(tmp_path: Path, command: Command) -> None:
    code, _, err = command("run", "--data-root", tmp_path, "--dry-run", "--offline")
    assert code == 3 and err.count("missing: ") >= 3
    for name in ("imagenet100", "mscoco-pairs", "visual-genome"):
        assert f"dataset {name}:" in err
    assert "hf download google-t5/t5-base" in err and "comit-bench data download" in err


def test_dry_run_touches_nothing(bench: Bench, command: Command) -> None:
    code, out, err = command("run", *bench.arguments(), "--dry-run")
    assert code == 0 and out == "" and "time unknown" in err
    assert not (bench.root / "out").exists() and not (bench.root / "cache").exists()


def test_all_tasks_are_more_than_the_default_ones(tmp_path: Path) -> None:
    settings = Settings(output=tmp_path)
    usual = choose_tasks(None, "scenes", settings)
    assert usual == ["recognition-scenes", "pairs-scenes"]
    every = choose_tasks(["pairs-scenes", "all"], "scenes", settings)
    assert every[0] == "pairs-scenes" and len(every) == len(set(every)) and set(usual) < set(every)
    kinds = ("relations", "reconstruction", "gather", "objectness", "retrieval", "codebook", "counterfactual")
    assert set(every) - set(usual) == {f"{kind}-scenes" for kind in kinds}
    assert not any(task.endswith("-scenes") for task in choose_tasks(["all"], "paper", settings))


def test_the_plan_says_what_a_tokenizer_cannot_do(tmp_path: Path, command: Command) -> None:
    asked = ("--suite", "scenes", "--tasks", "recognition-scenes,reconstruction-scenes,objectness-scenes")
    code, _, err = command("run", "--dry-run", "--output", tmp_path, "-t", "comit-nano", *asked)
    assert code == 0
    assert "objectness-scenes: pixel-oracle is left out: its adapter gives no attention" in err
    assert "objectness-scenes: comit-nano: 200 images, 1 seed" in err
    assert "reconstruction-scenes: comit-nano: 500 images, 3 seeds" in err
    assert err.count("majority (labels only)") == 1, "where nothing is fitted nobody can guess labels"
    code, _, err = command("run", "--dry-run", "--output", tmp_path, "--control", "permute-labels", *asked)
    assert code == 0 and "reconstruction-scenes" not in err
    code, _, err = command("run", "--control", "bag-of-tokens", "--tasks", "objectness-scenes", "--dry-run")
    assert code == 2 and "is about probes" in err


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def test_few_broken_images_are_left_out_and_counted(bench: Bench, command: Command) -> None:
    truncate(bench.root / "data" / "tiny" / "train" / "red_a" / "0003.png")
    (bench.root / "data" / "tiny" / "val" / "red_b" / "0001.png").write_text("not an image")
    code, _, err = command("run", *bench.arguments(), "--tokenizer", "kmeans-patch", "-q")
    assert code == 0 and "0003.png" in err and "left out" in err
    counts = bench.records()["kmeans-patch"].counts
    assert counts is not None and counts.broken == 2
    assert counts.train + counts.early_stop == 4 * TRAIN - 1 and counts.report == 4 * VAL - 1


def test_many_broken_images_fail_the_task_and_keep_the_rest(bench: Bench, command: Command) -> None:
    for path in sorted((bench.root / "data" / "tiny" / "train" / "red_a").glob("*.png"))[:12]:
        truncate(path)
    code, out, err = command("run", *bench.arguments(), "--tokenizer", "kmeans-patch", "-q")
    assert code == 1 and "max_broken" in err and "12 of 96" in err
    assert "majority" in out and set(bench.records()) == {"majority"}


def test_class_folder_without_images(bench: Bench, command: Command) -> None:
    (bench.root / "data" / "tiny" / "train" / "green_a").mkdir()
    code, _, err = command("run", *bench.arguments(), "-q")
    assert code in (1, 2) and "green_a" in err and "Traceback" not in err


def test_recipe_with_an_unknown_key(bench: Bench, command: Command) -> None:
    path = bench.root / "recipes" / "probes" / "tiny-colours" / "task.yaml"
    path.write_text(path.read_text().replace("width:", "widht:"))
    code, _, err = command("run", *bench.arguments(), "-q")
    assert code == 2 and "probe.widht" in err and "'width'" in err and str(path) in err


def test_corrupt_shard_is_computed_again(bench: Bench, command: Command) -> None:
    first = bench.evaluate("comit-nano")
    damaged = shards(bench.root / "cache")[0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-3] + b"abc")
    again = bench.evaluate("comit-nano", overwrite="always")
    assert scores(first) == scores(again) and damaged.read_bytes() == whole


def test_full_disk_is_one_message_and_the_next_run_continues(
    bench: Bench, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if "tokens" in target.parts and target.suffix == ".safetensors":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        code, out, err = command("run", *bench.arguments(), "--tokenizer", "kmeans-patch", "-q")
    assert code == 1 and "disk is full" in err and "Traceback" not in err
    assert set(bench.records()) == {"majority"} and "majority" in out
    assert command("run", *bench.arguments(), "--tokenizer", "kmeans-patch", "-q")[0] == 0
    assert "kmeans-patch" in bench.records()


def start(bench: Bench, output: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "COMIT_BENCH_CACHE": str(bench.root / output), "OMP_NUM_THREADS": "1"}
    arguments = [*bench.arguments(output), "-q", "--tokenizer", "kmeans-patch", "--tokenizer", "comit-nano"]
    return subprocess.Popen(
        [sys.executable, "-m", "comit_bench.run", *arguments],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def wait_for(path: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if any(path.rglob(pattern)):
            return
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    raise AssertionError(f"no {pattern} under {path} after a minute")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_run_continues_where_it_was(bench: Bench, how: signal.Signals) -> None:
    name = f"run-{how.name}"
    process = start(bench, name)
    wait_for(bench.root / name / "records", "*.json", process)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    if how is signal.SIGINT:
        assert process.returncode == 130 and "same command continues" in err and "Traceback" not in err
    kept = {p: p.read_bytes() for p in (bench.root / name / "records").rglob("*.json")}
    assert kept
    settings = {"output": name, "cache": bench.root / name}
    after = bench.evaluate("kmeans-patch", "comit-nano", **settings)
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert scores(after) == scores(bench.evaluate("kmeans-patch", "comit-nano"))


def test_python_interface_raises_what_the_command_line_prints(bench: Bench) -> None:
    with pytest.raises(UsageError, match="Did you mean"):
        bench.evaluate("comit-nanno")
    with pytest.raises(MissingError):
        bench.evaluate("kmeans-patch", data_root=bench.root / "nowhere")
    for path in (bench.root / "data" / "tiny" / "train" / "red_a").glob("*.png"):
        truncate(path)
    with pytest.raises(BenchError, match="max_broken"):
        bench.evaluate("kmeans-patch")
    assert set(bench.records()) == {"majority"}


def test_checkpoint_directory_as_tokenizer(bench: Bench, command: Command) -> None:
    tokenizer: Any = comit_bench.load_tokenizer("comit-nano", weights="random", device="cpu")
    tokenizer.save(bench.root / "mine")
    assert load_file(bench.root / "mine" / "model.safetensors")
    code, out, _ = command(
        "run", *bench.arguments(), "--tokenizer", bench.root / "mine", "-q", "--no-references"
    )
    assert code == 0 and "mine" in out
    (record,) = bench.records().values()
    assert record.tokenizer.weights.startswith("sha256:")


def test_ls_doctor_validate(bench: Bench, command: Command) -> None:
    assert command("ls", "tokenizers", "--names")[1].split()[:3] == ["comit-b", "comit-l", "comit-xl"]
    lines = {
        line.split()[0]: line.split() for line in command("ls", "tokenizers")[1].splitlines() if line.split()
    }
    assert "yes" in lines["comit-nano"] and "no" in lines["comit-l"] and "no" in lines["alit-small"]
    assert "imagenet100" in command("ls", "tasks")[1]
    code, _, err = command("ls", "probs")
    assert code == 2 and "tasks" in err
    code, out, _ = command("doctor")
    assert code == 0 and "cvg-unibe/comit-l" in out and "imagenet100: missing" in out
    recipe = bench.root / "recipes" / "probes" / "tiny-colours" / "task.yaml"
    bench.evaluate("pixel-oracle")
    record = next((bench.root / "out" / "records").rglob("*.json"))
    dataset = ROOT / "datasets" / "imagenet100" / "dataset.yaml"
    assert command("validate", dataset, record)[0] == 0
    content = json.loads(record.read_text())
    content["metrics"]["top1"]["value"] = 99.0
    record.write_text(json.dumps(content))
    recipe.write_text(recipe.read_text() + "extra: 1\n")
    code, out, _ = command("validate", recipe, record)
    assert code == 2 and out.count("BAD") == 2 and "extra" in out and "per_seed" in out


def test_table_without_records(tmp_path: Path, command: Command) -> None:
    code, _, err = command("table", tmp_path)
    assert code == 3 and "no records" in err


def test_version_and_help(command: Command) -> None:
    assert command("--version")[1].split()[0] == comit_bench.__version__
    code, out, _ = command("run", "--help")
    assert code == 0 and "--tokenizer" in out and "--dry-run" in out


def test_threads_do_not_change_tokens(bench: Bench) -> None:
    before = torch.get_num_threads()
    tokenizer = comit_bench.load_tokenizer("comit-nano", weights="random", device="cpu")
    images = torch.randint(0, 256, (11, 3, 32, 32), dtype=torch.uint8)
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(tokenizer.encode(images).ids)
        assert torch.equal(found[0], found[1])  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)


def test_a_data_set_is_scanned_once(bench: Bench, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from comit_bench.pipeline import session

    opened, real = [], session.open_dataset
    monkeypatch.setattr(session, "open_dataset", lambda *a, **k: opened.append(1) or real(*a, **k))
    assert command("run", *bench.arguments(), "-q", "--tokenizer", "kmeans-patch")[0] == 0
    assert len(opened) == 1


RELATIONS = """
name: small-relations
version: 1
title: r
kind: relations
suite: scenes
dataset: small-relations
split: {early_stop: {source: train, fraction: 0.5}}
probe: {width: 16, depth: 1, heads: 2, mlp_ratio: 1, batch_size: 16, max_epochs: 2}
negatives: {train: 3, report: 3, predicate: 2}
seeds: 2
"""


def test_relations_have_a_blind_row_and_other_kinds_have_none(bench: Bench, command: Command) -> None:
    folder = bench.root / "recipes" / "probes" / "small-relations"
    folder.mkdir(parents=True)
    (folder / "task.yaml").write_text(RELATIONS)
    data = bench.root / "recipes" / "datasets" / "small-relations"
    data.mkdir(parents=True)
    text = (ROOT / "datasets" / "scenes-relations" / "dataset.yaml").read_text()
    for old, new in (
        ("scenes-relations", "small-relations"),
        ("train: 3000", "train: 48"),
        ("val: 750", "val: 24"),
    ):
        text = text.replace(old, new)
    (data / "dataset.yaml").write_text(
        "\n".join(line for line in text.splitlines() if "checksum" not in line)
    )
    asked = ["run", *bench.arguments(), "-t", "pixel-oracle", "-q"]
    asked[asked.index("tiny-colours")] = "tiny-colours,small-relations"
    code, out, err = command(*asked)
    assert code == 0, err
    assert "small-relations: blind: no image, 2 probe seeds, time unknown" in err
    assert "tiny-colours: blind" not in err
    found = {(r.tokenizer.name, r.task.name): r for r in load_records(bench.root / "out" / "records")}
    assert set(found) == {
        *((name, "tiny-colours") for name in ("majority", "pixel-oracle")),
        *((name, "small-relations") for name in ("majority", "blind", "pixel-oracle")),
    }
    row = found["blind", "small-relations"]
    assert row.tokenizer.kind == "reference" and row.seeds == (0, 1) and row.counts is not None
    assert row.metrics["top1@4"].value == pytest.approx(row.metrics["top1@4"].chance, abs=0.1)
    assert any(note.startswith("best_epoch") for note in row.notes) and row.outcomes is not None
    assert "blind" in out
    code, _, err = command(*asked, "--dry-run")
    assert "no image, 2 probe seeds, about" in err, "the time that it took is known"
    code, _, err = command("run", *bench.arguments(), "-t", "blind", "--no-references")
    assert code == 2 and "tiny-colours asks more than blind can answer" in err
