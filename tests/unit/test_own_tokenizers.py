"""Tokenizers of others: the documented code runs word for word, and what is wrong is said in one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import VQModel
from plugins import install
from tiny import write_images, write_recipes

from comit_bench.errors import BenchError, MissingError, UsageError
from comit_bench.pipeline.evaluate import evaluate
from comit_bench.pipeline.jobs import Settings, make_jobs
from comit_bench.pipeline.tokenize import store_key
from comit_bench.results.records import load_records
from comit_bench.tokenizers.base import (
    AttendingTokenizer,
    Attends,
    Gathers,
    HasHiddenFeatures,
    LooksAtCrops,
    Tokenizer,
    TokenizerInfo,
    Tokens,
    looks_at_crops,
)
from comit_bench.tokenizers.load import entry_for, load_tokenizer
from comit_bench.tokenizers.registry import convert, find_tokenizer, taken_by

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tokenizers" / "your-own.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.split("\n## Adding a tokenizer\n")[1].split("\n## ")[0]


def snippets(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def modules_of(text: str) -> dict[str, str]:
    """The python snippets that begin with the name of their file."""
    named = [s for s in snippets(text, "python") if s.startswith("# ")]
    return {s.split("\n", 1)[0].removeprefix("# "): s for s in named}


def points_of(text: str) -> dict[str, str]:
    points: dict[str, str] = {}
    for snippet in snippets(text, "toml"):
        points |= tomllib.loads(snippet)["project"]["entry-points"]["comit_bench.tokenizers"]
    return points


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


@pytest.fixture
def documented(site: Path) -> Path:
    install(site, modules_of(PAGE), points_of(PAGE), name="my-package".replace("-", "_"))
    return site


# ------------------------------------------------------------------------- the documentation


def test_the_page_has_all_kinds_of_snippets() -> None:
    languages = re.findall(r"```(\w*)\n.*?```", PAGE, flags=re.DOTALL)
    assert set(languages) == {"python", "toml", "bash"} and len(languages) == 10
    assert set(modules_of(PAGE)) == {"my_package/adapter.py", "my_package/halves.py"}
    assert set(points_of(PAGE)) == {"my-tokenizer", "halves"}


def test_documented_tokenizers_load_by_name_and_keep_the_contract(documented: Path) -> None:
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    for name in points_of(PAGE):
        tokenizer = load_tokenizer(name.upper(), device="cpu", levels="16")
        assert isinstance(tokenizer, Tokenizer) and tokenizer.info.vocab_size == 16
        tokens = tokenizer.encode(images)
        assert tokens.ids is not None and torch.equal(tokenizer.codes_from_ids(tokens.ids), tokens.codes)
        back = tokenizer.decode(tokens, seeds=range(3))
        assert back.shape == images.shape and back.dtype == torch.uint8
        assert tokenizer.info.options == {"levels": "16"}
        assert re.fullmatch(r"0\.1\+[0-9a-f]{16}", tokenizer.info.version)
    with pytest.raises(UsageError, match=r"my-tokenizer: levels must be 4, 8 or 16, got 5"):
        load_tokenizer("my-tokenizer", device="cpu", levels=5)


def test_the_signature_in_the_readme_is_called_as_it_says(documented: Path) -> None:
    """The README shows a loader in a comment beside the entry point."""
    (signature,) = re.findall(r"load\(name[^)]*\)", SECTION)
    source = f"""
from my_package.adapter import MyTokenizer

SEEN = []

def {signature}:
    SEEN.append((name, weights, device, offline, options))
    return MyTokenizer(device=device)
"""
    (target,) = points_of(SECTION).values()
    module, attribute = target.split(":")
    assert attribute == "load"
    install(documented, {"readme_module.py": source}, {"from-readme": "readme_module:load"}, name="readme")
    tokenizer = load_tokenizer("from-readme", device="cpu", offline=True, tint="3")
    (seen,) = sys.modules["readme_module"].SEEN
    assert seen[:2] == ("from-readme", None) and seen[2:4] == (torch.device("cpu"), True)
    assert seen[4]["tint"] == 3
    assert tokenizer.info.options["tint"] == "3"
    assert module == "my_package.adapter"


def test_every_word_of_the_loader_arrives(site: Path) -> None:
    """The report: ``seed`` was promised and never passed."""
    source = """
from my_package.adapter import MyTokenizer

def load(name, *, weights, device, offline, seed, dtype, **options):
    tokenizer = MyTokenizer(device=device)
    tokenizer.seen = (name, weights, str(device), offline, seed, str(dtype), options)
    return tokenizer
"""
    modules = {**modules_of(PAGE), "strict_module.py": source}
    install(site, modules, {"strict": "strict_module:load"})
    tokenizer: Any = load_tokenizer("strict", device="cpu", seed=7)
    assert tokenizer.seen == ("strict", None, "cpu", False, 7, "torch.float32", {})
    assert tokenizer.info.options["seed"] == "7"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("own")
    return {
        "suite": "scenes", "data_root": write_images(home / "data", train=6, val=4),
        "include": (write_recipes(home / "recipes"),), "seeds": 1, "device": "cpu", "references": False,
    }  # fmt: skip


def measure(tokenizer: Any, settings: dict[str, Any], folder: Path, **changes: Any) -> list[Any]:
    where = {"cache": folder / "cache", "output": folder / "out"}
    return evaluate(tokenizer, ["tiny-colours"], **{**settings, **where, **changes})


def test_crops_are_a_capability_and_not_a_matter_of_being_a_plugin(
    documented: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    """The report: every plugin was taken for one that looks at crops."""
    names, policies = ["my-tokenizer", "halves"], ["left", "right"]
    jobs = make_jobs(names, ["recognition-scenes"], Settings(policy=policies))
    assert [(job.label, job.policy) for job in jobs] == [
        ("my-tokenizer", None), ("halves", "left"), ("halves", "right"),
    ]  # fmt: skip
    records = measure(names, settings, tmp_path, policy=policies)
    assert [r.protocol["tokenizer"]["policy"] for r in records] == [None, "left", "right"]
    assert len(load_records(tmp_path / "out" / "records", strict=True)) == 3
    with pytest.raises(UsageError, match="left or right"):
        measure("halves", settings, tmp_path, policy="raster:4")


def run_bash(block: str, folder: Path, *path: Path) -> None:
    """A block of commands in a folder that has ``python`` and an offline ``pip``."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    target = folder / "site"
    pip = "-m pip install --quiet --no-deps --no-index --no-build-isolation --disable-pip-version-check"
    for name, line in (
        ("python", f'exec {sys.executable} "$@"'),
        ("pip", f'[ "$1" = install ] || exit 1; shift; exec {sys.executable} {pip} --target {target} "$@"'),
    ):
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(map(str, (target, *path, ROOT))),
    }
    done = subprocess.run(
        ["bash", "-euc", block], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(snippets(PAGE, "bash"))))
def test_documented_commands_run_word_for_word(number: int, documented: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples" / "mean_colour", tmp_path / "examples" / "mean_colour")
    model = VQModel(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=37, sample_size=16,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "my-vqgan")
    run_bash(snippets(PAGE, "bash")[number], tmp_path, documented)
    assert load_records(tmp_path / "results" / "records", strict=True)


@pytest.mark.slow
def test_documented_python_runs_word_for_word(
    documented: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": "__main__"}
    for snippet in snippets(PAGE, "python"):
        exec(snippet, space)
    assert [record.tokenizer.name for record in space["records"]][-1] == "my-tokenizer"


# ----------------------------------------------------------------------- loaders by their place


def test_a_loader_is_named_by_module_or_file(
    documented: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "somewhere" / "random.py"  # not Python's own module of that name
    file.parent.mkdir()
    file.write_text(modules_of(PAGE)["my_package/adapter.py"].replace('name="my-tokenizer"', 'name="mine"'))
    monkeypatch.chdir(file.parent)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    by_wheel, by_module, *by_file = (
        load_tokenizer(name, device="cpu", levels="16")
        for name in ("my-tokenizer", "my_package.adapter:load", "./random.py:load", str(file) + ":load")
    )
    for tokenizer in (by_module, *by_file):
        assert torch.equal(tokenizer.encode(images).codes, by_wheel.encode(images).codes)
        assert tokenizer.info.options == {"levels": "16"}
        assert re.fullmatch(r"[0-9a-f]{16}", tokenizer.info.version)
    assert by_wheel.info.version == f"0.1+{by_module.info.version}"
    assert type(by_file[0]) is type(by_file[1]) and type(by_file[0]) is not type(by_module)
    assert by_file[0].info == by_file[1].info != by_module.info
    entry = entry_for("./random.py:load")
    assert (entry.name, entry.known_options(), entry.looks_at_crops()) == ("random:load", ("levels",), False)
    with pytest.raises(UsageError, match=r"random:load: levels must be 4, 8 or 16, got 5"):
        load_tokenizer("./random.py:load", device="cpu", levels=5)
    (file.parent / "name.py").write_text("def load(name): return open(name)\n")
    with pytest.raises(FileNotFoundError, match="'name:load'"):
        load_tokenizer("name.py:load", device="cpu")


def test_the_version_of_a_file_is_its_content(tmp_path: Path) -> None:
    """Wherever it lies; another content, also of the same name, is another version."""
    source, versions = modules_of(PAGE)["my_package/adapter.py"], []
    for folder, text in (("a", source), ("b", source), ("c", source.replace("/ 256", "/ 257"))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(text)
        versions.append(load_tokenizer(f"{tmp_path / folder / 'mine.py'}:load", device="cpu").info.version)
    assert versions[0] == versions[1] != versions[2]


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("nowhere.at_all:load", UsageError, "No module named 'nowhere'"),
        ("json:nothing", UsageError, "has no attribute 'nothing'"),
        ("json:__name__", UsageError, "json:__name__ cannot be called"),
        ("os.path:basename", UsageError, "this is str without info"),
        ("./gone.py:load", MissingError, r"\./gone\.py: no such file"),
        ("./broken.py:load", UsageError, r"broken\.py:load cannot be imported \(SyntaxError"),
        ("./fails.py:load", UsageError, r"fails\.py:load cannot be imported \(ZeroDivisionError"),
        ("./fails.py", UsageError, r"\./fails\.py:ATTRIBUTE"),
    ],
)
def test_wrong_places_are_told(
    name: str, error: type[Exception], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("def load(:\n")
    Path("fails.py").write_text("1 / 0\n")
    for _ in range(2):
        with pytest.raises(error, match=says):
            load_tokenizer(name, device="cpu")


# --------------------------------------------------------------------------- names and types

READ: list[tuple[Any, Any, Any]] = [
    ("4", int, 4), (4, int, 4), ("-3", int, -3), ("0.5", float, 0.5), (3, float, 3.0), ("1e-3", float, 1e-3),
    ("yes", bool, True), ("off", bool, False), (1, bool, True), (0, bool, False), (True, bool, True),
    ("007", str, "007"), (7, str, "7"), (2.5, str, "2.5"), ("a b", str, "a b"), ("", str, ""),
    ("mode", Literal["mode", "sample"], "mode"), ("8", Literal[4, 8], 8), (8, Literal[4, 8], 8),
    ("auto", bool | Literal["auto"], "auto"), ("no", bool | Literal["auto"], False),
    ("3", int | None, 3), ("3", int | str, 3), ("three", int | str, "three"), ("2.5", int | float, 2.5),
    ("3", str | int, 3), ("5", Any, 5), ("5.5", Any, 5.5), ("five", Any, "five"), ("nan", Any, "nan"),
    ([1, 2], int, [1, 2]), (None, int, None), ("x/y", Path, "x/y"), (5, Path, "5"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "annotation", "wanted"), READ, ids=str)
def test_values_are_read_as_annotated(value: Any, annotation: Any, wanted: Any) -> None:
    found = convert(value, annotation, "x: y")
    assert found == wanted and type(found) is type(wanted)


WRONG: list[tuple[Any, Any, str]] = [
    ("4.5", int, "a whole number"), (4.5, int, "a whole number"), ("four", int, "a whole number"),
    (True, int, "a whole number"), ("1e3", int, "a whole number"), ("nan", float, "a number"),
    ("inf", float, "a number"), (float("nan"), float, "a number"), (2, bool, "on or off"),
    ("maybe", bool, "on or off, true or false"), ("maybe", bool | Literal["auto"], "auto, true or false"),
    ("mdoe", Literal["mode", "sample"], "mode or sample"), (5, Literal[4, 8], "4 or 8"),
    ("x", int | float, "a whole number or a number"),
    ("x", int | None, "a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "annotation", "words"), WRONG, ids=str)
def test_a_wrong_value_is_one_clear_line(value: Any, annotation: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        convert(value, annotation, "theirs: tint")
    assert str(caught.value).startswith("theirs: tint must be ") and words in str(caught.value)
    assert repr(value) in str(caught.value) and "\n" not in str(caught.value)


LOADERS = """
from __future__ import annotations
from functools import partial
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack
from my_package.adapter import MyTokenizer
if TYPE_CHECKING:
    from nowhere import Missing

class Options(TypedDict, total=False):
    levels: int
    mode: Literal["a", "b"]

def texts(name: str, *, device, levels: int = 8, other: Missing = None) -> MyTokenizer:
    return MyTokenizer(levels, device)

def plain(name, weights=None, device="cpu", offline=False, seed=0, levels: "int" = 8):
    return MyTokenizer(levels, device)

def typed_dict(name, *, device, **options: Unpack[Options]) -> MyTokenizer:
    return MyTokenizer(options.get("levels", 8), device)

class AsClass(MyTokenizer):
    def __init__(self, name: str, *, device, levels: int = 8):
        super().__init__(levels, device)

class Called:
    def __call__(self, name: str, *, device, levels: int = 8) -> MyTokenizer:
        return MyTokenizer(levels, device)

called = Called()
partly = partial(texts)
"""
FORMS = ("texts", "plain", "typed_dict", "AsClass", "called", "partly")


@pytest.mark.parametrize("form", FORMS)
def test_loaders_of_every_form(form: str, site: Path) -> None:
    install(site, {**modules_of(PAGE), "forms_module.py": LOADERS}, {"formed": f"forms_module:{form}"})
    entry = find_tokenizer("formed")
    assert "levels" in (entry.known_options() or ())
    assert load_tokenizer("formed", device="cpu", levels="4").info.vocab_size == 4
    with pytest.raises(UsageError, match="formed: levels must be a whole number, got 'four'"):
        load_tokenizer("formed", device="cpu", levels="four")
    with pytest.raises(UsageError, match="formed: levels must be a whole number"):
        make_jobs(["formed"], ["recognition-scenes"], Settings(options={"levels": "four"}))
    assert entry.looks_at_crops() is (None if form == "plain" else False)


def test_what_cannot_be_called_is_said(site: Path, tmp_path: Path) -> None:
    source = "import torch\nnumber = 3\ndef nothing():\n    pass\ndef only(*, name):\n    pass\n"
    points = {name: f"odd_module:{name}" for name in ("number", "nothing", "only", "absent")}
    install(site, {"odd_module.py": source}, {**points, "lost": "nowhere_module:load"})
    for name, words in (("number", "cannot be called"), ("nothing", "first argument"), ("absent", "imported"),
                        ("only", "first argument"), ("lost", "imported")):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            load_tokenizer(name, device="cpu")
    assert taken_by(lambda name, **options: None) == ({}, True)


def test_numbers_in_texts_survive_the_command_line() -> None:
    from comit_bench.commands.tokens import key_values

    assert key_values(["a=007", "b=1e5", "c=2.50", "d=4", "e=2.5"]) == {
        "a": "007", "b": "1e5", "c": "2.50", "d": 4, "e": 2.5,
    }  # fmt: skip


# --------------------------------------------------------------------------- what plugins leave out


def test_options_that_info_does_not_name_are_part_of_the_key(site: Path) -> None:
    source = """
from my_package.adapter import MyTokenizer

class Silent(MyTokenizer):
    def __init__(self, tint, device):
        super().__init__(8, device)
        self.tint = tint
        self.info.options.clear()

    def encode(self, images_u8, **settings):
        return super().encode(images_u8 + self.tint)

def load(name, *, device, tint: int = 0):
    return Silent(tint, device)
"""
    install(site, {**modules_of(PAGE), "silent_module.py": source}, {"silent": "silent_module:load"})
    given: list[dict[str, Any]] = [{}, {"tint": 0}, {"tint": 9}]
    plain, named, other = (load_tokenizer("silent", device="cpu", **options) for options in given)
    assert plain.info.options == named.info.options == {"tint": "0"} and other.info.options == {"tint": "9"}
    keys = [store_key(t, policy=None, fingerprint="", seed=0, selection="all") for t in (plain, named, other)]
    assert keys[0] == keys[1] != keys[2]


def test_a_changed_plugin_is_tokenized_again(site: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """The report: a changed ``encode`` of a plugin kept its old tokens."""
    source = modules_of(PAGE)["my_package/adapter.py"]
    points = {"my-tokenizer": "my_package.adapter:load"}
    changed = source.replace("* self.levels / 256", "* self.levels / 512")
    assert changed != source
    digests, stores = [], []
    for text, version in ((source, "0.1"), (source, "0.1"), (changed, "0.1"), (source, "0.2")):
        install(site, {"my_package/adapter.py": text}, points, version=version)
        (record,) = measure("my-tokenizer", settings, tmp_path)
        digests.append(record.protocol_digest)
        stores.append(len(list((tmp_path / "cache" / "tokens").glob("*/*"))))
    assert stores == [2, 2, 4, 6] and digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_the_loader_of_a_built_in_class_counts(site: Path) -> None:
    source = """
from comit_bench.tokenizers.pixels import PixelOracleTokenizer

def load(name, *, device):
    return PixelOracleTokenizer(device=device){}
"""
    versions = []
    for text in ("", "  # changed"):
        install(site, {"ours_module.py": source.format(text)}, {"ours": "ours_module:load"})
        versions.append(load_tokenizer("ours", device="cpu").info.version)
    assert len(set(versions)) == 2 and all(version.startswith("1+0.1+") for version in versions)


# --------------------------------------------------------------------------------- capabilities


def test_capabilities_of_the_built_in_ones() -> None:
    nano, titok = (load_tokenizer(name, device="cpu") for name in ("comit-nano", "titok-nano"))
    pixels = load_tokenizer("pixel-oracle", device="cpu")
    alit, selftok = (
        load_tokenizer(name, weights="random", device="meta") for name in ("alit-small", "selftok-512")
    )
    assert AttendingTokenizer is Attends
    found = {
        t.info.name: [isinstance(t, c) for c in (LooksAtCrops, Attends, HasHiddenFeatures, Gathers)]
        for t in (nano, titok, pixels, alit, selftok)
    }
    assert found == {
        "comit-nano": [True, True, False, True],
        "titok-nano": [False, True, False, False],
        "pixel-oracle": [False, False, False, False],
        "alit-small": [False, True, True, False],
        "selftok-512": [False, False, True, False],
    }


def test_a_wrapper_that_hands_calls_on_looks_at_crops_too() -> None:
    class Wrapper:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    assert looks_at_crops(Wrapper(load_tokenizer("comit-nano", device="cpu")))
    assert not looks_at_crops(Wrapper(load_tokenizer("pixel-oracle", device="cpu")))


CROPS = """
from my_package.adapter import MyTokenizer
from my_package.halves import Halves

LOADED = []

def unsaid(name, *, device):
    LOADED.append(name)
    return (Halves if "{kind}" == "crops" else MyTokenizer)(8, device)

def said(name, *, device):
    LOADED.append(name)
    return unsaid(name, device=device)

said.looks_at_crops = "{kind}" == "crops"
"""


@pytest.mark.parametrize("kind", ["crops", "whole"])
@pytest.mark.parametrize("loader", ["said", "unsaid"])
def test_crops_of_a_loader_that_is_not_annotated(
    kind: str, loader: str, site: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    """An attribute says it; else the tokenizer is loaded, once, and asked."""
    modules = {**modules_of(PAGE), "crops_module.py": CROPS.format(kind=kind)}
    install(site, modules, {"cropping": f"crops_module:{loader}"})
    jobs = make_jobs(["cropping"], ["recognition-scenes"], Settings(policy=["left", "right"]))
    assert len(jobs) == (1 if (kind, loader) == ("whole", "said") else 2)
    loaded = sys.modules["crops_module"].LOADED
    assert loaded == []
    records = measure("cropping", settings, tmp_path, policy=["left", "right"])
    assert [r.protocol["tokenizer"]["policy"] for r in records] == (
        ["left", "right"] if kind == "crops" else [None]
    )
    assert len(loaded) == (1 if loader == "unsaid" else 2)


# ------------------------------------------------------------------------------- at the border


class Toy:
    """Keeps the contract, until a test breaks it."""

    def __init__(self, **info: Any) -> None:
        plain: dict[str, Any] = {
            "name": "toy", "family": "toy", "kind": "baseline", "weights": "none", "parameters": 0,
            "message_length": 4, "vocab_size": 8, "code_dim": 2, "resolution": 32,
            "preprocessing": "center_crop|resize(32,bilinear)",
        }  # fmt: skip
        self.info = TokenizerInfo(**{**plain, **info})

    def encode(self, images_u8: torch.Tensor, *, policy: Any = None, generators: Any = None) -> Any:
        ids = images_u8.flatten(1)[:, :4].long() // 32
        return Tokens(ids, self.codes_from_ids(ids))

    def codes_from_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([ids.float(), -ids.float()], -1)

    def decode(self, tokens: Tokens, *, seeds: Any) -> Any:
        return torch.zeros(len(tokens), 3, 32, 32, dtype=torch.uint8)


def spoiled(change: Callable[[Tokens], Any]) -> type[Toy]:
    class Spoiled(Toy):
        def encode(self, *args: Any, **more: Any) -> Any:
            return change(super().encode(*args, **more))

    return Spoiled


BROKEN: list[tuple[Callable[[Tokens], Any], str]] = [
    (lambda t: t.ids, r"encode returned int64 \[\d+, 4\], .*Tokens\("),
    (lambda t: None, "encode returned None"),
    (lambda t: replace(t, ids=None), "ids None"),
    (lambda t: replace(t, ids=t.ids.float()), r"ids float32 \[\d+, 4\], .*int64 \[\d+, 4\]"),
    (lambda t: replace(t, ids=t.ids.int()), r"ids int32"),
    (lambda t: replace(t, ids=t.ids[:, :3]), r"ids int64 \[\d+, 3\]"),
    (lambda t: replace(t, ids=t.ids[:-1]), r"ids int64 \[\d+, 4\]"),
    (lambda t: replace(t, ids=t.ids + 8), r"ids from 8 to 15, .*0\.\.7"),
    (lambda t: replace(t, ids=t.ids - 1), r"ids from -1"),
    (lambda t: replace(t, codes=t.codes.half()), r"codes float16 .*float32"),
    (lambda t: replace(t, codes=t.codes[..., :1]), r"codes float32 \[\d+, 4, 1\]"),
    (lambda t: replace(t, codes=t.codes / 0), "codes are not finite"),
    (lambda t: replace(t, offsets=torch.zeros(len(t.codes), 3)), r"offsets float32 \[\d+, 3\]"),
    (lambda t: replace(t, offsets=torch.full((len(t.codes), 2), float("nan"))), "offsets are not finite"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN, ids=range(len(BROKEN)))
def test_tokens_that_break_the_contract(
    change: Any, words: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(BenchError, match=words) as caught:
        measure(spoiled(change)(), settings, tmp_path)
    text = str(caught.value)
    assert text.startswith("toy: its ") and "Spoiled" in text and "base.py" in text and "\n" not in text
    assert not list((tmp_path / "cache").rglob("shard-*.safetensors"))


def test_continuous_tokens_that_break_the_contract(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"ids int64 .*none, because vocab_size is None"):
        measure(Toy(vocab_size=None), settings, tmp_path)
    for factor, words in ((float("nan"), "not finite"), (float("inf"), "not finite")):
        broken = spoiled(lambda t, factor=factor: Tokens(None, t.codes * 0 + factor))  # type: ignore[misc]
        with pytest.raises(BenchError, match=words):
            measure(broken(vocab_size=None), settings, tmp_path)


@pytest.mark.parametrize(
    ("lookup", "words"),
    [
        (
            lambda ids: ids.float(),
            r"codes_from_ids returned codes float32 \[\d, 4\], .*float32 \[\d, 4, 2\]",
        ),
        (lambda ids: torch.zeros(*ids.shape, 2, dtype=torch.float64), "codes float64"),
        (lambda ids: torch.full((*ids.shape, 2), float("nan")), "codes are not finite"),
    ],
)
def test_codes_that_break_the_contract(
    lookup: Any, words: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    class Odd(Toy):
        def encode(self, images_u8: torch.Tensor, **more: Any) -> Any:
            ids = images_u8.flatten(1)[:, :4].long() // 32
            return Tokens(ids, torch.zeros(*ids.shape, 2))

        def codes_from_ids(self, ids: torch.Tensor) -> torch.Tensor:
            return lookup(ids)  # type: ignore[no-any-return]

    with pytest.raises(BenchError, match=words):
        measure(Odd(), settings, tmp_path)


def test_images_that_break_the_contract() -> None:
    from comit_bench.tokenizers.contract import check_decoded

    info, good = Toy().info, torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert check_decoded(good, info, 2) is good
    wrong: list[Any] = [good.float(), good[:1], good[:, :1], good[..., :16], None, [good]]
    for images in wrong:
        with pytest.raises(BenchError, match=r"toy: decode\(\) must return uint8 images \[2, 3, 32, 32\]"):
            check_decoded(images, info, 2)


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (lambda: Toy, "the class Toy"),
        (lambda: {}, r"dict without info \(a TokenizerInfo\), encode, codes_from_ids"),
        (lambda: type("Bare", (), {"info": Toy().info})(), "Bare without encode, codes_from_ids"),
        (lambda: Toy(message_length=0), "message_length 0"),
        (lambda: Toy(code_dim=2.0), r"code_dim 2\.0"),
        (lambda: Toy(vocab_size=True), "vocab_size True"),
        (lambda: Toy(kind="lerned"), "kind 'lerned'"),
        (lambda: Toy(weights=""), "weights ''"),
        (lambda: Toy(parameters=None), "parameters None"),
    ],
)
def test_what_is_no_tokenizer_is_refused_before_any_work(
    thing: Any, words: str, site: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        measure(thing(), settings, tmp_path)
    source = "MADE = None\n\ndef load(name, *, device):\n    return MADE\n"
    install(site, {"made_module.py": source}, {"made": "made_module:load"})
    find_tokenizer("made").loader()
    sys.modules["made_module"].MADE = thing()  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=rf"tokenizer made \(made_module:load\).*{words}"):
        load_tokenizer("made", device="cpu")
    assert not (tmp_path / "cache" / "tokens").exists()
