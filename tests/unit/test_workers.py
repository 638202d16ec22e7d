"""Worker processes that read images: what they hand over, and what happens when they cannot."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from comit_bench.data import workers
from comit_bench.data.images import iterate_images
from comit_bench.data.workers import read_ahead
from comit_bench.errors import BenchError
from comit_bench.nn.teachers import TeacherFeatures
from comit_bench.train.config import load_config
from comit_bench.train.data import Steps, TrainBatch, iterate_steps, open_images

ROOT = Path(__file__).parents[2]


class Source:
    """Gives what a function makes of a key."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __getitem__(self, key: Any) -> Any:
        return self.make(key)


def tensors(key: int) -> dict[str, Any]:
    features = TeacherFeatures(torch.full((2,), float(key)), torch.zeros(0, 3))
    return {
        "bytes": torch.full((3, 500, 500), key % 256, dtype=torch.uint8),
        "turned": torch.arange(6).view(2, 3).t(),
        "inner": [features, None, "text", torch.tensor(key), torch.tensor([True, False])],
    }


@pytest.fixture
def no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a full /dev/shm: no tensor can be put there. Workers are forks and inherit it."""

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    for name in ("_share_fd_cpu_", "_share_filename_cpu_"):
        monkeypatch.setattr(torch.UntypedStorage, name, full)
    monkeypatch.setattr(workers, "PATIENCE", 30.0)


@pytest.mark.usefixtures("no_shared_memory")
@pytest.mark.parametrize("count", [0, 2])
def test_tensors_need_no_shared_memory(count: int) -> None:
    items = list(read_ahead(Source(tensors), range(5), count))
    assert [int(item["inner"][3]) for item in items] == [0, 1, 2, 3, 4]
    for key, item in enumerate(items):
        expected = tensors(key)
        for name in ("bytes", "turned"):
            assert torch.equal(item[name], expected[name]) and item[name].dtype == expected[name].dtype
        assert torch.equal(item["inner"][0].cls, expected["inner"][0].cls)
        item["bytes"].add_(1)  # it is ours: writable


@pytest.mark.usefixtures("no_shared_memory")
def test_images_and_training_steps_need_no_shared_memory(tmp_path: Path) -> None:
    paths = []
    for number in range(6):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (8, 8), (number, 0, 0)).save(paths[-1])
    read = list(iterate_images(paths, "resize(8,nearest)", batch_size=4, num_workers=2))
    assert [int(batch.images[0, 0, 0, 0]) for batch in read] == [0, 4]
    config = load_config(
        "comit-nano", ("steps=3", "global_batch=4", "data.count=8", "data.val_count=2", f"output={tmp_path}")
    )
    train, _ = open_images(config)
    here, there = (list(iterate_steps(Steps(config, train), 0, workers=n, pin=False)) for n in (0, 2))
    assert len(here) == len(there) == 3
    for one, other in zip(here, there, strict=True):
        assert isinstance(one, TrainBatch) and torch.equal(one.images, other.images) and one.ids == other.ids


def test_keys_are_asked_for_as_they_are_needed() -> None:
    asked: list[int] = []

    def keys() -> Any:
        for key in range(1000):
            asked.append(key)
            yield key

    for count, most in ((0, 1), (2, 6)):
        asked.clear()
        items = read_ahead(Source(lambda key: key), keys(), count)
        assert next(items) == 0 and len(asked) <= most
        items.close()


def test_a_worker_that_never_answers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE", 1.0)
    began = time.monotonic()
    with pytest.raises(BenchError, match=r"no reading process has answered for 1 s.*--num-workers 0"):
        list(read_ahead(Source(lambda key: time.sleep(120)), range(2), 1))
    assert time.monotonic() - began < 30


def test_a_worker_that_is_killed_is_said() -> None:
    with pytest.raises(BenchError, match=r"a reading process .*(killed|exited).*--num-workers 0"):
        list(read_ahead(Source(lambda key: os.kill(os.getpid(), signal.SIGKILL)), range(2), 1))


def test_workers_that_cannot_be_started_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data import DataLoader

    def full(self: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(DataLoader, "__iter__", full)
    with pytest.raises(BenchError, match=r"cannot be started \(No space left on device\).*--num-workers 0"):
        list(read_ahead(Source(lambda key: key), range(2), 1))


def test_errors_of_the_source_keep_their_kind() -> None:
    def fail(key: int) -> None:
        raise RuntimeError("mine")

    for count in (0, 1):
        with pytest.raises(RuntimeError, match="mine"):
            list(read_ahead(Source(fail), range(2), count))


def may_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /dev/shm"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


SMALL = """
import sys
from pathlib import Path
import torch
from comit_bench.data.images import iterate_images
from comit_bench.train.config import load_config
from comit_bench.train.data import Steps, iterate_steps, open_images
paths = sorted(Path(sys.argv[1]).glob("*.png")) * 60
seen = [b for b in iterate_images(paths, "resize(256,nearest)", batch_size=64, num_workers=8)]
config = load_config("comit-nano", ("steps=8", "global_batch=4096", "data.count=64", "data.val_count=2"))
steps = list(iterate_steps(Steps(config, open_images(config)[0]), 0, workers=4, pin=False))
print(sum(len(b.indices) for b in seen), len(steps))
"""


@pytest.mark.slow
def test_eight_workers_read_through_a_small_shared_memory(tmp_path: Path) -> None:
    if not may_unshare():
        pytest.skip("a /dev/shm of its own needs the right to mount in a private namespace (unshare -m)")
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    inner = 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$0" -W ignore -c "$1" "$2"'
    command = ["unshare", "-m", "sh", "-c", inner, sys.executable, SMALL, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.stdout.split() == ["480", "8"], done.stderr
