"""config.json of every family: read strictly, checked before anything is built; damage is told clearly."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_checkpoints import WRITERS, load, weights_of

from comit_bench.errors import BenchError, CorruptFileError, UsageError
from comit_bench.files import shipped_weights
from comit_bench.results.schema import TokenizerRow
from comit_bench.tokenizers.checkpoints import read_config
from comit_bench.tokenizers.config_node import Node, read_facts
from comit_bench.tokenizers.load import load_tokenizer

FAMILIES = list(WRITERS)
SECONDS = 15.0  # of the processor, for one attempt: a depth of a billion would take hours


@pytest.fixture(scope="module")
def masters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("masters")
    for family, write in WRITERS.items():
        write(root / family)
    return root


@pytest.fixture
def folder(masters: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    family = getattr(request, "param", "vq-grid")
    return Path(shutil.copytree(masters / family, tmp_path / family))


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "an empty file"),
        (b"{not json", "not valid JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b"3", "expected a JSON object, found int"),
        (b"\xef\xbb\xbf{}", "byte-order mark"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        ('{"a": 1}'.encode("utf-16-le"), "UTF-16"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands there twice"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' stands there twice"),
        (b'{"a": NaN}', "NaN is not finite"),
        (b'{"a": -Infinity}', "-Infinity is not finite"),
        (b'{"a": 1e999}', "1e999 is not finite"),
        (b'{"a": 1' + b"0" * 9999 + b"}", "a number of 10000 digits"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "nested more than"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"PK\x03\x04junk", "zip archive"),
        (b'{"a": 1} {"b": 2}', "not valid JSON"),
    ],
)
def test_a_config_that_is_no_json_object(folder: Path, content: bytes, says: str) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CorruptFileError, match=says) as caught:
        load(folder)
    told = str(caught.value)
    assert "config.json" in told and "\n" not in told and len(told) < 400 + len(str(folder))


def test_a_config_that_is_a_directory(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(CorruptFileError, match="this is a directory, where a file is expected"):
        load(folder)


def test_usual_json_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '\n {"a": [1, 2.5, -3e-2, null, true, "é"], "b": {}}\n', encoding="utf-8"
    )
    assert read_config(tmp_path) == {"a": [1, 2.5, -0.03, None, True, "é"], "b": {}}


# ---------------------------------------------------------------- values


def set_value(config: Any, path: str, value: object) -> None:
    *outer, last = path.split("/")
    for key in outer:
        config = config[key]
    if value is DELETED:
        del config[last]
    else:
        config[last] = value


DELETED = object()
SIZES = {  # a size of every kind, of every family
    "comit": [
        "predictor/depth",
        "predictor/num_heads",
        "predictor/max_input_size",
        "vae/factor",
        "quantizer/levels",
    ],
    "titok": [
        "model/vq_model/codebook_size",
        "model/vq_model/vit_enc_patch_size",
        "dataset/preprocessing/crop_size",
        "reduced/encoder/num_layers",
        "reduced/decoder/num_heads",
    ],
    "vq-grid": ["model/depth", "model/head_dim", "model/image_size", "model/patch", "model/fsq_levels"],
    "alit": [
        "adaptive_tokenizer/encoder_num_layers",
        "adaptive_tokenizer/decoder_num_heads",
        "adaptive_tokenizer/max_rollout_iters",
        "base_tokenizer/n_embed",
        "base_tokenizer/ddconfig/ch_mult",
    ],
    "flextok": [
        "encoder/module_dict/enc_transformer/depth",
        "decoder/module_dict/dec_transformer/head_dim",
        "encoder/module_dict/enc_patch_emb/patch_sizes",
        "regularizer/levels",
        "vae/latent_channels",
    ],
    "selftok": ["encoder/num_heads", "decoder/depth", "image_size", "num_steps", "vae/block_out_channels"],
    "vqmodel": [
        "block_out_channels",
        "layers_per_block",
        "num_vq_embeddings",
        "norm_num_groups",
        "latent_channels",
    ],
}
BAD = [1_000_000_000, 10**30, 0, -1, True, "12", None, 1.5, [], {}, [3, "a"]]


@pytest.mark.parametrize(
    ("folder", "path"), [(f, p) for f, paths in SIZES.items() for p in paths], indirect=["folder"]
)
def test_sizes_that_are_none_are_refused_before_anything_is_built(folder: Path, path: str) -> None:
    """Type, sign, and numbers that no network has: at once, naming file, key and value."""
    original = (folder / "config.json").read_text()
    for value in BAD:
        if value is None and folder.name == "flextok":  # null is "not set" there: the tensors tell
            continue
        config = json.loads(original)
        set_value(config, path, value)
        (folder / "config.json").write_text(json.dumps(config))
        started = time.process_time()
        with pytest.raises(UsageError) as caught:
            load(folder)
        assert time.process_time() - started < SECONDS
        told = str(caught.value)
        assert "config.json" in told and path.rpartition("/")[2] in told, (value, told)


@pytest.mark.parametrize(
    ("folder", "path", "value", "says"),
    [
        ("comit", "predictor/hidden_size", 33, "multiple of heads"),
        ("comit", "predictor/patch_size", 3, "no multiple of patch"),
        ("comit", "predictor/mlp_ratio", "4", r"predictor\.mlp_ratio must be a number above 0"),
        ("comit", "quantizer/levels", [8, 5, 5, 1], r"quantizer\.levels must list whole numbers.* 2 or more"),
        ("comit", "quantizer/levels", [1 << 20] * 4, "product of at most"),
        ("comit", "predictor/in_channels", 5, "out_channels must be equal"),
        ("comit", "comit_bench/mask_mode", "soft", "one of additive, hard"),
        ("comit", "comit_bench/geometry", {"crop": 12, "haff": 3}, "haff is unknown"),
        ("comit", "comit_bench/trained", "false", r"comit_bench\.trained must be true or false"),
        ("titok", "model/vq_model/is_legacy", 1, "true or false"),
        ("titok", "reduced/encoder/width", 33, "width of whole heads"),
        ("titok", "model/vq_model/codebook_size", 65, r"decided by model\.vq_model\.codebook_size"),
        ("vq-grid", "model/widht", 3, "widht is unknown"),
        ("vq-grid", "model/fsq_levels", [4, 3], "fsq_levels"),
        ("vq-grid", "comit_bench", 3, "comit_bench should be a mapping"),
        ("alit", "adaptive_tokenizer/encoder_width", 41, "multiple of its 4 heads"),
        ("alit", "adaptive_tokenizer/dynamic_halting_threshold", 7, "at most 1"),
        (
            "alit",
            "adaptive_tokenizer/encoder_num_layers",
            3,
            r"decided by adaptive_tokenizer\.encoder_num_layers",
        ),
        ("flextok", "encoder/module_dict/enc_transformer/gated_mlp", "false", "gated_mlp"),
        ("flextok", "vae/scaling_factor", -1, "scaling_factor must be a number above 0"),
        ("flextok", "encoder/module_dict/enc_transformer/depth", 3, r"3 blocks expected, 2 in the file"),
        ("flextok", "vae/hf_hub_path", 3, None),  # not read: the VAE lies in the file
        ("selftok", "encoder/mlp_ratio", True, "mlp_ratio is True"),
        ("selftok", "k_per_stage", "4,3,2,2,2", "must add up to 12 tokens"),
        ("selftok", "kind", ["tokenizer"], None),
        ("selftok", "vae/act_fn", "gelu", "no other VAE is computed here"),
        ("selftok", "image_size", 4096, "patches wide"),
        ("vqmodel", "block_out_channels", [8, 9], "norm_num_groups"),
        ("vqmodel", "act_fn", "sine", "act_fn must be one of"),
        (
            "vqmodel",
            "down_block_types",
            ["CrossAttnDownBlock2D", "DownEncoderBlock2D"],
            "down_block_types must list",
        ),
        ("vqmodel", "num_vq_embeddings", 17, "decided by num_vq_embeddings"),
    ],
    indirect=["folder"],
)
def test_values_that_do_not_fit_name_the_key(
    folder: Path, path: str, value: object, says: str | None
) -> None:
    config = json.loads((folder / "config.json").read_text())
    if path.startswith("comit_bench/"):
        config.setdefault("comit_bench", {})
    set_value(config, path, value)
    (folder / "config.json").write_text(json.dumps(config))
    if says is None:
        load_or_say(folder)
        return
    with pytest.raises(UsageError, match=says) as caught:
        load(folder)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "path", "wrong"),
    [
        ("comit", "predictor/num_heads", "num_head"),
        ("titok", "model/vq_model/use_l2_norm", "use_l2norm"),
        ("alit", "adaptive_tokenizer/dynamic_halting_threshold", "dynamic_halting_treshold"),
        ("flextok", "encoder/module_dict/enc_transformer/head_dim", "head_dims"),
        ("selftok", "encoder/query_heads", "query_head"),
        ("selftok", "num_steps", "num_step"),
        ("vqmodel", "norm_num_groups", "norm_num_group"),
    ],
    indirect=["folder"],
)
def test_a_key_with_a_typing_error_does_not_become_the_default(folder: Path, path: str, wrong: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    *outer, last = path.split("/")
    node = config
    for key in outer:
        node = node[key]
    node[wrong] = node.pop(last)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=rf"{wrong} is unknown\. Did you mean.*'{last}'"):
        load(folder)


def test_numbers_that_are_whole_are_taken(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model"]["depth"] = 2.0
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).model.spec.depth == 2


def test_facts_of_our_own_files() -> None:
    assert read_facts({}, Path("x")).trained
    facts = read_facts({"comit_bench": {"trained": False, "training_data": "noise"}}, Path("x"))
    assert (facts.trained, facts.training_data, facts.weights_licence) == (False, "noise", None)
    assert facts.group is None and read_facts({"comit_bench": {"group": "three"}}, Path("x")).group == "three"
    for key, value in (("trained", 0), ("training_data", 3), ("weights_licence", []), ("group", 1)):
        with pytest.raises(UsageError, match=rf"comit_bench\.{key} must be"):
            read_facts({"comit_bench": {key: value}}, Path("x"))


@pytest.mark.parametrize("name", ["comit-nano", "titok-nano", "vq-grid-nano"])
def test_a_declared_group_changes_nothing_but_the_row(name: str, tmp_path: Path) -> None:
    """It is handed on, and enters neither the configuration's digest nor that of the weights."""
    shutil.copytree(shipped_weights(name), tmp_path / "mine")
    plain = load_tokenizer(str(tmp_path / "mine"), device="cpu").info
    file = tmp_path / "mine" / "config.json"
    config = json.loads(file.read_text())
    config["comit_bench"] = {**config["comit_bench"], "group": "three-seeds"}
    file.write_text(json.dumps(config))
    info = load_tokenizer(str(tmp_path / "mine"), device="cpu").info
    assert plain.group == "" and info == replace(plain, group="three-seeds")
    assert TokenizerRow.from_info(info).group == "three-seeds"


def test_long_values_are_cut() -> None:
    with pytest.raises(UsageError) as caught:
        Node({"a": "x" * 9999}, Path("config.json")).whole("a")
    assert len(str(caught.value)) < 350


def test_fitted_words_and_pixels_have_sizes_too(tmp_path: Path) -> None:
    from comit_bench.tokenizers.kmeans import KMeansPatchTokenizer

    words = KMeansPatchTokenizer(torch.zeros(4, 12, dtype=torch.uint8), patch=2, resolution=8)
    words.save(tmp_path)
    assert KMeansPatchTokenizer.load(tmp_path).info == words.info
    good = (tmp_path / "config.json").read_text()
    for key, value in (
        ("patch", 10**9),
        ("resolution", 10**9 + 1),
        ("vocab", 0),
        ("vocab", True),
        ("format", 2),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**json.loads(good), key: value}))
        started = time.process_time()
        with pytest.raises(CorruptFileError, match=r"config\.json"):
            KMeansPatchTokenizer.load(tmp_path)
        assert time.process_time() - started < SECONDS
    (tmp_path / "config.json").write_text(good)
    save_file({"centroids": torch.zeros(4, 12)}, tmp_path / "model.safetensors")
    with pytest.raises(CorruptFileError, match="expected a uint8 tensor"):
        KMeansPatchTokenizer.load(tmp_path)


# ---------------------------------------------------------------- any damage


def load_or_say(folder: Path, *, use: bool = False) -> bool:
    """Whether it loads; anything but a clear error, or minutes, fail the test."""
    started = time.process_time()
    try:
        tokenizer = load(folder, allow_pickle="true")
        if use:
            side = tokenizer.info.resolution
            tokens = (
                tokenizer.encode(torch.zeros(1, 3, side, side, dtype=torch.uint8)) if side <= 256 else None
            )
            if tokens is not None:
                tokenizer.decode(tokens, seeds=[0])
    except BenchError as error:
        assert str(error).strip() and len(str(error)) < 6000
        return False
    finally:
        assert time.process_time() - started < SECONDS
    return True


numbers = st.sampled_from([0, 1, 2, 3, 5, 7, 16, 64, -1, 255, 10**6, 10**9, 2**31, 2**63, 10**25])
scalars = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    st.floats(),
    st.sampled_from([0.5, 2.0, 1e9, "", "12", "vq", "x" * 300, "None"]),
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(st.text(max_size=3), scalars, max_size=2),
    st.just(DELETED),
)


def places(config: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """All keys and list positions of a config, deep and shallow."""
    items = (
        config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    )
    for key, inner in items:
        yield (*prefix, key)
        yield from places(inner, (*prefix, key))


def damaged_config(data: st.DataObject, config: Any) -> None:
    """One to three changes of keys or values."""
    for _ in range(data.draw(st.integers(1, 3))):
        found = list(places(config))
        if not found:
            return
        *outer, last = data.draw(st.sampled_from(found))
        node = config
        for key in outer:
            node = node[key]
        value = data.draw(values)
        if value is DELETED:
            del node[last]
        else:
            node[last] = value
        if isinstance(last, str) and data.draw(st.booleans()) and last in node:
            node[last + "s"] = node.pop(last)


def damaged_weights(data: st.DataObject, path: Path) -> None:
    """Other bytes, or other tensors."""
    kind = data.draw(st.sampled_from(["cut", "bytes", "header", "tensor", "pickle"]))
    content = bytearray(path.read_bytes())
    if kind == "cut":
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    elif kind in ("bytes", "header"):
        start = data.draw(st.integers(0, 2000 if kind == "header" else len(content) - 1))
        new = data.draw(st.binary(min_size=1, max_size=12))
        content[start : start + len(new)] = new
        path.write_bytes(content)
    else:
        tensors = {k: v.clone() for k, v in load_file(path).items()}
        key = data.draw(st.sampled_from(sorted(tensors)))
        change: Callable[[torch.Tensor], torch.Tensor | None] = data.draw(
            st.sampled_from(
                [
                    lambda t: None,
                    lambda t: t[:0],
                    lambda t: t.flatten(),
                    lambda t: t.unsqueeze(0),
                    lambda t: t.long(),
                    lambda t: t.half(),
                    lambda t: t / 0,
                    lambda t: t.new_zeros(()),
                    lambda t: torch.cat([t, t]),
                ]
            )
        )
        new_tensor = change(tensors.pop(key))
        name = data.draw(st.sampled_from([key, key + "x", "module." + key, key.replace("0", "999999999")]))
        if new_tensor is not None:
            tensors[name] = new_tensor.contiguous()
        if kind == "tensor":
            save_file(tensors, path)
        else:
            path.unlink()
            torch.save({"model": tensors}, path.with_name("pytorch_model.bin"))


def attempt(data: st.DataObject, masters: Path, family: str, place: Path, *, use: bool) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(masters / family, place)
    config = json.loads((place / "config.json").read_text())
    what = data.draw(st.sampled_from(["config", "weights", "both"]))
    if what != "weights":
        damaged_config(data, config)
        (place / "config.json").write_text(json.dumps(config))
    if what != "config":
        damaged_weights(data, weights_of(place))
    load_or_say(place, use=use)


quick = settings(
    deadline=None,
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
@quick
@given(data=st.data())
def test_any_damage_loads_or_ends_in_one_clear_error(
    data: st.DataObject, masters: Path, family: str, tmp_path: Path
) -> None:
    attempt(data, masters, family, tmp_path / "damaged", use=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
@settings(quick, max_examples=300)
@given(data=st.data())
def test_what_loads_in_spite_of_damage_computes_or_says_why_not(
    data: st.DataObject, masters: Path, family: str, tmp_path: Path
) -> None:
    attempt(data, masters, family, tmp_path / "damaged", use=True)
