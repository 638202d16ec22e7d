"""``comit-bench cache ls | clear``, and what ``--overwrite always`` makes anew."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from tiny import write_images, write_recipes
from typer.testing import CliRunner

import comit_bench
from comit_bench.commands.app import app
from comit_bench.commands.cache import MARKS, chosen_kinds, find_items, remove_items
from comit_bench.errors import BenchError, UsageError
from comit_bench.pipeline.evaluate import evaluate
from comit_bench.tokenizers.base import TokenizerInfo, Tokens
from comit_bench.train.features import FeatureStore, layout_for

NOT_CACHES: set[str] = set()  # folders below something else that is called root


class Counting:
    """Four ids per image; counts the images that it has seen."""

    def __init__(self, step: int = 8) -> None:
        self.seen, self.step = 0, step
        self.info = TokenizerInfo(
            name="counting", family="counting", kind="baseline", weights="none", parameters=0,
            message_length=4, vocab_size=256, code_dim=1, resolution=32,
            preprocessing="center_crop|resize(32,bilinear)",
        )  # fmt: skip

    def encode(self, images_u8: torch.Tensor, *, policy: Any = None, generators: Any = None) -> Tokens:
        self.seen += len(images_u8)
        ids = images_u8.flatten(1)[:, :4].long() // self.step
        return Tokens(ids, self.codes_from_ids(ids))

    def codes_from_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.float()[..., None] / 16

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> torch.Tensor:
        raise NotImplementedError


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "suite": "scenes", "data_root": write_images(tmp_path / "data", train=6, val=4),
        "include": (write_recipes(tmp_path / "recipes"),), "cache": tmp_path / "cache", "seeds": 1,
        "output": tmp_path / "out", "device": "cpu", "references": False,
    }  # fmt: skip


def measure(tokenizer: Any, settings: dict[str, Any], **changes: Any) -> Any:
    (record,) = evaluate(tokenizer, ["tiny-colours"], **{**settings, **changes})
    return record


def test_paths_may_be_text(settings: dict[str, Any], tmp_path: Path) -> None:
    written = {name: str(settings[name]) for name in ("output", "data_root", "cache")}
    record = measure(Counting(), settings, **written)
    assert list((tmp_path / "out" / "records").rglob("*.json")) and record.metrics
    with pytest.raises(UsageError, match="output ''"):
        measure(Counting(), settings, output="")


def test_overwrite_always_makes_tokens_anew(settings: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = Counting()
    first = measure(tokenizer, settings)
    assert tokenizer.seen == 40
    shards = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("shard-*")}
    assert len(shards) == 2
    tokenizer.step = 64  # as if the tokens in the cache had been wrong: the key does not see it
    kept = measure(tokenizer, settings)
    assert tokenizer.seen == 40 and kept == first
    again = measure(tokenizer, settings, overwrite="always")
    assert tokenizer.seen == 80
    assert again.protocol_digest == first.protocol_digest
    assert {p: p.read_bytes() for p in (tmp_path / "cache").rglob("shard-*")} != shards


def test_overwrite_always_tokenizes_once_per_run(settings: dict[str, Any], tmp_path: Path) -> None:
    write_recipes(tmp_path / "more")
    other = tmp_path / "more" / "probes" / "tiny-colours"
    text = (other / "task.yaml").read_text().replace("name: tiny-colours", "name: tiny-again")
    other = other.rename(other.with_name("tiny-again"))
    (other / "task.yaml").write_text(text)
    shutil.rmtree(tmp_path / "more" / "datasets")
    settings["include"] += (tmp_path / "more",)
    tokenizer = Counting()
    records = evaluate(tokenizer, ["tiny-colours", "tiny-again"], **settings, overwrite="always")
    assert len(records) == 2 and tokenizer.seen == 40


def test_unfinished_work_is_not_continued_by_overwrite_always(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comit_bench.tokenizers.pixels import PixelOracleTokenizer

    settings["include"] = (
        write_recipes(
            tmp_path / "looking", kind="reconstruction", name="tiny-pixels", seeds=1, split={"report": "val"},
            probe=None, attributes=None, reconstruction={"features": None, "lpips": None, "ssim": False},
        ),
    )  # fmt: skip
    recipe = tmp_path / "looking" / "probes" / "tiny-pixels" / "task.yaml"
    lines = recipe.read_text().splitlines()
    recipe.write_text("\n".join(line for line in lines if not line.startswith(("probe:", "attributes:"))))
    tokenizer = PixelOracleTokenizer()
    monkeypatch.setattr("comit_bench.pipeline.evaluate.keep_record", _killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tokenizer, ["tiny-pixels"], **settings)
    monkeypatch.undo()
    (part,) = (tmp_path / "cache" / "unfinished").rglob("*.npz")
    wrong = {name: np.zeros_like(values) for name, values in np.load(part).items()}
    np.savez(part, **wrong)  # type: ignore[arg-type]
    (record,) = evaluate(tokenizer, ["tiny-pixels"], **settings, overwrite="always")
    assert record.metrics["psnr"].value > 50


def _killed(*args: Any, **more: Any) -> None:
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------ ls and clear


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One thing of every kind at least, and things that nobody here has made."""
    home = tmp_path_factory.mktemp("made")
    settings: dict[str, Any] = {
        "suite": "scenes", "data_root": write_images(home / "data", train=3, val=2),
        "include": (write_recipes(home / "recipes"),), "cache": home / "cache", "seeds": 1,
        "output": home / "out", "device": "cpu", "references": False,
    }  # fmt: skip
    root = home / "cache"
    measure("kmeans-patch", {**settings, "options": {"vocab": 8}})
    measure("comit-nano", {**settings, "policy": "global+raster:4"})
    for path in ("references/a.npz", "text/a.safetensors", "tar-index/a.json", "decoded/a.json",
                 "negatives/a.safetensors", "digests/a.npz", "reports/a.json",
                 "unfinished/a/decoding-0.npz", "datasets/scenes/scenes.json", "datasets/scenes/val/0.png",
                 "manifests/coco2017/0123/manifest.parquet", "weights/alit-small/source.json",
                 "weights/alit-small/model.safetensors", "training-scenes/0123/key.json",
                 "training-scenes/0123/images.npy"):  # fmt: skip
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"{}" + b"." * 1500)
    key: dict[str, object] = {"teacher": {"kind": "scenes-teacher"}, "data": "sha256:12"}
    FeatureStore.open(key, layout_for(3, (2, 2), 4, "float32"), root=root)
    for path in ("datasets/my-photos/a.jpg", "weights/mine/model.safetensors", "notes.txt", "tokens/readme"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("mine")
    return root


@pytest.fixture
def cache(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMIT_BENCH_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(made, tmp_path / "cache"))


def run(*arguments: str, exit_code: int = 0, stdin: str | None = None) -> Any:
    done = CliRunner().invoke(app, ["cache", *arguments], input=stdin)
    assert done.exit_code == exit_code, (done.output, done.exception)
    return done


def kept(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_ls_names_tokenizer_data_policy_size_and_date(cache: Path) -> None:
    lines = [line.split() for line in run("ls").stdout.splitlines() if line.strip()]
    assert lines[0] == ["kind", "items", "size", "changed", "policy", "what", "data"]
    rows = [line for line in lines if line[0] in MARKS]
    assert {row[0] for row in rows} == set(MARKS)
    tokens = [row for row in rows if row[0] == "tokens"]
    assert [(row[-3], row[-2], row[-1]) for row in tokens] == [
        ("global+raster:4", "comit-nano", "tiny/train"),
        ("global+raster:4", "comit-nano", "tiny/val"),
        ("-", "kmeans-patch", "tiny/train"),
        ("-", "kmeans-patch", "tiny/val"),
    ]
    assert all(row[1] == "1" and row[3] in ("B", "kB") and row[4].startswith("20") for row in tokens)
    (fit,) = (row for row in rows if row[0] == "fits")
    assert fit[-3:] == ["kmeans-patch", "tiny", "train"]
    assert [line.split()[0] for line in run("ls", "fits").stdout.splitlines() if line.strip()][-1] == "fits"
    assert "my-photos" not in run("ls").stdout


def test_ls_of_nothing_and_of_older_stores(cache: Path) -> None:
    for about in cache.rglob("about.json"):
        about.unlink()
    assert "kmeans-patch fitted:" in run("ls", "tokens").stdout
    for path in (cache / "tokens").rglob("key.json"):
        path.write_text("{")
    assert run("ls", "tokens").stdout.count("?") == 3
    remove_items(cache, find_items(cache, list(MARKS)))
    done = run("ls")
    assert done.stdout == "" and str(cache) in done.stderr


@pytest.mark.parametrize("kind", MARKS)
def test_clear_removes_what_it_names_and_nothing_else(cache: Path, kind: str) -> None:
    before = kept(cache)
    found = [item.path for item in find_items(cache, [kind])]
    gone = {path.relative_to(cache) for item in found for path in (item, *item.rglob("*"))}
    assert gone
    assert f"of {kind} (" in run("clear", kind, "--yes").stdout
    assert kept(cache) == before - {path.as_posix() for path in gone}
    assert find_items(cache, [kind]) == []
    run("clear", kind, "--yes")  # again: nothing to do


def test_clear_all_leaves_what_is_not_ours(cache: Path) -> None:
    run("clear", "all", "--yes")
    mine = {"datasets/my-photos/a.jpg", "weights/mine/model.safetensors", "notes.txt", "tokens/readme"}
    assert {path for path in kept(cache) if not path.endswith(".lock")} == mine


def test_clear_asks_or_wants_to_be_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = kept(cache)
    done = CliRunner().invoke(app, ["cache", "clear", "fits"])
    assert isinstance(done.exception, UsageError) and "add --yes" in str(done.exception)
    assert "1 items of fits" in str(done.exception)
    assert isinstance(CliRunner().invoke(app, ["cache", "clear"]).exception, SystemExit)
    with pytest.raises(UsageError, match="Did you mean 'tokens'"):
        chosen_kinds(["token"])
    assert kept(cache) == before


def test_nothing_outside_the_cache_is_touched(cache: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.move(cache / "tokens", outside)
    (cache / "tokens").symlink_to(outside)
    before = kept(outside)
    with pytest.raises(UsageError, match=r"leads out of the cache.*by hand"):
        remove_items(cache, find_items(cache, ["fits", "tokens"]))
    assert kept(outside) == before and find_items(cache, ["fits"])
    (cache / "tokens").unlink()
    (cache / "datasets" / "scenes" / "link").symlink_to(outside)
    remove_items(cache, find_items(cache, ["datasets"]))
    assert kept(outside) == before and not (cache / "datasets" / "scenes").exists()


@pytest.mark.parametrize("lock", ["weights/.lock", "tar-index/.a1.lock"])
def test_clear_refuses_while_another_process_is_at_work(cache: Path, lock: str) -> None:
    kind = lock.partition("/")[0]
    before = {path for path in kept(cache) if not path.endswith(".lock")}
    with FileLock(cache / lock), pytest.raises(BenchError, match=r"another process is at work"):
        remove_items(cache, find_items(cache, [kind, "fits"]))
    assert {path for path in kept(cache) if not path.endswith(".lock")} == before
    remove_items(cache, find_items(cache, [kind, "fits"]))
    assert not find_items(cache, [kind, "fits"])


def test_every_kind_of_the_package_is_known() -> None:
    """What a module puts below the cache directory can be listed and cleared."""
    package = Path(comit_bench.__file__).parent
    pattern = re.compile(r'\b(?:cache|cache_dir|cache_root\(\)|root)\)? / "([a-z-]+)"')
    found = {kind for path in package.rglob("*.py") for kind in pattern.findall(path.read_text())}
    assert {"tokens", "fits", "features", "weights", "negatives"} <= found
    assert set(MARKS) <= found and found - set(MARKS) <= NOT_CACHES


def test_a_store_says_whose_it_is(cache: Path) -> None:
    notes = [json.loads(path.read_text()) for path in (cache / "tokens").rglob("about.json")]
    assert {note["tokenizer"] for note in notes} == {"comit-nano", "kmeans-patch"}
