"""Tokens made by two processes are those of one, byte for byte; a process that dies loses its shard only."""

from __future__ import annotations

from pathlib import Path

from processes import free_port, start
from tiny import write_images, write_recipes

from comit_bench.errors import BenchError
from comit_bench.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, sys
from pathlib import Path
import comit_bench.tasks.tokenizing as tokenizing
from comit_bench.evaluation import Bench, do_jobs
from comit_bench.jobs import Settings, make_jobs

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
bench = Bench(settings)
outcome = do_jobs(make_jobs(["kmeans-patch"], ["tiny-colours"], settings), bench)
bench.ranks.leave()
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
