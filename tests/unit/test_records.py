"""Records: what may be written, what may be read, and that nothing is ever lost or edited."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError
from comit_bench.results.records import (
    Environment,
    Metric,
    Record,
    TokenizerRow,
    find_record,
    load_record,
    load_records,
    protocol_digest,
    record_path,
    save_record,
    tokenizer_slug,
    validate_record_file,
)
from comit_bench.tokenizers.base import TokenizerInfo

FIXTURES = Path(__file__).parents[1] / "fixtures" / "records"


@pytest.fixture
def record() -> Record:
    return load_record(FIXTURES / "measured-v1.json")


def changed(record: Record, **values: Any) -> Record:
    """A validated copy; a new protocol gets its digest."""
    if "protocol" in values:
        values.setdefault("protocol_digest", protocol_digest(values["protocol"]))
    return Record.model_validate({**dict(record), **values})


def edited(tmp_path: Path, record: Record, *keys: str, value: Any) -> Path:
    """The record's file with one key set to ``value``."""
    raw = json.loads(record.to_json())
    target = raw
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------ round trips


def test_historic_files_still_load() -> None:
    loaded = {path.name: load_record(path) for path in sorted(FIXTURES.glob("*.json"))}
    assert set(loaded) == {"limited-untrained-v1.json", "measured-v1.json", "paper-v1.json"}

    measured = loaded["measured-v1.json"]
    assert measured.metrics["top1"].per_seed == (44.1, 45.3, 46.2)
    assert measured.metrics["top1"].n == 1000
    assert measured.tokenizer.vocab_size == 512
    assert measured.task.dataset.fingerprint == "sha256:" + "5d" * 32
    assert measured.protocol_digest.startswith("sha256:0c9336e01c1e")

    limited = loaded["limited-untrained-v1.json"]
    assert (limited.limit, limited.complete, limited.control) == (50, False, "permute-labels")
    assert not limited.tokenizer.trained
    assert limited.metrics["psnr"].unit == "dB"
    assert limited.counts is not None and limited.counts.broken == 1

    paper = loaded["paper-v1.json"]
    assert (paper.origin, paper.metrics["top1"].value, paper.environment) == ("paper", 81.5, None)


def test_saved_record_comes_back_equal_at_its_own_path(tmp_path: Path, record: Record) -> None:
    path = save_record(tmp_path, record)
    assert path == tmp_path / "kmeans-patch@3c3c3c3c3c3c" / "recognition-scenes-v1-0c9336e01c1e.json"
    assert load_record(path) == record
    assert find_record(tmp_path, record.tokenizer, record.task, record.protocol_digest) == record
    assert load_records(tmp_path) == [record]
    assert list(tmp_path.rglob("*.part")) == []


def test_file_is_canonical_text(record: Record) -> None:
    assert (FIXTURES / "measured-v1.json").read_text(encoding="utf-8") == record.to_json()


def test_both_schemas_load_and_stay_what_they_are(tmp_path: Path, record: Record) -> None:
    assert record.schema_version == 1
    assert json.loads(save_record(tmp_path, record).read_text())["schema"] == 1
    fresh = Record.model_validate({k: v for k, v in dict(record).items() if k != "schema_version"})
    path = save_record(tmp_path, fresh, overwrite=True)
    raw = json.loads(path.read_text())
    assert raw["schema"] == 3 and load_record(path) == fresh
    assert raw.keys() == json.loads(record.to_json()).keys()  # optional keys only where they say something


def test_records_are_replaced_only_on_purpose(tmp_path: Path, record: Record) -> None:
    path = save_record(tmp_path, record)
    newer = changed(record, notes=("again",))
    with pytest.raises(UsageError, match=r"already have a record.*--overwrite always"):
        save_record(tmp_path, newer)
    assert load_record(path) == record
    assert save_record(tmp_path, newer, overwrite=True) == path
    assert load_record(path) == newer


def test_overwrite_replaces_a_broken_file(
    tmp_path: Path, record: Record, caplog: pytest.LogCaptureFixture
) -> None:
    path = record_path(tmp_path, record)
    path.parent.mkdir()
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UsageError):
        save_record(tmp_path, record)
    save_record(tmp_path, record, overwrite=True)
    assert load_record(path) == record
    assert "unreadable" in caplog.text


def test_protocols_whose_digests_begin_alike_never_replace_each_other(
    tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = changed(record, protocol={**record.protocol, "seeds": [7, 8, 9]}, seeds=(7, 8, 9))
    path = record_path(tmp_path, record)
    monkeypatch.setattr("comit_bench.results.records.record_location", lambda *_: path)
    save_record(tmp_path, other)
    assert find_record(tmp_path, record.tokenizer, record.task, record.protocol_digest) is None
    with pytest.raises(BenchError, match="holds another result"):
        save_record(tmp_path, record, overwrite=True)
    assert load_record(path) == other


def test_saving_refuses_what_could_not_be_read_back(tmp_path: Path, record: Record) -> None:
    broken = record.model_copy(update={"limit": -1})  # model_copy does not validate
    with pytest.raises(CorruptFileError, match="limit"):
        save_record(tmp_path, broken)
    assert list(tmp_path.rglob("*")) == []


# ---------------------------------------------------------------------------------------- identity


def test_everything_that_changes_a_number_changes_the_file(tmp_path: Path, record: Record) -> None:
    tokenizer = record.tokenizer.model_dump()
    variants = [
        record,
        changed(record, tokenizer={**tokenizer, "weights": "fitted:" + "4d" * 32}),
        changed(record, tokenizer={**tokenizer, "weights": "random:0"}),
        changed(record, tokenizer={**tokenizer, "weights": "random:1"}),
        changed(record, tokenizer={**tokenizer, "revision": "abc"}),
        changed(record, tokenizer={**tokenizer, "name": "kmeans/patch"}),
        changed(record, tokenizer={**tokenizer, "name": "KMEANS-patch"}),
        changed(record, task={**record.task.model_dump(), "version": 2}),
        changed(record, protocol={**record.protocol, "limit": 10}, limit=10, complete=False),
        changed(record, protocol={**record.protocol, "control": "shuffle"}, control="shuffle"),
        changed(record, protocol={**record.protocol, "tokenizer": {"policy": "global"}}),
    ]
    paths = {str(record_path(tmp_path, variant)).lower() for variant in variants}
    assert len(paths) == len(variants)
    for variant in variants:
        save_record(tmp_path, variant)
    assert len(load_records(tmp_path)) == len(variants)


def test_environment_and_time_do_not_change_the_file(tmp_path: Path, record: Record) -> None:
    environment = Environment.collect(device="gpu", dtype="bfloat16", argv=["x"])
    other = changed(record, environment=environment, timings={"all": 1.0}, created="2030-01-01T00:00:00Z")
    assert record_path(tmp_path, other) == record_path(tmp_path, record)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/abs", "..", "a b", "naïve", "org/model", "CON:", "x" * 300]
)
def test_names_cannot_leave_the_directory(tmp_path: Path, record: Record, name: str) -> None:
    other = changed(record, tokenizer={**record.tokenizer.model_dump(), "name": name})
    path = save_record(tmp_path, other)
    assert path.resolve().parent.parent == tmp_path.resolve()
    assert load_records(tmp_path) == [other]


def test_slug_of_a_tokenizer_without_weights_is_its_name(record: Record) -> None:
    row = TokenizerRow(name="majority", family="majority", kind="reference", weights="none")
    assert tokenizer_slug(row) == "majority"


def test_protocol_digest_ignores_key_order_and_python_types() -> None:
    assert protocol_digest({"a": 1, "b": (1, 2)}) == protocol_digest({"b": [1, 2], "a": 1})
    assert protocol_digest({"a": 1}) != protocol_digest({"a": 2})
    with pytest.raises(ValueError, match="plain JSON"):
        protocol_digest({"a": object()})


def test_protocol_has_two_sides(record: Record) -> None:
    assert record.tokenizer_protocol == {"preprocessing": "center-crop 32", "policy": None, "options": {}}
    assert set(record.task_protocol) == {"task", "seeds", "limit", "control"}


def test_tokenizer_row_takes_over_the_info() -> None:
    info = TokenizerInfo(
        name="toy", family="toy", kind="baseline", weights="none", parameters=3, message_length=4,
        vocab_size=None, code_dim=2, resolution=8, preprocessing="none", trained=False,
    )  # fmt: skip
    row = TokenizerRow.from_info(info)
    assert (row.name, row.parameters, row.vocab_size, row.trained) == ("toy", 3, None, False)


def test_environment_names_no_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("USERPROFILE", "/home/ann")
    argv = ["/home/ann/bin/x", "--output=/home/ann", "/home/anna/y", "/srv/home/ann"]
    environment = Environment.collect(device="cpu", dtype="float32", argv=argv)
    assert environment.argv == ("~/bin/x", "--output=~", "/home/anna/y", "/srv/home/ann")
    assert environment.torch is not None
    assert environment.python.count(".") == 2


# ----------------------------------------------------------------------------------------- metrics


def test_metric_summarises_seeds() -> None:
    metric = Metric.from_seeds([40.0, 50.0, 60.0], n=100, chance=1.0)
    assert metric.value == 50.0
    assert metric.std == pytest.approx(10.0)  # n - 1 in the denominator
    assert metric.stderr is None and Metric.from_seeds([40.0], n=9, stderr=2.0).stderr == 2.0
    single = Metric.from_seeds([40.0], n=100)
    assert (single.value, single.std) == (40.0, None)
    assert Metric.from_seeds([120.0], n=5, unit="dB").value == 120


@pytest.mark.parametrize("values", [[], [float("nan")]])
def test_metric_refuses_what_is_no_number(values: list[float]) -> None:
    with pytest.raises(ValueError):
        Metric.from_seeds(values, n=10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value": 46.0}, "not the mean"),
        ({"std": 0.1}, "not the sample standard deviation"),
        ({"std": None}, "not the sample standard deviation"),
        ({"per_seed": (45.2,), "value": 45.2}, "single seed"),
        ({"n": 0}, "greater than or equal to 1"),
    ],
)
def test_metric_must_add_up(record: Record, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Metric.model_validate({**record.metrics["top1"].model_dump(), **change})


# -------------------------------------------------------------------------------------- bad records


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"limit": 5, "complete": False}, r"protocol\['limit'\]"),
        ({"control": "permute-labels"}, r"protocol\['control'\]"),
        ({"protocol_digest": "sha256:" + "0" * 64}, "edited by hand"),
        ({"seeds": (0, 1)}, "3 values for 2 seeds"),
        ({"seeds": (0, 1, 1)}, "repeat"),
        ({"counts": None}, "counts is required"),
        ({"environment": None}, "environment is required"),
        ({"metrics": {}}, "at least 1 item"),
        ({"created": "2026-01-01T00:00:00"}, "timezone"),
    ],
)
def test_record_must_be_consistent(record: Record, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Record.model_validate({**dict(record), **change})


def test_limited_record_cannot_be_complete(record: Record) -> None:
    with pytest.raises(ValidationError, match="complete must be false"):
        changed(record, protocol={**record.protocol, "limit": 5}, limit=5)


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("metrcis",), {}, r"metrcis: unknown key\. Did you mean 'metrics'"),
        (("tokenizer", "vocab"), 5, r"tokenizer\.vocab: unknown key\. Did you mean 'vocab_size'"),
        (("metrics", "top1", "valu"), 5, r"metrics\.top1\.valu: unknown key\. Did you mean 'value'"),
        (("task", "dataset", "finger_print"), "x", r"task\.dataset\.finger_print.*'fingerprint'"),
        (("environment", "devise"), "x", r"environment\.devise: unknown key\. Did you mean 'device'"),
        (("metrics", "top1", "value"), "45.2", r"metrics\.top1\.value = '45\.2'"),
        (("tokenizer", "kind"), "lerned", r"tokenizer\.kind = 'lerned'.*'learned'"),
        (("tokenizer", "name"), "two\nlines", r"tokenizer\.name.*one line"),
        (("tokenizer", "name"), "\x1b[31mred", r"tokenizer\.name.*control"),
        (("protocol", "seeds"), [9], "edited by hand"),
        (("created",), "yesterday", "created"),
        (("schema",), None, "'schema' must be 1 to 3, got None"),
        (("schema",), True, "'schema' must be 1 to 3"),
    ],
)
def test_invalid_files_name_file_and_key(
    tmp_path: Path, record: Record, keys: tuple[str, ...], value: Any, words: str
) -> None:
    path = edited(tmp_path, record, *keys, value=value)
    with pytest.raises(CorruptFileError, match=words) as caught:
        load_record(path)
    assert str(path) in str(caught.value)


def test_missing_key_is_named(tmp_path: Path, record: Record) -> None:
    raw = json.loads(record.to_json())
    del raw["task"]["dataset"]["version"]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(CorruptFileError, match=r"task\.dataset\.version: required key is missing"):
        load_record(path)


def test_newer_schema_asks_for_an_upgrade(tmp_path: Path, record: Record) -> None:
    path = edited(tmp_path, record, "schema", value=4)
    with pytest.raises(UsageError, match=r"newer comit_bench.*pip install -U"):
        load_record(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b'{"schema": 1, "schema": 1}',
        b'{"schema": 1}',
        b"[" * 100_000,
        b'{"schema": 1, "protocol": {"x": NaN}}',
    ],
)
def test_files_that_are_no_records(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"r\.json"):
        load_record(path)


def test_every_truncation_is_noticed(tmp_path: Path, record: Record) -> None:
    text = record.to_json().rstrip()
    path = tmp_path / "r.json"
    for length in range(0, len(text), 97):
        path.write_text(text[:length], encoding="utf-8")
        with pytest.raises(CorruptFileError):
            load_record(path)


def test_absent_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no such file"):
        load_record(tmp_path / "none.json")
    with pytest.raises(BenchError, match="cannot be read"):
        load_record(tmp_path)
    assert load_records(tmp_path / "nowhere") == []


def test_broken_file_never_hides_the_others(
    tmp_path: Path, record: Record, caplog: pytest.LogCaptureFixture
) -> None:
    save_record(tmp_path, record)
    (tmp_path / "aa.json").write_text("{", encoding="utf-8")
    (tmp_path / "zz.json").write_text('{"schema": 9}', encoding="utf-8")
    (tmp_path / ".hidden.json").write_text("{", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert load_records(tmp_path) == [record]
    assert "aa.json" in caplog.text and "zz.json" in caplog.text and ".hidden" not in caplog.text
    with pytest.raises(CorruptFileError, match=r"(?s)aa\.json.*zz\.json"):
        load_records(tmp_path, strict=True)


def test_find_record(tmp_path: Path, record: Record) -> None:
    assert find_record(tmp_path, record.tokenizer, record.task, record.protocol_digest) is None
    path = save_record(tmp_path, record)
    retrained = record.tokenizer.model_copy(update={"weights": "random:0"})
    assert find_record(tmp_path, retrained, record.task, record.protocol_digest) is None
    path.write_text("", encoding="utf-8")
    with pytest.raises(CorruptFileError):
        find_record(tmp_path, record.tokenizer, record.task, record.protocol_digest)


def test_validate_record_file(tmp_path: Path, record: Record, caplog: pytest.LogCaptureFixture) -> None:
    path = save_record(tmp_path, record)
    assert validate_record_file(path) == record
    assert caplog.text == ""
    assert validate_record_file(path.rename(path.with_name("mine.json"))) == record
    assert "recognition-scenes-v1-0c9336e01c1e.json" in caplog.text
