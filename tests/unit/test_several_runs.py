"""Equal commands at the same time: all end well with the same records, and the work is done once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kills import leftovers, run_and_die
from PIL import Image
from tiny import write_images, write_recipes
from typer.testing import CliRunner

from comit_bench import load_tokenizer
from comit_bench.commands.app import app
from comit_bench.data.tokens import shards
from comit_bench.data.tokens.shards import SharedWork
from comit_bench.errors import BenchError, UsageError
from comit_bench.files import locked, try_lock, write_atomic
from comit_bench.pipeline.folders import detokenize_file, tokenize_folder
from comit_bench.train.checkpoint import only_training
from comit_bench.train.config import AutoencoderRun, load_config
from comit_bench.train.loop import Trainer

ROOT = Path(__file__).resolve().parents[2]


# ----------------------------------------------------------------- shards


def share(folder: Path, count: int, made: list[tuple[str, int]], name: str) -> None:
    work = SharedWork(range(count), lambda shard: folder / f"shard-{shard}", "the test")
    while work.left:
        work.wait()
        with work:
            for shard in work.take():
                time.sleep(0.005)
                write_atomic(folder / f"shard-{shard}", "content")
                made.append((name, shard))
                work.done(shard)


def test_shards_are_divided(tmp_path: Path) -> None:
    made: list[tuple[str, int]] = []
    threads = [threading.Thread(target=share, args=(tmp_path, 40, made, name)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(shard for _, shard in made) == list(range(40))
    assert len({name for name, _ in made}) > 1, "nobody shared"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"shard-{n}" for n in range(40))


def test_what_a_killed_process_was_making_is_made_by_another(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from comit_bench.data.tokens.shards import SharedWork\n"
        "work = SharedWork(range(3), lambda n: Path(sys.argv[1]) / f'shard-{n}', 'x')\n"
        "next(work.take()); print('taken', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as other:
        assert other.stdout is not None and other.stdout.readline() == b"taken\n"
        made: list[tuple[str, int]] = []
        thread = threading.Thread(target=share, args=(tmp_path, 3, made, "a"))
        thread.start()
        time.sleep(0.5)
        assert thread.is_alive() and made == [("a", 1), ("a", 2)]  # it does what it can, and waits
        other.kill()
        other.wait()
        thread.join(timeout=30)
    assert made == [("a", 1), ("a", 2), ("a", 0)]


def test_an_error_gives_the_shards_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = SharedWork(range(3), lambda shard: tmp_path / f"shard-{shard}", "x")
    with pytest.raises(RuntimeError), work:
        for _ in work.take():
            raise RuntimeError
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shards, "POLL", 0.01)
    made: list[tuple[str, int]] = []
    share(tmp_path, 3, made, "b")
    assert len(made) == 3


def count_up(folder: Path, times: int) -> None:
    for _ in range(times):
        with locked(folder / ".lock", "counting"):
            number = int((folder / "number").read_text())
            time.sleep(0.001)
            (folder / "number").write_text(str(number + 1))


def test_a_lock_that_is_removed_still_excludes(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            code = 1
            try:
                count_up(tmp_path, 25)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert (tmp_path / "number").read_text() == "100" and len(list(tmp_path.iterdir())) == 1


# ----------------------------------------------------------------- runs

# One run; every shard and every measurement is noted; the run named in FAIL dies while it measures.
RUN = """
import os, signal, sys
from pathlib import Path
import comit_bench.pipeline.tokenize as tokenizing
import comit_bench.pipeline.evaluate as evaluation
from comit_bench.commands.app import main_run

notes = Path(os.environ["NOTES"])
def note(what):
    with notes.open("a") as stream:
        stream.write(f"{what}\\n")

tokenizing.SHARD_SIZE = 7
write = tokenizing.TokenStore.write_shard
def writing(self, shard, **rest):
    note(f"shard {self.digest[:8]} {shard}")
    write(self, shard, **rest)
tokenizing.TokenStore.write_shard = writing
measure = evaluation._measure
def measuring(job, *rest):
    note(f"measure {job.label}")
    if os.environ.get("FAIL") and job.label == "kmeans-patch":
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(job, *rest)
evaluation._measure = measuring
main_run()
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def start(root: Path, *more: str, fail: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, "--include-path", str(root / "recipes"), "--tasks", "tiny-colours"]
    command += ["--data-root", str(root / "data"), "--output", str(root / "out"), "-q", *more]
    own = environment(COMIT_BENCH_CACHE=str(root / "cache"), NOTES=str(root / "notes"), FAIL=fail)
    return subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_images(tmp_path / "data")
    probe = {"width": 8, "depth": 1, "heads": 2, "batch_size": 16, "learning_rate": 0.01}
    write_recipes(tmp_path / "recipes", probe=probe | {"max_epochs": 2, "patience": 2})
    return tmp_path


OPTIONS = ("--tokenizer", "kmeans-patch", "--option", "vocab=64", "--seeds", "1")


def check(root: Path, outs: list[str], rows: int) -> Counter[str]:
    assert len(set(outs)) == 1 and outs[0]
    records = sorted((root / "out" / "records").rglob("*.json"))
    assert len(records) == rows
    assert not leftovers(root)
    assert not [p for p in root.rglob("*.lock")]
    return Counter((root / "notes").read_text().splitlines())


def test_two_equal_runs_share_the_work(root: Path) -> None:
    runs = [start(root, *OPTIONS) for _ in range(2)]
    said = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    done = check(root, [out for out, _ in said], rows=2)
    assert set(done.values()) == {1}, done
    assert done["measure kmeans-patch"] == done["measure majority"] == 1
    assert sum(note.startswith("shard") for note in done) == 20


def test_a_run_that_is_killed_while_others_wait(root: Path) -> None:
    first = start(root, *OPTIONS, "--no-references", fail="yes")
    other = start(root, *OPTIONS, "--no-references")
    assert first.wait(timeout=300) in (-signal.SIGKILL, 0)  # 0: the other one was faster
    out, err = other.communicate(timeout=300)
    assert other.returncode == 0, err
    first.communicate()
    check(root, [out], rows=1)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_full_runs_of_the_embedded_suite(tmp_path: Path, count: int) -> None:
    command = [sys.executable, "-m", "comit_bench.run", "--tokenizer", "kmeans-patch", "--tokenizer",
               "vq-grid-nano", "--tasks", "recognition-scenes,reconstruction-scenes", "--limit", "200",
               "--seeds", "1", "--output", str(tmp_path / "out"), "-q"]  # fmt: skip
    own = environment(COMIT_BENCH_CACHE=str(tmp_path / "cache"))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    runs = [subprocess.Popen(command, env=own, text=True, **pipes) for _ in range(count)]  # type: ignore[call-overload]
    said = [run.communicate(timeout=1500) for run in runs]
    assert [run.returncode for run in runs] == [0] * count, said
    assert len({out for out, _ in said}) == 1
    assert not leftovers(tmp_path) and not [p for p in tmp_path.rglob("*.lock")]
    records = {p: p.read_bytes() for p in (tmp_path / "out" / "records").rglob("*.json")}
    again = subprocess.run(command, env=own, capture_output=True, text=True, timeout=600, check=True)
    assert again.stdout == said[0][0]
    assert records == {p: p.read_bytes() for p in (tmp_path / "out" / "records").rglob("*.json")}


# ----------------------------------------------------------------- token files


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(12):
        path = tmp_path / "images" / f"{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number * 20, 0, 0)).save(path)
    return tmp_path / "images"


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_one_folder_is_tokenized_and_decoded_by_three_at_once(images: Path, tmp_path: Path) -> None:
    nano = load_tokenizer("vq-grid-nano", device="cpu")
    files: list[Path] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            out = tmp_path / "tokens.safetensors"
            tokenize_folder(nano, images, out, cache=tmp_path / "cache", shard_size=2)
            files.append(out)
            detokenize_file(nano, out, tmp_path / "back", batch_size=2)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(files) == 3
    assert len(list((tmp_path / "back").rglob("*"))) == 12 + 3
    other = tmp_path / "tokens.safetensors"
    with pytest.raises(UsageError, match="holds something else"):
        tokenize_folder(nano, images, other, cache=tmp_path / "cache", seed=1)


def test_another_file_is_refused_before_the_work(images: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("precious")
    with pytest.raises(UsageError, match="holds something else"):
        tokenize_folder(
            load_tokenizer("vq-grid-nano", device="cpu"),
            images,
            tmp_path / "tokens",
            cache=tmp_path / "cache",
        )
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert (tmp_path / "tokens").read_text() == "precious"


@pytest.mark.parametrize("kind", ["fifo", "folder", "below-a-file", "device"])
def test_places_that_no_file_can_take_are_refused_before_the_work(
    images: Path, tmp_path: Path, kind: str
) -> None:
    out = {"device": Path("/dev/null"), "below-a-file": tmp_path / "file" / "x"}.get(kind, tmp_path / "out")
    (tmp_path / "file").write_text("")
    if kind == "fifo":
        os.mkfifo(out)
    if kind == "folder":
        out.mkdir()
    arguments = ["tokenize", str(images), "--out", str(out), "-t", "vq-grid-nano", "-q"]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, BenchError) and "\n" not in str(done.exception)
    assert str(out.parent if kind == "below-a-file" else out) in str(done.exception)


# ----------------------------------------------------------------- trainings


def test_two_trainings_in_one_folder(tmp_path: Path) -> None:
    small = ("steps=1", "global_batch=4", "data.count=8", "data.val_count=2", "model.depth=1")
    config = load_config("comit-nano", (*small, "model.representation_layer=0", f"output={tmp_path}"))
    autoencoder = load_config("vq-grid-nano", (f"output={tmp_path}", "name=comit-nano"))
    assert isinstance(autoencoder, AutoencoderRun)
    with only_training(tmp_path / "comit-nano"):
        with pytest.raises(BenchError, match=r"another training is running in this folder.*output="):
            Trainer(config, device="cpu", progress=False)
        with pytest.raises(BenchError, match="another training is running"):
            Trainer(autoencoder, device="cpu", progress=False)
        assert not run_and_die(lambda: _dies_in(tmp_path / "other"), None)
        with only_training(tmp_path / "other"):  # whose process was killed
            pass
    assert try_lock(tmp_path / "comit-nano" / ".lock") is not None


def _dies_in(folder: Path) -> None:
    with only_training(folder):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_training_that_another_one_has_overtaken(tmp_path: Path) -> None:
    small = ["global_batch=4", "data.count=8", "data.val_count=2", "steps=1", "teacher.name=none"]
    small += ["model.depth=1", "model.width=16", "model.heads=2", "model.representation_layer=0"]
    small += ["objective.srepa_weight=0"]
    config = load_config("comit-nano", (*small, f"output={tmp_path}"))
    late = Trainer(config, device="cpu", progress=False)
    step = tmp_path / "comit-nano" / "checkpoints" / "step-00000007"
    step.mkdir(parents=True)
    (step / "state.json").write_text(json.dumps({}))
    with pytest.raises(BenchError, match=r"meanwhile, up to step 7.*Start the same command again"):
        late.fit()
