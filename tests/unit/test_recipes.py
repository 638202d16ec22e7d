"""Recipes: what is found, what is refused, and how the refusal reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny import write_recipes

from comit_bench.errors import UsageError, did_you_mean
from comit_bench.recipes.specs import DatasetSpec, TaskSpec, find_datasets, find_tasks, parse_recipe, pick
from comit_bench.tokenizers.comit.model import PRESETS
from comit_bench.tokenizers.registry import builtin, find_tokenizer, tokenizers


def edited(path: Path, **changes: object) -> Path:
    content = yaml.safe_load(path.read_text())
    content.update(changes)
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_recipes(tmp_path) / "probes" / "tiny-colours" / "task.yaml"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"verison": 1}, "verison: unknown key. Did you mean 'version'?"),
        ({"probe": {"widht": 8}}, "probe.widht: unknown key. Did you mean 'width'"),
        ({"split": {"early_stop": {"fractoin": 0.1}}}, "Did you mean 'fraction'"),
        ({"kind": "clasification"}, "kind = 'clasification'"),
        ({"version": 0}, "version = 0"),
        ({"seeds": "three"}, "seeds = 'three'"),
        ({"probe": {"width": 10, "heads": 3}}, "multiple of heads"),
        ({"split": {"early_stop": {"fraction": 1.5}}}, "fraction = 1.5"),
    ],
)
def test_wrong_recipes_name_file_key_and_value(task: Path, changes: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_recipe(edited(task, **changes), TaskSpec)
    assert str(task) in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "name: [unclosed", "\x00\x01"])
def test_what_is_no_mapping_is_refused(task: Path, text: str) -> None:
    task.write_text(text)
    with pytest.raises(UsageError, match=r"task\.yaml"):
        parse_recipe(task, TaskSpec)


def test_missing_keys_are_listed(task: Path) -> None:
    task.write_text("name: tiny-colours\n")
    with pytest.raises(UsageError, match="dataset: required key is missing"):
        parse_recipe(task, TaskSpec)


def test_yaml_cannot_run_code(task: Path) -> None:
    task.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(UsageError, match="not valid YAML"):
        parse_recipe(task, TaskSpec)


def test_includes_add_and_replace_only_when_allowed(tmp_path: Path, task: Path) -> None:
    found = find_tasks((tmp_path,))
    assert found["tiny-colours"].origin == str(tmp_path) and found["imagenet100"].origin == "builtin"
    again = write_recipes(tmp_path / "second", seeds=7)
    with pytest.raises(UsageError, match="already defined"):
        find_tasks((tmp_path, again))
    assert find_tasks((tmp_path, again), allow_override=True)["tiny-colours"].spec.seeds == 7
    edited(task, name="other")
    with pytest.raises(UsageError, match="its folder is"):
        find_tasks((tmp_path,))


def test_digest_sees_values_not_layout(task: Path) -> None:
    roots = (task.parents[2],)
    before = find_tasks(roots)["tiny-colours"].digest
    reversed_keys = dict(reversed(list(yaml.safe_load(task.read_text()).items())))
    task.write_text("# a comment\n" + yaml.safe_dump(reversed_keys, sort_keys=False))
    assert find_tasks(roots)["tiny-colours"].digest == before
    edited(task, seeds=5)
    assert find_tasks(roots)["tiny-colours"].digest != before


def test_pick_suggests(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'imagenet100'"):
        pick("imagenet-100", find_datasets(), "dataset")


def test_did_you_mean_lists_all_when_nothing_is_near() -> None:
    assert did_you_mean("zzz", ["alpha", "beta"]) == " Known: alpha, beta."
    assert did_you_mean("ALPHAA", ["alpha", "beta"]) == " Did you mean 'alpha'?"
    assert did_you_mean("x", []) == ""


def test_built_in_specs_are_consistent() -> None:
    for recipe in find_datasets().values():
        assert isinstance(recipe.spec, DatasetSpec) and recipe.spec.licence
    for entry in builtin().values():
        if entry.name in PRESETS:
            spec = PRESETS[entry.name]
            vocabulary = 1
            for level in spec.fsq_levels:
                vocabulary *= level
            assert (entry.preset.message_length, entry.preset.vocab_size) == (spec.message_length, vocabulary)


def test_tokenizer_names_ignore_case() -> None:
    assert find_tokenizer("COMiT-L").name == "comit-l"
    with pytest.raises(UsageError, match="Did you mean"):
        find_tokenizer("comit-lx")
    assert all(callable(entry.loader()) for entry in tokenizers().values())
