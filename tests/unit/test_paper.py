"""``comit-bench paper``: the plan needs nothing, docs/paper.md is the plan, and all of it runs on scenes."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from comit_bench.commands import app as cli
from comit_bench.commands.paper import do_parts
from comit_bench.commands.paper_parts import PaperPart, PaperStep, choose_parts, make_cast, make_parts
from comit_bench.commands.paper_plan import StepPlan, plan_parts, preset_costs, total_cost
from comit_bench.errors import BenchError, MissingError, UnsupportedOperation, UsageError
from comit_bench.pipeline.jobs import Settings
from comit_bench.recipes.specs import find_tasks
from comit_bench.results.records import load_records
from comit_bench.results.render.paper import COMPARED, POLICIES, policy_words
from comit_bench.tokenizers.comit.crops import GLOBAL, parse_policy
from comit_bench.tokenizers.registry import tokenizers
from comit_bench.train.config import load_config

ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ((?:Table|Figure) [^|]+) \| [^|]+ \| ([^|]+) \|$", DOCS, flags=re.M)
COMMANDS = [(name, re.findall(r"`(comit-bench [^`]+)`", cell)) for name, cell in ROWS]
PARTS = make_parts(make_cast("paper"))

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``comit-bench <arguments>`` in this process: exit code, stdout, stderr."""
    monkeypatch.setattr("comit_bench.probing.pool.usable_cores", lambda: 1)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["comit-bench", *(str(a) for a in arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


# -------------------------------------------------------------------------------------------- docs


def test_docs_have_every_table_and_figure_once_and_the_commands_of_the_plan() -> None:
    names = [name for name, _ in ROWS]
    figures = ["1", "2", "3", "4", "5 (a)", "5 (b)", "5 (c)", *map(str, range(6, 11))]
    assert names == [*(f"Table {n}" for n in range(1, 7)), *(f"Figure {n}" for n in figures)]
    chosen = [
        word.split("--only ")[1].split()[0] for _, words in COMMANDS for word in words if "--only" in word
    ]
    assert chosen == [part.name for part in PARTS]
    listing = DOCS.split("```bash\n")[1].split("```")[0].strip()
    assert listing == "\n\n".join(
        "\n".join([f"# {part.name}", *(step.text() for step in part.steps)]) for part in PARTS
    )


def embedded(typed: str, output: Path) -> list[str]:
    """A command of the docs' table on the embedded suite, in its tiny form: the rule of docs/paper.md."""
    words = shlex.split(typed)[1:]
    if words[0] == "paper":
        at = words.index("--data-root")
        tiny = ["--suite", "scenes", "--limit", "16", "--seeds", "1", "--quiet", "--output", str(output)]
        return [*words[:at], *words[at + 2 :], *tiny]
    if words[0] == "train":
        return ["train", "--config", "comit-nano", "--dry-run"]
    standing = {"imagenet100": "recognition", "mscoco-pairs": "pairs", "visual-genome": "relations"}
    return [
        str(ROOT / re.sub("|".join(standing), lambda found: f"{standing[found[0]]}-scenes", word))
        if word.startswith("probes/")
        else word
        for word in words
    ]


def test_every_command_of_the_docs_has_a_plan_on_the_embedded_suite(command: Command, tmp_path: Path) -> None:
    for _, typed in ((name, words) for name, several in COMMANDS for words in several):
        words = embedded(typed, tmp_path / "out")
        code, out, err = command(*words, *(["--dry-run"] if words[0] == "paper" else []))
        assert code == 0, err
        assert words[0] != "paper" or "nothing is missing" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "typed"), [(n, w) for n, words in COMMANDS for w in words], ids=lambda v: v[:34]
)
def test_every_command_of_the_docs_runs_on_the_embedded_suite(
    name: str, typed: str, command: Command, tmp_path: Path
) -> None:
    code, out, err = command(*embedded(typed, tmp_path / "out"))
    assert code == 0, err
    assert "failed:" not in err and "left out:" not in err
    if "paper" not in typed:
        return
    part = choose_parts(make_parts(make_cast("scenes")), [typed.split("--only ")[1].split()[0]])[0]
    for step in part.steps:
        if step.command[0] == "figure":
            assert list((tmp_path / "out" / step.output).glob("*.pdf")), step.text()
        else:
            assert list((tmp_path / "out").rglob("records/*/*.json")), step.text()
    if name.startswith("Table"):
        assert f"{name}: " in out and (tmp_path / "out" / "tables" / "table-paper.tex").is_file()


def test_the_ablation_tables_are_made_by_one_command(command: Command, tmp_path: Path) -> None:
    options = ["--suite", "scenes", "--limit", "16", "--seeds", "1", "--quiet", "--output", tmp_path]
    code, out, err = command("paper", "--only", "table-1,table-2", "--tokenizer", "comit-nano", *options)
    assert code == 0, err
    names = {record.tokenizer.name for record in load_records(tmp_path / "records")}
    assert names == {"comit-nano", "comit-nano-no-srepa", "comit-nano-no-local-crops"}
    assert "Table 1: " in out and "Table 2: " in out and "Table 3: " not in out
    assert "comit-bench run --tokenizer comit-nano" in err
    again, out_again, _ = command("paper", "--only", "table-1,table-2", "--tokenizer", "comit-nano", *options)
    assert (again, out_again) == (0, out)


# -------------------------------------------------------------------------------------------- plan


def test_the_plan_needs_neither_data_nor_weights(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("comit_bench.tokenizers.presence.hub_state", lambda *args: "no")
    monkeypatch.setattr("comit_bench.tokenizers.hub.cached", lambda repository, name: None)
    code, out, err = command("paper", "--dry-run")
    assert (code, err) == (0, "")
    for part in PARTS:
        assert f"\n{part.name}: " in out
        for step in part.steps:
            assert step.text() in out
    missing = out.split("missing, and how to get it:")[1]
    for name in COMPARED:
        assert f"comit-bench weights fetch {name}\n" in missing
    for name in ("selftok-512-renderer", "sd3-vae"):
        assert f"comit-bench weights fetch {name}" in missing
    for name in ("mscoco-pairs", "visual-genome", "cssd"):
        assert f"comit-bench data download {name}" in missing
    for ablation in ("no-srepa", "no-local-crops", "bottleneck-s", "bottleneck-m"):
        assert f"comit-bench train --config comit-b-{ablation}" in missing
    assert "image-net.org" in missing and "google-t5/t5-base" in missing and "nception" in missing
    assert "photographs" in missing and "PFLOP" in out and "in all: " in out
    assert not list(tmp_path.iterdir())


def test_what_is_here_is_no_longer_missing(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    ablation = tmp_path / "runs" / "comit-b-no-srepa" / "export" / "comit-b-no-srepa"
    ablation.mkdir(parents=True)
    parts = make_parts(make_cast("paper", (), tmp_path / "runs"))
    plans = plan_parts(choose_parts(parts, ["table-1", "figure-7"]), Settings(data_root=tmp_path))
    names = {need.name for _, steps in plans for plan in steps for need in plan.needs if need.required}
    assert names == {"weights comit-b", "weights comit-xl", "data imagenet100"}


def test_without_anything_nothing_is_done_and_the_exit_code_says_so(command: Command, tmp_path: Path) -> None:
    code, out, err = command("paper", "--data-root", tmp_path, "--output", tmp_path / "out", "--offline")
    assert code == 3 and "left out: table-4" in err and "failed" not in err
    assert all(f"Table {n}: " in out for n in range(1, 5))  # the published ones
    assert not (tmp_path / "out" / "records").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--only", "table-5"], 2, "Did you mean 'table-4'"),
        (["--only", ","], 2, "empty list"),
        (["--suite", "scene"], 2, "Did you mean 'scenes'"),
        (["--tokenizer", "comit-nanno"], 2, "Did you mean 'comit-nano'"),
        (["--tokenizer", "./nowhere"], 3, "no such directory"),
    ],
)
def test_wrong_arguments_end_before_any_work(
    command: Command, arguments: list[str], code: int, says: str
) -> None:
    got, out, err = command("paper", "--dry-run", *arguments)
    assert (got, out) == (code, "") and says in err


def test_every_job_of_the_paper_has_a_cost_and_shared_ones_count_once() -> None:
    settings = Settings()
    total, unknown = total_cost([step for part in PARTS for step in part.steps], settings)
    parts = [total_cost(part.steps, settings)[0] for part in PARTS]
    assert not unknown and 0 < total.flops < sum(part.flops for part in parts)
    for part, cost in zip(PARTS, parts, strict=True):
        assert bool(cost.flops) == any(step.command[0] != "figure" for step in part.steps), part.name
    assert set(COMPARED) <= set(preset_costs())
    limited, _ = total_cost(PARTS[0].steps, Settings(limit=100))
    assert limited.images == 2 * 200 and limited.flops < parts[0].flops / 100


def test_own_tokenizers_take_all_roles() -> None:
    cast = make_cast("scenes", ["titok-nano", "comit-nano"])
    assert cast.rows == cast.base == cast.shown == ("titok-nano", "comit-nano")
    assert cast.no_srepa == ("comit-nano-no-srepa",)
    parts = {part.name: part for part in make_parts(cast)}
    assert parts["table-3"].steps[0].tokenizers == ("comit-nano",)  # the other one does not look at crops
    assert [step.tokenizers for step in parts["figure-7"].steps] == [("titok-nano",), ("comit-nano",)]
    assert make_parts(make_cast("scenes", ["titok-nano"]))[2].steps == ()
    (one_size,) = choose_parts(make_parts(make_cast("scenes", ["comit-nano"])), ["figure-5c"])
    assert one_size.steps == () and "one size" in one_size.lacking
    (step,) = make_parts(make_cast("paper", ["comit-b"]))[3].steps
    assert "--option" not in step.argv()  # no SelfTok takes part


def test_both_suites_have_the_same_parts_and_existing_names() -> None:
    scenes = make_parts(make_cast("scenes"))
    assert [part.name for part in scenes] == [part.name for part in PARTS]
    known = find_tasks()
    for part in (*scenes, *PARTS):
        for step in part.steps:
            assert set(step.tasks) <= set(known)
            assert all(name in tokenizers() or name.startswith("runs/") for name in step.tokenizers)
    assert make_cast("paper").rows == COMPARED


# --------------------------------------------------------------------------------------- execution


def step(name: str, *, follows: bool = False) -> PaperStep:
    return PaperStep(command=("figure", name), tokenizers=() if follows else ("x",), follows=follows)


def run(plans: Sequence[StepPlan], answers: dict[str, Any]) -> tuple[Any, list[str]]:
    """Outcome and the commands that were called; an answer is an exit code or an error."""
    called = []

    def invoke(words: Sequence[str]) -> int:
        called.append(words[1])
        answer = answers.get(words[1], 0)
        if isinstance(answer, BenchError):
            raise answer
        return int(answer)

    part = PaperPart(name="part", title="", steps=tuple(plan.step for plan in plans))
    return do_parts([(part, plans)], Settings(), invoke), called


def ready(name: str, **more: Any) -> StepPlan:
    return StepPlan(step(name, **more), step(name, **more), ())


def test_a_command_that_fails_does_not_stop_the_others() -> None:
    plans = [ready("a"), ready("b"), ready("c"), ready("d"), ready("e")]
    answers = {
        "a": 1,
        "b": UsageError("wrong"),
        "c": MissingError("gone"),
        "d": UnsupportedOperation("cannot"),
    }
    done, called = run(plans, answers)
    assert called == ["a", "b", "c", "d", "e"] and done.finished == 1
    assert len(done.failed) == 2 and len(done.left_out) == 2 and "wrong" in done.failed[1]


def test_what_reads_records_waits_for_them_and_ctrl_c_stops_all() -> None:
    done, called = run([ready("a"), ready("b", follows=True), ready("c")], {"a": 3})
    assert called == ["a", "c"] and len(done.left_out) == 2
    done, called = run([StepPlan(step("a"), None, ()), ready("b", follows=True)], {})
    assert called == [] and len(done.left_out) == 2
    done, called = run([ready("a"), ready("b")], {"a": 130})
    assert called == ["a"] and done.stopped


# ------------------------------------------------------------------------- the paper's own settings


@pytest.mark.parametrize("policy", POLICIES)
def test_the_number_of_a_policy_counts_the_global_crop(policy: str) -> None:
    """Table 3: yes and 10 are one global and nine local crops."""
    has_global, crops, _ = policy_words(policy)
    parsed = parse_policy(policy)
    assert str(parsed) == policy
    assert parsed.global_crop == (has_global == "yes")
    if parsed.adaptive:
        assert parsed.num_crops == int(crops)
        return
    cells = parsed.indices(2, [torch.Generator(), torch.Generator()])
    assert len(cells) == int(crops)
    assert ((cells == GLOBAL).sum(dim=0) == int(has_global == "yes")).all()
    assert sorted(cells[:, 0][cells[:, 0] >= 0].tolist()) == list(range(9 if int(crops) > 1 else 0))


@pytest.mark.parametrize(
    ("name", "width", "batch"),
    [("imagenet100", 768, 512), ("mscoco-pairs", 768, 256), ("visual-genome", 64, 512)],
)
def test_probes_have_the_settings_of_table_6(name: str, width: int, batch: int) -> None:
    probe = find_tasks()[name].spec.probe
    assert (probe.width, probe.depth, probe.heads, probe.batch_size) == (width, 2, 8, batch)
    assert probe.learning_rate == find_tasks()["imagenet100"].spec.probe.learning_rate
    readme = (ROOT / "probes" / name / "README.md").read_text(encoding="utf-8")
    assert "not at hand" not in readme and f"| {width}, 2, 8, {batch}" in readme


@pytest.mark.parametrize(("size", "tokens", "ids"), [("s", 64, 1000), ("m", 128, 16_000), ("l", 256, 64_000)])
def test_bottleneck_sizes_have_presets(size: str, tokens: int, ids: int) -> None:
    spec = load_config(f"comit-b-bottleneck-{size}", ("data.source=x",)).model.spec()
    vocabulary = 1
    for level in spec.fsq_levels:
        vocabulary *= level
    assert spec.message_length == tokens and abs(vocabulary - ids) <= 0.05 * ids
