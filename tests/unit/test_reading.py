"""Text, JSON, YAML and paths: any bytes end in a value or in one of our errors, which names the file."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import yaml
from bad_world import BAD_JSON, BAD_PLACES, BAD_YAML, place_badly
from hypothesis import given, settings
from hypothesis import strategies as st

from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError, shown
from comit_bench.files import cache_root, user_path
from comit_bench.recipes.reading import parse_json, parse_yaml, read_json, read_text, read_yaml

# Broken as a recipe, though they are YAML (or JSON) of plain values.
GOOD_YAML = {"empty", "only-comment", "list", "text", "number", "date", "wrong-date", "sixties"}
GOOD_JSON = {"list", "number", "null", "text", "empty-object"}
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def one_line(error: BenchError, name: str) -> bool:
    text = str(error)
    return name in text and len(text) < 1000 and text.isprintable()


@pytest.mark.parametrize("name", [n for n in BAD_YAML if n not in GOOD_YAML])
def test_bad_yaml(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(BAD_YAML[name])
    with pytest.raises(UsageError) as caught:
        read_yaml(path)
    assert one_line(caught.value, "x.yaml")


@pytest.mark.parametrize("name", [n for n in BAD_JSON if n not in GOOD_JSON])
def test_bad_json(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(BAD_JSON[name])
    with pytest.raises(CorruptFileError) as caught:
        read_json(path)
    assert one_line(caught.value, "x.json")


@pytest.mark.parametrize("how", BAD_PLACES)
@pytest.mark.parametrize("read", [read_text, read_json, read_yaml])
def test_places_that_are_no_files(tmp_path: Path, how: str, read: object) -> None:
    path = tmp_path / "x"
    place_badly(path, how)
    with pytest.raises(MissingError if how == "absent" else BenchError) as caught:
        read(path)  # type: ignore[operator]
    assert one_line(caught.value, "x")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_end_in_a_value_or_in_our_error(
    tmp_path_factory: pytest.TempPathFactory, body: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(body)
    for read in (read_json, read_yaml):
        try:
            json.dumps(read(path), allow_nan=False).encode()
        except BenchError as error:
            assert str(path) in str(error)


@settings(max_examples=100, deadline=None)
@given(st.text("{}[]:,-&*!|>%@`\"'#?0123456789.eExo_ntrufalse~\n \t<=", max_size=40))
def test_any_yaml_punctuation(text: str) -> None:
    try:
        json.dumps(parse_yaml(text, "here"), allow_nan=False)
    except UsageError as error:
        assert str(error).startswith("here: ")


@settings(max_examples=100, deadline=None)
@given(PLAIN)
def test_plain_values_come_back(value: object) -> None:
    assert parse_json(json.dumps(value), "here") == value
    assert parse_json(json.dumps(value, ensure_ascii=False), "here") == value
    back = parse_yaml(yaml.safe_dump(value), "here")
    assert back == value or math.isclose(back, value)


def test_dates_and_large_files(tmp_path: Path) -> None:
    assert parse_yaml("a: 2024-01-31\nb: 2024-13-45", "x") == {"a": "2024-01-31", "b": "2024-13-45"}
    assert parse_yaml("\ufeffa: 1", "x") == {"a": 1}
    (tmp_path / "large.json").write_text(f'["{"x" * 2000}"]')
    assert len(read_json(tmp_path / "large.json")[0]) == 2000
    with pytest.raises(CorruptFileError, match="too large"):
        read_json(tmp_path / "large.json", most=1000)


def test_annotations_of_others_are_read_leniently() -> None:
    assert parse_json('{"a": 1, "a": 2, "b": Infinity}', "x", strict=False) == {"a": 2, "b": math.inf}


@pytest.mark.parametrize("text", ["", "~nobody-at-all/x", "x" * 5000, "y" * 300, "a\0b"])
def test_what_can_be_no_path(text: str) -> None:
    with pytest.raises(UsageError, match="--output") as caught:
        user_path(text, "--output")
    assert one_line(caught.value, "--output")


def test_paths_of_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x") == tmp_path / "x"
    (tmp_path / "file").write_text("")
    for text in ("relative/not/there", str(tmp_path / "file" / "below"), os.fsdecode(b"caf\xe9")):
        assert user_path(text) == Path(text)
    monkeypatch.setenv("COMIT_BENCH_CACHE", "~nobody-at-all/x")
    with pytest.raises(UsageError, match="COMIT_BENCH_CACHE"):
        cache_root()


def test_values_in_messages() -> None:
    assert shown("steps") == "'steps'" and shown(1.5) == "1.5"
    assert len(shown("x" * 5000)) < 300 and "5,002 characters" in shown("x" * 5000)
    assert shown(10**5000) == "a value of type int that cannot be shown"
    assert shown("a\x1b[31m\ud800") == r"'a\x1b[31m\ud800'"
    loop: list[object] = []
    loop.append(loop)
    assert shown(loop) == "[[...]]"
