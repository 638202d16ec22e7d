"""What decides about a token stands in every key: configuration, code, weights of the VAE, and the name."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from importlib import invalidate_caches
from pathlib import Path
from typing import Any

import pytest
import torch
from alit_sizes import TINY, TINY_VAE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from selftok_sizes import SMALL as SELFTOK
from tiny import write_images, write_recipes

from comit_bench.errors import UsageError
from comit_bench.files import shipped_weights
from comit_bench.pipeline.evaluate import evaluate
from comit_bench.pipeline.folders import check_origin, detokenize_file, tokenize_folder
from comit_bench.pipeline.tokenize import store_key
from comit_bench.results.records import load_records
from comit_bench.results.table import build_table
from comit_bench.tokenizers.base import TokenizerInfo, Tokens
from comit_bench.tokenizers.comit.crops import CropGeometry
from comit_bench.tokenizers.comit.model import PRESETS as COMIT
from comit_bench.tokenizers.flextok.model import PRESETS as FLEXTOK
from comit_bench.tokenizers.identity import code_version, configuration_digest, source_digest
from comit_bench.tokenizers.load import load_tokenizer
from comit_bench.tokenizers.registry import builtin
from comit_bench.tokenizers.titok.model import PRESETS as TITOK
from comit_bench.tokenizers.vq_grid.model import PRESETS as VQ_GRID

NANOS = {"comit-nano": ("predictor", "num_heads"), "titok-nano": ("reduced", "encoder", "num_heads")}
NANOS["vq-grid-nano"] = ("model", "head_dim")


def key(tokenizer: Any, policy: str | None = None) -> str:
    values = store_key(tokenizer, policy=policy, fingerprint="f", seed=0, selection="all")
    return json.dumps(values, sort_keys=True)


def with_other_config(name: str, folder: Path, *path: str, value: Any) -> Path:
    """A copy of shipped weights whose config says something else at one place."""
    shutil.copytree(shipped_weights(name), folder)
    config = json.loads((folder / "config.json").read_text())
    node = config
    for part in path[:-1]:
        node = node[part]
    assert node[path[-1]] != value
    node[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ---------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("name", NANOS)
def test_equal_weights_under_another_configuration_are_another_tokenizer(name: str, tmp_path: Path) -> None:
    value = 16 if name == "vq-grid-nano" else 4
    plain = with_other_config(name, tmp_path / "a" / "ck", "comit_bench", "steps", value=1)
    other = with_other_config(name, tmp_path / "b" / "ck", *NANOS[name], value=value)
    shipped, same, changed = (load_tokenizer(str(p), device="cpu") for p in (name, plain, other))
    assert shipped.info.weights == same.info.weights == changed.info.weights
    assert key(same) == key(shipped)  # notes about the training decide nothing
    assert key(changed) != key(shipped)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    one, two = shipped.encode(images).ids, changed.encode(images).ids
    assert one is not None and two is not None and not torch.equal(one, two)  # they are


def test_two_configurations_are_two_stores_and_two_rows(tmp_path: Path) -> None:
    """The report: num_heads 4 instead of 2 got the other network's tokens from the cache."""
    chosen: dict[str, Any] = {
        "suite": "scenes", "data_root": write_images(tmp_path / "data", train=6, val=4),
        "include": (write_recipes(tmp_path / "recipes"),), "cache": tmp_path / "cache", "seeds": 1,
        "output": tmp_path / "out", "device": "cpu", "references": False,
    }  # fmt: skip
    shutil.copytree(shipped_weights("comit-nano"), tmp_path / "a" / "mine")
    with_other_config("comit-nano", tmp_path / "b" / "mine", "predictor", "num_heads", value=4)
    for part in "ab":
        evaluate(str(tmp_path / part / "mine"), ["tiny-colours"], **chosen)
    assert len(list((tmp_path / "cache" / "tokens").glob("*/*"))) == 4  # two splits each
    records = load_records(tmp_path / "out" / "records", strict=True)
    assert len(records) == 2 and len({r.tokenizer.weights for r in records}) == 1
    assert {r.protocol["tokenizer"]["family"] for r in records} == {"comit"}  # type: ignore[index,call-overload]
    table = build_table(records)
    digests = {r.protocol["tokenizer"]["configuration"][7:15] for r in records}  # type: ignore
    assert {row.label for row in table.rows} == {f"mine (configuration={digest})" for digest in digests}
    assert [row.label for row in build_table(records[:1]).rows] == ["mine"]  # as ever


def some_specs() -> list[Any]:
    found = [*COMIT.values(), *FLEXTOK.values(), *TITOK.values(), *VQ_GRID.values(), TINY, TINY_VAE, SELFTOK]
    return [spec for spec in found if is_dataclass(spec)]


def altered(spec: Any, path: tuple[str, ...]) -> Any:
    """The spec with the value at ``path`` replaced, without its own checks."""
    made = object.__new__(type(spec))
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name == path[0]:
            value = altered(value, path[1:]) if len(path) > 1 else "something else"
        object.__setattr__(made, field.name, value)
    return made


def places(spec: Any) -> Iterator[tuple[str, ...]]:
    for field in fields(spec):
        value = getattr(spec, field.name)
        yield from ((field.name, *rest) for rest in places(value)) if is_dataclass(value) else [(field.name,)]


@pytest.mark.parametrize("spec", some_specs(), ids=lambda spec: type(spec).__name__)
def test_every_value_of_a_specification_counts(spec: Any) -> None:
    found = [configuration_digest(altered(spec, path)) for path in places(spec)]
    assert len({configuration_digest(spec), *found}) == 1 + len(found) > 5


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines that do other things
@given(st.dictionaries(st.text("abc", min_size=1), st.integers() | st.lists(st.floats(allow_nan=False))))
def test_configurations_are_equal_for_equal_values_only(values: dict[str, Any]) -> None:
    digest = configuration_digest(values)
    assert configuration_digest(dict(reversed(values.items()))) == digest
    assert configuration_digest({**values, "_diffusers_version": "0.1"}) == digest
    assert configuration_digest({**values, "more": 1}) != digest


def test_random_weights_of_two_presets_never_share_a_key() -> None:
    """Also where the sizes are equal (alit-small and alit-small-in100)."""
    keys: dict[str, str] = {}
    for entry in builtin().values():
        if not entry.family.takes_weights or entry.family.name == "vqmodel":  # these have no random weights
            continue
        tokenizer = load_tokenizer(entry.name, weights="random", device="meta")
        info = tokenizer.info
        assert info.weights == "random:0" and info.version and info.configuration.startswith("sha256:")
        assert code_version(tokenizer) == info.version
        keys[entry.name] = key(tokenizer)
    assert len(keys) == 28 and len(set(keys.values())) == len(keys)
    configurations = {name: json.loads(text)["configuration"] for name, text in keys.items()}
    assert len({configurations[f"comit-{size}"] for size in ("b", "l", "xl")}) == 3


def test_kmeans_and_pixels_state_both(tmp_path: Path) -> None:
    from comit_bench.tokenizers.kmeans import KMeansPatchTokenizer

    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    fitted = KMeansPatchTokenizer.fit(images, patch=4, vocab=5, resolution=8)
    pixels = load_tokenizer("pixel-oracle", device="cpu")
    for info in (fitted.info, pixels.info):
        assert info.version and info.configuration.startswith("sha256:")


def test_type_and_device_are_part_of_the_key() -> None:
    nano: Any = load_tokenizer("comit-nano", device="cpu")
    assert json.loads(key(nano))["options"]["dtype"] == "float32"
    before = key(nano)
    nano.device = torch.device("cuda", 1)
    assert json.loads(key(nano))["device"] == "cuda" and key(nano) != before


# ------------------------------------------------------------------------------------------- VAEs


def test_other_weights_of_the_vae_are_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import comit_bench.nn.vae as vaes
    from comit_bench.tokenizers.comit import checkpoint as comit_files

    monkeypatch.setattr(vaes, "SD_VAE", replace(vaes.SD_VAE, widths=(8,) * 4, groups=4))
    spec = replace(
        COMIT["comit-nano"],
        vae="sd-mse",
        vae_factor=8,
        in_channels=4,
        out_channels=4,
        max_input_size=4,
        geometry=CropGeometry(crop=16, half=16),
    )
    model = comit_files.build(spec)
    model.vae.init_weights(torch.Generator().manual_seed(0))  # type: ignore[operator, union-attr]
    comit_files.save(model, tmp_path / "ck")
    tensors = load_file(tmp_path / "ck" / "model.safetensors")
    own = {k.removeprefix("vae.vae."): v for k, v in tensors.items() if k.startswith("vae.")}
    save_file(
        {k: v for k, v in tensors.items() if not k.startswith("vae.")}, tmp_path / "ck/model.safetensors"
    )
    found = []
    for factor in (1.0, 2.0):
        (tmp_path / "ck" / "vae").mkdir(exist_ok=True)
        save_file({k: v * factor for k, v in own.items()}, tmp_path / "ck/vae" / comit_files.VAE_FILES[1])
        found.append(load_tokenizer(str(tmp_path / "ck"), device="cpu"))
    assert found[0].info.weights == found[1].info.weights and key(found[0]) != key(found[1])
    assert found[0].info.options["vae_weights"] != found[1].info.options["vae_weights"]


def test_the_vae_of_an_untrained_comit_is_drawn_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    import comit_bench.nn.vae as vaes
    from comit_bench.tokenizers.comit import adapter as comit

    monkeypatch.setattr(vaes, "SD_VAE", replace(vaes.SD_VAE, widths=(8,) * 4, groups=4))
    spec = replace(
        COMIT["comit-nano"],
        vae="sd-mse",
        vae_factor=8,
        in_channels=4,
        out_channels=4,
        max_input_size=4,
        geometry=CropGeometry(crop=16, half=16),
    )
    monkeypatch.setitem(comit.PRESETS, "comit-b", spec)
    states = []
    for _ in range(2):
        torch.rand(3)  # whatever happened before
        states.append(comit.load("comit-b", weights="random", device=torch.device("cpu")).model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# ------------------------------------------------------------------------------------------- code

PLUGIN = """
import torch
from comit_bench.tokenizers.base import TokenizerInfo, Tokens
{head}

class Theirs:
    def __init__(self):
        self.info = TokenizerInfo(
            name="theirs", family="theirs", kind="baseline", weights="none", parameters=0, message_length=4,
            vocab_size=256, code_dim=1, resolution=32, preprocessing="center_crop|resize(32,bilinear)",
        )

    def encode(self, images_u8, *, policy=None, generators=None):
        ids = images_u8[:, 0, 0, :4].long() // {divisor}
        return Tokens(ids, self.codes_from_ids(ids))

    def codes_from_ids(self, ids):
        return ids.float()[..., None]

    def decode(self, tokens, *, seeds):
        raise NotImplementedError
"""


@pytest.fixture
def load_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Write (or rewrite) a module and make an object of its class, as a fresh process would."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def load(package: str = "theirs_module", **texts: Any) -> Any:
        source = PLUGIN.format(**{"head": "", "divisor": 1, **texts})
        file = tmp_path / (package.replace(".", "/") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
        for name in [name for name in sys.modules if name.split(".")[0] == package.split(".")[0]]:
            del sys.modules[name]
        shutil.rmtree(file.parent / "__pycache__", ignore_errors=True)
        invalidate_caches()
        __import__(package)
        return sys.modules[package].Theirs()

    return load


def test_changed_source_is_another_version(load_source: Callable[..., Any]) -> None:
    one, again, other = (key(load_source(divisor=divisor)) for divisor in (1, 1, 2))
    assert one == again != other
    assert len(json.loads(one)["version"]) == 16


def test_a_helper_in_another_file_of_the_package_counts(
    load_source: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    versions = []
    for text in ("STEP = 1\n", "STEP = 2\n", "STEP = 1\n"):
        (tmp_path / "pack" / "helper.py").write_text(text)
        versions.append(code_version(load_source("pack.main", head="from pack.helper import STEP")))
    assert versions[0] == versions[2] != versions[1]


def test_a_stated_version_is_taken_as_it_is(load_source: Callable[..., Any]) -> None:
    one, other = load_source(), load_source(divisor=2)
    for tokenizer in (one, other):
        tokenizer.info = replace(tokenizer.info, version="2026-1")
    assert code_version(one) == code_version(other) == "2026-1" and key(one) == key(other)


def test_code_without_a_file_is_told_apart() -> None:
    """Notebooks, ``exec`` and classes that are made by functions."""

    def run(text: str) -> Any:
        space: dict[str, Any] = {"__name__": "__main__"}
        exec(text, space)  # what a notebook's cell does
        return space["Theirs"]()

    one, same, other = (run(PLUGIN.format(head="", divisor=d)) for d in (1, 1, 2))
    assert code_version(one) == code_version(same) != code_version(other)
    helped = PLUGIN.format(head="\ndef split(x):\n    return x // {}\n", divisor="split(4)")
    assert code_version(run(helped.format(2))) == code_version(run(helped.format(2)))
    assert code_version(run(helped.format(2))) != code_version(run(helped.format(3)))
    plain = PLUGIN.format(head="STEP = {}", divisor="STEP")
    assert code_version(run(plain.format(2))) != code_version(run(plain.format(3)))


def test_classes_of_one_file_are_told_apart() -> None:
    def make(step: int) -> Any:
        class Made:
            info = TokenizerInfo(
                name="made", family="made", kind="baseline", weights="none", parameters=0, message_length=1,
                vocab_size=2, code_dim=1, resolution=1, preprocessing="center_crop",
            )  # fmt: skip

            def encode(self, images: Any) -> Any:
                return images // step

        return Made

    class Two(make(1)):  # type: ignore[misc]
        levels = 2

    class Three(make(1)):  # type: ignore[misc]
        levels = 3

    assert code_version(make(1)()) == code_version(make(1)()) != code_version(make(2)())
    assert len({code_version(make(1)()), code_version(Two()), code_version(Three())}) == 3


def test_an_heir_of_an_adapter_adds_its_own_code() -> None:
    from comit_bench.tokenizers.pixels import PixelOracleTokenizer

    class Heir(PixelOracleTokenizer):
        def encode(self, *args: Any, **settings: Any) -> Tokens:
            return super().encode(*args, **settings)

    own = PixelOracleTokenizer()
    assert code_version(own) == own.info.version
    assert code_version(Heir()).startswith(own.info.version + "+")  # type: ignore[arg-type]


def test_what_was_digested_first_stays(load_source: Callable[..., Any], tmp_path: Path) -> None:
    """A file that is edited during a run does not rename what the old code makes."""
    tokenizer = load_source()
    before = code_version(tokenizer)
    (tmp_path / "theirs_module.py").write_text("# edited")
    assert code_version(tokenizer) == before
    source_digest.cache_clear()
    assert code_version(tokenizer) != before


# ------------------------------------------------------------------------------- files and folders


def photos(folder: Path) -> Path:
    from PIL import Image

    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (number * 80, 10, 200)).save(folder / f"{number}.png")
    return folder


def test_a_token_file_knows_its_configuration(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from comit_bench.data.tokens.token_file import TokenOrigin, read_token_file

    folder, out = photos(tmp_path / "photos"), tmp_path / "t.safetensors"
    nano = load_tokenizer("comit-nano", device="cpu")
    tokenize_folder(nano, folder, out, cache=tmp_path / "cache")
    origin = read_token_file(out).origin
    assert (origin.configuration, origin.version) == (nano.info.configuration, nano.info.version)
    other = load_tokenizer(
        str(with_other_config("comit-nano", tmp_path / "ck", "predictor", "num_heads", value=4)), device="cpu"
    )
    with pytest.raises(UsageError, match="configuration sha256"):
        check_origin(other, origin, out)
    old = {k: v for k, v in origin.metadata().items() if k not in ("configuration", "version")}
    check_origin(nano, TokenOrigin.from_metadata(old), out)  # files of earlier versions do not say it
    with caplog.at_level(logging.WARNING):
        check_origin(nano, replace(origin, version="0"), out)
    assert "version 0" in caplog.text


def test_a_folder_of_images_belongs_to_what_made_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, out, back = photos(tmp_path / "photos"), tmp_path / "t.safetensors", tmp_path / "back"
    nano: Any = load_tokenizer("comit-nano", device="cpu", steps=1)
    tokenize_folder(nano, folder, out, cache=tmp_path / "cache")
    where: dict[str, Any] = {"cache": tmp_path / "cache"}
    assert detokenize_file(nano, out, back, **where).written == 3
    assert detokenize_file(nano, out, back, **where).kept == 3
    first = (back / "0.png").read_bytes()
    for other, seed in ((nano, 1), (load_tokenizer("comit-nano", device="cpu", steps=2), 0)):
        with pytest.raises(UsageError, match=r"back: holds 3 images.*--overwrite"):
            detokenize_file(other, out, back, seed=seed, **where)
    assert (back / "0.png").read_bytes() == first
    assert detokenize_file(nano, out, back, seed=1, overwrite=True, **where).written == 3
    assert (back / "0.png").read_bytes() != first
    assert detokenize_file(nano, out, back, seed=1, **where).kept == 3
    with caplog.at_level(logging.WARNING):
        assert detokenize_file(nano, out, back, seed=1, cache=tmp_path / "elsewhere").kept == 3
    assert "were there before" in caplog.text


def test_text_features_of_another_config_are_not_taken_from_the_cache(tmp_path: Path) -> None:
    from comit_bench.recipes.kinds import TextSpec
    from comit_bench.tasks.text import FILES, find_text_encoder

    for name in FILES:
        (tmp_path / name).write_text(name)
    found = [find_text_encoder(TextSpec(encoder=str(tmp_path)), offline=True).identity]
    for name in FILES:
        (tmp_path / name).write_text("changed")
        found.append(find_text_encoder(TextSpec(encoder=str(tmp_path)), offline=True).identity)
    assert len({json.dumps(identity) for identity in found}) == 1 + len(FILES)
