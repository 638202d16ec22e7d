"""Tokens made by two processes are those of one, byte for byte; a process that dies loses its shard only."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
from processes import free_port, start
from tiny import write_images, write_recipes

from comit_bench.errors import BenchError, UsageError
from comit_bench.nn import ranks as module
from comit_bench.nn.ranks import Launched, Ranks, launched, meeting, without_launcher
from comit_bench.train.config import load_config
from comit_bench.train.setup import make_accelerator

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, sys
from pathlib import Path
import comit_bench.pipeline.tokenize as tokenizing
from comit_bench.pipeline.evaluate import run_jobs
from comit_bench.pipeline.session import Session
from comit_bench.pipeline.jobs import Settings, make_jobs

root, out, fail = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
tokenizing.SHARD_SIZE = 7
if fail == os.environ.get("RANK"):
    write, made = tokenizing.TokenStore.write_shard, []
    def dying(self, shard, **rest):
        if len(made) == 2:
            os._exit(9)
        made.append(shard)
        write(self, shard, **rest)
    tokenizing.TokenStore.write_shard = dying
settings = Settings(output=out, data_root=root / "data", include=(root / "recipes",), cache=out / "cache",
                    progress=False, seeds=1, batch_size=5, device="cpu")
session = Session(settings)
outcome = run_jobs(make_jobs(["kmeans-patch"], ["tiny-colours"], settings), session)
session.ranks.leave()
print(len(outcome.records), [str(error) for _, error in outcome.failures])
"""


def shards(out: Path) -> dict[str, bytes]:
    folder = out / "cache" / "tokens"
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


def test_two_processes_make_the_bytes_of_one_also_after_one_has_died(tmp_path: Path) -> None:
    write_images(tmp_path / "data")
    write_recipes(tmp_path / "recipes")
    alone, both, port = tmp_path / "alone", tmp_path / "both", free_port()
    one = start(SCRIPT, tmp_path, alone, 0, 1, 0)
    # the second process dies in its third shard; a launcher would then end the first
    first, second = (start(SCRIPT, tmp_path, both, rank, 2, port, fail="1") for rank in (0, 1))
    assert one.communicate(timeout=600)[0].startswith("1 []")
    assert second.wait(timeout=600) == 9
    first.kill()
    first.communicate()
    kept = shards(both)
    expected = shards(alone)
    assert 2 <= len(kept) < len(expected) and all(expected[name] == value for name, value in kept.items())
    port = free_port()
    pair = [start(SCRIPT, tmp_path, both, rank, 2, port) for rank in (0, 1)]
    said = [process.communicate(timeout=600) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert said[0][0].startswith("1 []") and said[1][0].startswith("0 []")
    assert shards(both) == expected


def test_alone_nothing_is_asked_of_anyone() -> None:
    ranks = Ranks.join()
    assert (ranks.rank, ranks.world, ranks.first) == (0, 1, True)
    assert ranks.share([1]) == [1]
    with ranks.in_turn():
        ranks.agree(None)
    try:
        ranks.agree(BenchError("mine"))
    except BenchError as error:
        assert str(error) == "mine"
    else:
        raise AssertionError("an error was lost")


WHOLE = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in module.VARIABLES:
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
        {"RANK": "0"},
        {"LOCAL_RANK": "1"},
        {"MASTER_ADDR": "node0"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3", "SLURM_JOB_ID": "7"},
    ],
)
def test_one_process(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    set_all(monkeypatch, variables)
    assert launched() == Launched(0, 1, 0) and Ranks.join() == Ranks()
    with without_launcher():
        assert not set(module.VARIABLES) & set(os.environ)
    assert all(os.environ[name] == value for name, value in variables.items())


def test_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, WHOLE)
    assert launched() == Launched(1, 2, 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        *(({name: None}, name) for name in WHOLE if name != "WORLD_SIZE"),
        *(({name: ""}, name) for name in WHOLE if name != "WORLD_SIZE"),
        ({"WORLD_SIZE": None}, "RANK=1, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "1"}, "RANK=1, but WORLD_SIZE is 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        ({"WORLD_SIZE": " "}, "WORLD_SIZE=' '"),
        ({"RANK": "1" * 5000}, "(5,002 characters)"),
        ({"RANK": "2"}, "RANK=2"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"RANK": "²"}, "RANK='²'"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
        ({"LOCAL_RANK": "gpu0"}, "LOCAL_RANK='gpu0'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
    ],
)
def test_half_a_launcher_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], says: str
) -> None:
    set_all(monkeypatch, {name: v for name, v in (WHOLE | change).items() if v is not None})
    for ask in (launched, Ranks.join, lambda: make_accelerator(load_config("comit-nano"), "cpu")):
        with pytest.raises(UsageError) as caught:
            ask()
        assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_who_is_alone_at_the_meeting_says_so(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    set_all(monkeypatch, {**WHOLE, "RANK": str(rank), "MASTER_PORT": str(free_port())})
    monkeypatch.setattr(module, "RENDEZVOUS", timedelta(seconds=1))
    for ask in (Ranks.join, lambda: make_accelerator(load_config("comit-nano"), "cpu")):
        with pytest.raises(BenchError, match=rf"process {rank} of 2 cannot find the others at 127\.0\.0\.1:"):
            ask()


def test_errors_inside_the_meeting_are_not_hidden() -> None:
    with pytest.raises(ValueError, match="mine"), meeting(Launched()):
        raise ValueError("mine")
