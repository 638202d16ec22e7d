"""The token store: what is written comes back, what is damaged is found, what is killed is repeated."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import comit_bench
from comit_bench.data.tokens.shards import id_dtype
from comit_bench.data.tokens.store import TokenLayout, TokenStore
from comit_bench.errors import BenchError, CorruptFileError, MissingError, UnsupportedOperation, UsageError

KEY: dict[str, object] = {
    "weights": "sha256:abc",
    "preprocessing": "center_crop|resize(32,bilinear)",
    "seed": 0,
}
REPOSITORY = Path(comit_bench.__file__).parents[1]


def make(root: Path, key: Mapping[str, object] = KEY, **changes: Any) -> TokenStore:
    sizes: dict[str, Any] = {
        "count": 22,
        "message_length": 5,
        "vocab_size": 300,
        "code_dim": 3,
        "shard_size": 8,
    }
    return TokenStore.open(root, key, **(sizes | changes))


def ids_for(store: TokenStore, seed: int = 0) -> np.ndarray:
    assert store.layout.vocab_size is not None
    shape = (store.count, store.layout.message_length)
    return np.random.default_rng(seed).integers(0, store.layout.vocab_size, shape)


def fill(store: TokenStore, ids: np.ndarray, shards: list[int] | None = None) -> None:
    for shard in store.missing_shards() if shards is None else shards:
        rows = store.shard_range(shard)
        store.write_shard(shard, ids=ids[rows.start : rows.stop])


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(0, 30),
    length=st.integers(1, 6),
    vocab=st.sampled_from([1, 2, 256, 257, 65536, 65537, 2**32]),
    shard_size=st.integers(1, 12),
    offsets=st.booleans(),
    data=st.data(),
)
def test_ids_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    length: int,
    vocab: int,
    shard_size: int,
    offsets: bool,
    data: st.DataObject,
) -> None:
    root = tmp_path_factory.mktemp("cache")
    sizes: dict[str, Any] = {
        "count": count,
        "message_length": length,
        "vocab_size": vocab,
        "shard_size": shard_size,
    }
    store = make(root, **sizes)
    random = np.random.default_rng(count)
    ids = random.integers(0, vocab, (count, length))
    moved = random.normal(size=(count, 2)).astype(np.float32)
    broken = {row: f"file {row} is bad" for row in range(count) if row % 5 == 1}
    for shard in reversed(store.missing_shards()):
        rows = store.shard_range(shard)
        store.write_shard(
            shard,
            ids=ids[rows.start : rows.stop],
            offsets=moved[rows.start : rows.stop] if offsets else None,
            broken={row: text for row, text in broken.items() if row in rows},
        )
    again = make(root, **sizes)
    assert again.complete
    chosen = data.draw(st.lists(st.integers(0, count - 1), max_size=40)) if count else []
    assert np.array_equal(again.ids(chosen), ids[chosen].reshape(len(chosen), length))
    assert again.ids(chosen).dtype == np.int64
    assert again.broken() == broken
    assert again.valid().tolist() == [row not in broken for row in range(count)]
    everything = again.load_all()
    assert everything.ids is not None
    assert everything.ids.dtype == id_dtype(vocab)
    assert np.array_equal(everything.ids, ids)
    found = again.offsets(chosen)
    if offsets and count:
        assert found is not None
        assert np.array_equal(found, moved[chosen].reshape(-1, 2))
    else:
        assert found is None
        assert everything.offsets is None


def test_codes_come_back(tmp_path: Path) -> None:
    store = make(tmp_path, vocab_size=None)
    codes = torch.randn(22, 5, 3, generator=torch.Generator().manual_seed(0))
    for shard in store.missing_shards():
        rows = store.shard_range(shard)
        store.write_shard(shard, codes=codes[rows.start : rows.stop])
    for chosen in ([3, 21, 3, 0], list(range(22)), [7]):
        assert np.array_equal(store.codes(chosen), codes.numpy()[chosen])
    everything = store.load_all()
    assert everything.ids is None
    assert everything.codes is not None
    assert np.array_equal(everything.codes, codes.numpy())
    with pytest.raises(UnsupportedOperation, match="continuous"):
        store.ids([0])


def test_ids_are_not_codes(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOperation, match="codes_from_ids"):
        make(tmp_path).codes([0])


def test_shard_ranges_cover_everything_once(tmp_path: Path) -> None:
    store = make(tmp_path)
    assert [store.shard_range(i) for i in range(store.num_shards)] == [range(8), range(8, 16), range(16, 22)]
    with pytest.raises(IndexError):
        store.shard_range(3)


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(1, "u1"), (256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4"), (2**32, "u4")]
)
def test_smallest_type(vocab: int, dtype: str) -> None:
    assert id_dtype(vocab) == np.dtype(dtype)


@pytest.mark.parametrize("vocab", [0, -1, 2**32 + 1])
def test_impossible_vocabularies(tmp_path: Path, vocab: int) -> None:
    with pytest.raises(UsageError, match="vocab_size"):
        make(tmp_path, vocab_size=vocab)


def zeros(*shape: int, dtype: Any = np.int64) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("vocab", "arguments", "words"),
    [
        (300, {"ids": zeros(8, 4)}, "[8, 5]"),
        (300, {"ids": zeros(7, 5)}, "[8, 5]"),
        (300, {"ids": zeros(8, 5, dtype=np.float32)}, "expected integers"),
        (300, {"ids": zeros(8, 5) + 300}, "outside 0..299"),
        (300, {"ids": zeros(8, 5) - 1}, "outside 0..299"),
        (300, {}, "got nothing"),
        (300, {"codes": zeros(8, 5, 3, dtype=np.float32)}, "takes ids"),
        (None, {"ids": zeros(8, 5)}, "takes codes"),
        (None, {"codes": zeros(8, 5, dtype=np.float32)}, "[8, 5, 3]"),
        (None, {"codes": zeros(8, 5, 3)}, "floating"),
        (None, {"codes": np.full((8, 5, 3), np.nan)}, "finite"),
        (None, {"codes": np.full((8, 5, 3), 1e300)}, "finite"),
        (300, {"ids": zeros(8, 5), "offsets": zeros(8, 3, dtype=np.float32)}, "[8, 2]"),
        (300, {"ids": zeros(8, 5), "broken": {8: "x"}}, "broken row 8"),
    ],
)
def test_writes_are_checked(tmp_path: Path, vocab: int | None, arguments: dict[str, Any], words: str) -> None:
    store = make(tmp_path, vocab_size=vocab)
    with pytest.raises(UsageError) as caught:
        store.write_shard(0, **arguments)
    assert words in str(caught.value)
    assert store.missing_shards() == [0, 1, 2]


def test_rows_are_checked(tmp_path: Path) -> None:
    store = make(tmp_path)
    fill(store, ids_for(store))
    for rows in ([22], [-1], [0, 400]):
        with pytest.raises(IndexError):
            store.ids(rows)
    for wrong in ([[1, 2]], [0.5], [True, False]):
        with pytest.raises(UsageError):
            store.ids(wrong)  # type: ignore[arg-type]


def test_the_key_decides_the_folder(tmp_path: Path) -> None:
    stores = [
        make(tmp_path),
        make(tmp_path, dict(reversed(KEY.items()))),
        make(tmp_path, KEY | {"seed": 1}),
        make(tmp_path, count=23),
        make(tmp_path, vocab_size=301),
    ]
    assert stores[0].directory == stores[1].directory
    assert len({store.directory for store in stores}) == 4
    directory = stores[0].directory
    assert directory == tmp_path / "tokens" / directory.name[:2] / directory.name
    assert json.loads((directory / "key.json").read_text())["key"] == KEY


@pytest.mark.parametrize("content", ["{}", "not json", ""])
def test_a_foreign_key_file_is_refused(tmp_path: Path, content: str) -> None:
    path = make(tmp_path).directory / "key.json"
    path.write_text(content)
    with pytest.raises(CorruptFileError) as caught:
        make(tmp_path)
    assert str(path) in str(caught.value)


def test_tuples_in_the_key_survive_reopening(tmp_path: Path) -> None:
    key = {"levels": (8, 8, 5), "nested": {"a": [1, None]}}
    assert make(tmp_path, key).directory == make(tmp_path, key).directory


def test_opening_reads_no_shard(tmp_path: Path) -> None:
    store = make(tmp_path)
    fill(store, ids_for(store))
    store.shard_path(0).write_bytes(b"")
    again = make(tmp_path)
    assert np.array_equal(again.ids([8, 21]), ids_for(store)[[8, 21]])


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped byte in the data": lambda p: flip(p, p.stat().st_size - 20),
    "flipped byte in the length": lambda p: flip(p, 0),
    "flipped byte in the header": lambda p: flip(p, 40),
    "truncated data": lambda p: os.truncate(p, p.stat().st_size - 3),
    "truncated header": lambda p: os.truncate(p, 30),
    "empty": lambda p: os.truncate(p, 0),
    "garbage": lambda p: p.write_bytes(b"\xff" * 500),
    "garbage header": lambda p: p.write_bytes((20).to_bytes(8, "little") + b"{" * 200),
    "header of another form": lambda p: p.write_bytes((2).to_bytes(8, "little") + b"[]"),
    "entry of another form": lambda p: p.write_bytes((9).to_bytes(8, "little") + b'{"ids":4}'),
    "bytes at the end": lambda p: p.write_bytes(p.read_bytes() + b"x"),
    "other shapes": lambda p: save_file(
        {"ids": zeros(8, 4, dtype=np.uint16), "valid": zeros(8, dtype=np.uint8)}, p
    ),
    "other tensors": lambda p: save_file({"id": zeros(8, 5, dtype=np.uint16)}, p),
    "another shard": lambda p: p.write_bytes((p.parent / "shard-000000.safetensors").read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_removed_and_rebuilt_alone(tmp_path: Path, damage: str) -> None:
    store = make(tmp_path)
    ids = ids_for(store)
    fill(store, ids)
    path = store.shard_path(1)
    times = {i: store.shard_path(i).stat().st_mtime_ns for i in (0, 2)}
    DAMAGES[damage](path)

    reader = make(tmp_path)
    with pytest.raises(CorruptFileError, match="run the same command again") as caught:
        reader.ids([9])
    assert str(path) in str(caught.value)
    assert np.array_equal(reader.ids([0, 20]), ids[[0, 20]])

    again = make(tmp_path)
    assert again.missing_shards() == [1]
    assert not path.exists()
    fill(again, ids)
    assert again.complete
    assert np.array_equal(again.ids(range(22)), ids)
    assert {i: store.shard_path(i).stat().st_mtime_ns for i in (0, 2)} == times


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unnoticed(
    tmp_path_factory: pytest.TempPathFactory, position: int, bit: int
) -> None:
    root = tmp_path_factory.getbasetemp() / "flips"
    store = make(root, count=8)
    store.write_shard(0, ids=ids_for(store), broken={3: "bad file"})
    content = bytearray(store.shard_path(0).read_bytes())
    content[position % len(content)] ^= 1 << bit
    store.shard_path(0).write_bytes(content)
    with pytest.raises(CorruptFileError):
        make(root, count=8).ids([0])


def test_verify_reports_what_it_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make(tmp_path)
    fill(store, ids_for(store))
    assert store.verify() == {}
    flip(store.shard_path(2), store.shard_path(2).stat().st_size - 20)
    report = store.verify()
    assert list(report) == [2]
    assert "checksum" in report[2]
    assert "6 images" in caplog.text
    assert store.missing_shards() == [2]
    with pytest.raises(MissingError, match="Run the same command again"):
        store.ids([20])


def test_checksums_can_be_skipped(tmp_path: Path) -> None:
    store = make(tmp_path)
    ids = ids_for(store)
    fill(store, ids)
    ids[0, 0] ^= 1
    content = store.shard_path(0).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    flipped = bytes([content[start] ^ 1])
    store.shard_path(0).write_bytes(content[:start] + flipped + content[start + 1 :])
    lenient = make(tmp_path, verify=False)
    assert lenient.complete
    assert np.array_equal(lenient.ids(range(22)), ids)
    with pytest.raises(CorruptFileError):
        make(tmp_path).ids([0])
    os.truncate(store.shard_path(1), 100)  # what can be seen without a checksum is always seen
    assert make(tmp_path, verify=False).missing_shards() == [1]


def test_shards_must_agree_about_offsets(tmp_path: Path) -> None:
    store = make(tmp_path)
    ids = ids_for(store)
    store.write_shard(0, ids=ids[:8], offsets=np.zeros((8, 2), np.float32))
    store.write_shard(1, ids=ids[8:16])
    with pytest.raises(CorruptFileError, match="has no offsets"):
        store.offsets([0, 9])


def test_incomplete_store(tmp_path: Path) -> None:
    store = make(tmp_path)
    ids = ids_for(store)
    fill(store, ids, [2])
    assert store.missing_shards() == [0, 1]
    assert not store.complete
    assert np.array_equal(store.ids([16, 21]), ids[[16, 21]])
    for read in (lambda: store.ids([3]), store.valid, store.load_all):
        with pytest.raises(MissingError):
            read()


def test_leftovers_of_killed_writers(tmp_path: Path) -> None:
    store = make(tmp_path)
    old, fresh = (store.directory / f".shard-000001.safetensors.{name}.part" for name in ("old", "fresh"))
    for path in (old, fresh):
        path.write_bytes(b"half a shard")
    os.utime(old, (time.time() - 7200,) * 2)
    again = make(tmp_path)
    assert again.missing_shards() == [0, 1, 2]
    assert not old.exists()
    assert fresh.exists()  # may belong to a running process
    fill(again, ids_for(store))
    assert np.array_equal(again.ids(range(22)), ids_for(store))


def test_a_full_disk_loses_nothing_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path)
    ids = ids_for(store)
    fill(store, ids, [0])

    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as stream:
            stream.write(content[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(BenchError, match="disk is full"):
            fill(store, ids, [1])
    assert sorted(path.name for path in store.directory.iterdir()) == ["key.json", "shard-000000.safetensors"]
    fill(store, ids)
    assert np.array_equal(make(tmp_path).ids(range(22)), ids)


WRITER = """
import sys, time
import numpy as np
from pathlib import Path
from comit_bench.data.tokens.store import TokenStore
root, first, step, pause = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
sizes = dict(count=640, message_length=16, vocab_size=1000, code_dim=2, shard_size=16)
store = TokenStore.open(root, {"a": 1}, **sizes)
ids = np.arange(640 * 16).reshape(640, 16) % 1000
for shard in list(range(store.num_shards))[first::step]:
    rows = store.shard_range(shard)
    store.write_shard(shard, ids=ids[rows.start : rows.stop])
    time.sleep(pause)
"""


def start_writer(root: Path, first: int, step: int, pause: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITER, str(root), str(first), str(step), str(pause)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=environment)


def big(root: Path) -> TokenStore:
    return TokenStore.open(
        root, {"a": 1}, count=640, message_length=16, vocab_size=1000, code_dim=2, shard_size=16
    )


BIG_IDS = np.arange(640 * 16).reshape(640, 16) % 1000


def test_two_processes_write_one_store(tmp_path: Path) -> None:
    # odd and even shards, and a third writer that repeats all of them at the same time
    writers = [start_writer(tmp_path, *part, 0.0) for part in ((0, 2), (1, 2), (0, 1))]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    store = big(tmp_path)
    assert store.complete
    assert np.array_equal(store.ids(range(640)), BIG_IDS)
    assert not list(store.directory.glob("*.part"))


def test_kill_and_resume(tmp_path: Path) -> None:
    writer = start_writer(tmp_path, 0, 1, 0.02)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("tokens/*/*/shard-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    store = big(tmp_path)
    missing = store.missing_shards()
    assert 0 < len(missing) <= 37
    for shard in missing:
        rows = store.shard_range(shard)
        store.write_shard(shard, ids=BIG_IDS[rows.start : rows.stop])
    assert store.complete
    assert np.array_equal(store.ids(range(640)), BIG_IDS)


def test_overhead_is_small(tmp_path: Path) -> None:
    store = make(tmp_path, count=2048, message_length=256, vocab_size=64000, shard_size=1024)
    ids = ids_for(store)
    for shard in (0, 1):
        rows = store.shard_range(shard)
        broken = {rows.start + i: f"/data/imagenet/train/n01440764/image_{i}.JPEG: damaged" for i in range(5)}
        store.write_shard(shard, ids=ids[rows.start : rows.stop], broken=broken)
    payload = 2 * 256 * 2048
    assert store.layout.nbytes == payload
    total = sum(path.stat().st_size for path in store.directory.iterdir())
    assert payload < total < 1.05 * payload


def test_files_stay_plain_safetensors(tmp_path: Path) -> None:
    store = make(tmp_path)
    fill(store, ids_for(store))
    tensors = load_file(store.shard_path(2))
    assert sorted(tensors) == ["ids", "valid"]
    assert tensors["ids"].dtype == np.uint16
    assert np.array_equal(tensors["ids"], ids_for(store)[16:])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through /proc")
def test_mapped_shards_hold_no_open_files(tmp_path: Path) -> None:
    store = make(tmp_path, shard_size=1)
    fill(store, ids_for(store))
    store.ids([0])
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert np.array_equal(store.ids(range(22)), ids_for(store))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_reading_does_not_need_many_rows_per_shard(tmp_path: Path) -> None:
    store = make(tmp_path, count=200, shard_size=10)
    ids = ids_for(store)
    fill(store, ids)
    random = np.random.default_rng(3)
    for size in (1, 5, 70, 600):  # few rows per shard, and many
        rows = random.integers(0, 200, size)
        assert np.array_equal(store.ids(rows), ids[rows])


def test_layout_sizes() -> None:
    layout = TokenLayout(count=1_281_167, message_length=256, vocab_size=64000, code_dim=6, shard_size=1024)
    assert layout.nbytes == 1_281_167 * 512
    with pytest.raises(UsageError, match="shard_size 0"):
        TokenLayout(count=1, message_length=1, vocab_size=1, code_dim=1, shard_size=0)
