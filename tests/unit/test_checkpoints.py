"""Checkpoints as people have them, and files that are none: loaded the same, or named in one clear line."""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import WRITERS, load, weights_of
from torch import Tensor, nn

from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError
from comit_bench.nn.state_dicts import INDEX
from comit_bench.tokenizers.checkpoints import (
    as_stored,
    load_network,
    read_torch,
    read_weights,
    weight_file,
    weights_digest,
)
from comit_bench.tokenizers.load import load_tokenizer

FAMILIES = list(WRITERS)
Tensors = dict[str, Tensor]


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


every_family = pytest.mark.parametrize("folder", FAMILIES, indirect=True)


def tensors_of(folder: Path) -> Tensors:
    return {k: v.clone() for k, v in load_file(weights_of(folder)).items()}


def weights(tokenizer: Any) -> Tensors:
    return dict(tokenizer.model.state_dict())


def same(one: Tensors, two: Tensors) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def others(tensors: Tensors) -> Tensors:
    return {k: v + 1 for k, v in tensors.items()}


def behind(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + key: value for key, value in tensors.items()}


# ---------------------------------------------------------------- containers and prefixes

STORED: dict[str, Callable[[Tensors], Any]] = {
    "flat": lambda t: t,
    "ordered": lambda t: OrderedDict(t),
    "parameters": lambda t: {k: nn.Parameter(v, requires_grad=v.is_floating_point()) for k, v in t.items()},
    "state_dict": lambda t: {"state_dict": t, "epoch": 3},
    "model and optimizer": lambda t: {
        "model": t,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2), "step": torch.tensor(1)}}, "param_groups": []},
        "args": argparse.Namespace(lr=1e-4),
    },
    "module": lambda t: behind("module.", t),
    "compiled": lambda t: behind("_orig_mod.", t),
    "compiled inside": lambda t: {k.replace(".", "._orig_mod.", 1): v for k, v in t.items()},
    "compiled, then parallel": lambda t: behind("module._orig_mod.", t),
    "lightning": lambda t: {
        "state_dict": behind("net.", t) | {"loss.weight": torch.zeros(1)},
        "global_step": 7,
        "pytorch-lightning_version": "2.5.0",
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(1)}}}],
    },
    "deepspeed": lambda t: {"module": t, "optimizer": None, "global_steps": 5, "dp_world_size": 8},
    "sharded data parallel": lambda t: {"model": behind("_fsdp_wrapped_module.", t)},
    "average beside": lambda t: {"model": others(t), "ema": t},
    "average of a parallel network": lambda t: {
        "state_dict": others(t),
        "ema_state_dict": behind("module.", t),
    },
    "average by prefix": lambda t: behind("model.", others(t)) | behind("model_ema.", t),
    "average without buffers": lambda t: {
        "model": others(t) | dict(list(t.items())[:1]),
        "ema": dict(list(t.items())[1:]),
    },
    "average alone": lambda t: {"ema": t, "step": 3},
}


FLAT = ("flat", "parameters", "module", "compiled", "compiled inside", "average by prefix")


@pytest.mark.parametrize(
    ("stored", "kind"), [*((name, "torch") for name in STORED), *((name, "safetensors") for name in FLAT)]
)
def test_a_network_is_found_wherever_people_put_it(
    folder: Path, stored: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    want, tensors = weights(load(folder)), tensors_of(folder)
    content = STORED[stored](tensors)
    weights_of(folder).unlink()
    if kind == "torch":
        torch.save(content, folder / "pytorch_model.bin")
    else:
        save_file({k: v.detach().clone() for k, v in content.items()}, folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        assert same(weights(load(folder, allow_pickle="true")), want)
    beside = stored.startswith("average") and stored != "average alone"
    assert ("average (EMA)" in caplog.text) is beside, "which one is taken must be said"


@every_family
def test_every_family_reads_through_the_same_path(folder: Path, request: pytest.FixtureRequest) -> None:
    """Nested, behind prefixes, beside an average and an optimizer: the same network for all."""
    before, tensors = load(folder), tensors_of(folder)
    released = folder.name == "selftok"  # its releases use the weights themselves, not their average
    content = {
        "state_dict": behind("module.", tensors if released else others(tensors)),
        "ema": behind("module._orig_mod.", others(tensors) if released else tensors),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}},
    }
    path = weights_of(folder)
    path.unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="allow_pickle=true"):
        load(folder)
    after = load(folder, allow_pickle="true")
    assert same(weights(after), weights(before))
    assert after.info.weights.startswith("sha256:") and after.info.weights != before.info.weights
    save_file(behind("net.", tensors), path)
    assert same(weights(load(folder)), weights(before))


def test_two_networks_and_no_way_to_tell(folder: Path) -> None:
    tensors = tensors_of(folder)
    torch.save({"student": tensors, "teacher": others(tensors)}, folder / "x.pth")
    with pytest.raises(CorruptFileError, match=r"several such networks \(student, teacher\)"):
        read_weights(folder / "x.pth", ("encoder", "decoder"), allow_pickle=True)
    save_file({"_orig_mod.a": torch.zeros(1), "a": torch.zeros(1)}, folder / "y.safetensors")
    with pytest.raises(CorruptFileError, match="same name"):
        read_weights(folder / "y.safetensors", ("a",))
    torch.save({"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)}, folder / "z.pth")
    with pytest.raises(CorruptFileError, match=r"two tensors of the name a\.b"):
        read_weights(folder / "z.pth", ("a",), allow_pickle=True)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "epoch": 3}, "its entries optimizer"),
        ({"state": {}, "param_groups": [{"lr": 1e-3}]}, "entries state, param_groups"),
        ({"epoch": 3}, "entries epoch"),
        ({}, "nothing in it"),
        ([torch.zeros(1)], "found list"),
        (torch.zeros(3), "found Tensor"),
        ({"ema": {"shadow_params": [torch.zeros(2)]}}, "entries ema"),
    ],
)
def test_a_checkpoint_without_the_network(folder: Path, content: Any, says: str) -> None:
    weights_of(folder).unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(CorruptFileError, match=says) as caught:
        load(folder, allow_pickle="true")
    assert "state dict" in str(caught.value) and "pytorch_model.bin" in str(caught.value)


# ---------------------------------------------------------------- shards


def shard(folder: Path, parts: int = 3, prefix: str = "") -> Path:
    """Split the weights of a folder; returns the index."""
    path = weights_of(folder)
    tensors = behind(prefix, {k: v.clone() for k, v in load_file(path).items()})
    names = [
        path.name.replace(".safetensors", f"-{i + 1:05d}-of-{parts:05d}.safetensors") for i in range(parts)
    ]
    table = {key: names[i % parts] for i, key in enumerate(tensors)}
    for name in names:
        save_file({k: v for k, v in tensors.items() if table[k] == name}, folder / name)
    path.unlink()
    index = folder / path.name.replace(".safetensors", INDEX)
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    return index


@every_family
def test_sharded_checkpoints_load_in_every_family(folder: Path) -> None:
    before = load(folder)
    index = shard(folder, prefix="module.")
    after = load(folder)
    assert same(weights(after), weights(before))
    assert after.info.weights == weights_digest(index) != before.info.weights


def test_the_digest_of_shards_is_that_of_their_bytes(folder: Path) -> None:
    index = shard(folder)
    one = weights_digest(index)
    part = sorted(folder.glob("*-of-*"))[0]
    save_file(others(load_file(part)), part)
    assert weights_digest(index) != one


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("missing", r"1 of 3 shards are not there: model-00002-of-00003\.safetensors"),
        ("outside", r"names the shard '\.\./x\.safetensors', expected"),
        ("absolute", "names the shard '/etc/passwd'"),
        ("windows", "names the shard"),
        ("pickle", r"names the shard 'model\.bin'"),
        ("number", "weight_map"),
        ("empty", "weight_map"),
        ("no map", "weight_map"),
        ("list", "expected a JSON object"),
        ("twice", "stands there twice"),
        ("lacks", r"lacks tensors that the index names: decoder\.ghost"),
        ("unlisted", "holds tensors that the index does not name"),
        ("moved", "holds tensors that the index does not name"),
        ("pointer", "git-LFS pointer"),
        ("truncated", "truncated"),
        ("long", "names the shard"),
    ],
)
def test_an_index_that_does_not_agree_with_its_shards(folder: Path, damage: str, says: str) -> None:
    index = shard(folder)
    content = json.loads(index.read_text())
    table = content["weight_map"]
    first, second, third = sorted(folder.glob("*-of-*"))
    key = next(iter(table))
    changes: dict[str, Callable[[], object]] = {
        "missing": second.unlink,
        "outside": lambda: table.update({key: "../x.safetensors"}),
        "absolute": lambda: table.update({key: "/etc/passwd"}),
        "windows": lambda: table.update({key: "..\\x.safetensors"}),
        "pickle": lambda: table.update({key: "model.bin"}),
        "number": lambda: table.update({key: 3}),
        "empty": table.clear,
        "no map": lambda: content.pop("weight_map"),
        "lacks": lambda: table.update({"decoder.ghost": first.name}),
        "unlisted": lambda: table.pop(key),
        "moved": lambda: table.update({key: third.name}),
        "pointer": lambda: third.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "truncated": lambda: third.write_bytes(third.read_bytes()[:-9]),
        "long": lambda: table.update({key: "x" * 5000 + ".safetensors"}),
    }
    changes.get(damage, lambda: None)()
    text = json.dumps(content)
    if damage == "twice":
        text = text.replace('"weight_map": {', f'"weight_map": {{"{key}": "{third.name}", ')
    index.write_text("[]" if damage == "list" else text)
    with pytest.raises((CorruptFileError, MissingError), match=says):
        load(folder)


# ---------------------------------------------------------------- files that are something else


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def zipped(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "an empty file"),
    "pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"),
        "git-LFS pointer.*git lfs pull",
    ),
    "page": (lambda p: p.write_text("\n <!DOCTYPE html><html><body>Not found</body></html>"), "a web page"),
    "page without a doctype": (lambda p: p.write_text("<HTML>login</HTML>"), "a web page"),
    "json": (lambda p: p.write_text('{"error": "Repository not found"}'), "a JSON text"),
    "keras": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "HDF5"),
    "keras archive": (
        lambda p: zipped(p, "metadata.json", "config.json", "model.weights.h5"),
        "a Keras archive",
    ),
    "gguf": (lambda p: p.write_bytes(b"GGUF\x03\0\0\0" + bytes(99)), "GGUF"),
    "onnx": (lambda p: p.write_bytes(b"\x08\x07\x12\x07pytorch\x1a\x052.5.0:" + bytes(99)), "ONNX"),
    "array": (lambda p: np.save(p.open("wb"), np.zeros(3)), "a NumPy array"),
    "arrays": (lambda p: np.savez(p.open("wb"), a=np.zeros(3)), "a NumPy archive"),
    "archive": (
        lambda p: zipped(p, "weights/model.safetensors", "README.md"),
        "zip archive without a torch file",
    ),
    "gzip": (lambda p: p.write_bytes(b"\x1f\x8b\x08\0" + bytes(99)), "a gzip archive"),
    "truncated zip": (
        lambda p: p.write_bytes(b"PK\x03\x04 and then nothing"),
        "zip archive that is truncated",
    ),
    "torchscript": (lambda p: torch.jit.script(Net()).save(str(p)), "TorchScript.*state_dict"),
    "text": (lambda p: p.write_text("hello"), "truncated or of another format"),
    "noise": (lambda p: p.write_bytes(bytes(range(256)) * 9), "truncated or of another format"),
    "directory": (lambda p: p.mkdir(), "a directory"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_file_of_weights_is_named(folder: Path, kind: str, name: str) -> None:
    weights_of(folder).unlink()
    make, says = FOREIGN[kind]
    make(folder / name)
    with pytest.raises(CorruptFileError, match=says) as caught:
        load(folder, allow_pickle="true")
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickled_network_is_never_run_and_named(folder: Path) -> None:
    weights_of(folder).unlink()
    torch.save(Net(), folder / "pytorch_model.bin")
    with pytest.raises(CorruptFileError, match=r"it names .*Net, which is no tensor.*state_dict\(\)"):
        load(folder, allow_pickle="true")
    torch.save({"a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CorruptFileError, match=r"a torch file \(pickle\) with the wrong name"):
        load(folder)


@pytest.mark.parametrize("cut", [3, 9, 200, -200, -1])
def test_truncated_files(folder: Path, cut: int) -> None:
    path = weights_of(folder)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CorruptFileError, match=r"model\.safetensors: not a readable safetensors.*truncated"):
        load(folder)
    path.unlink()
    torch.save({"a": torch.zeros(99)}, folder / "whole.bin")
    (folder / "pytorch_model.bin").write_bytes((folder / "whole.bin").read_bytes()[:cut])
    with pytest.raises(CorruptFileError, match="truncated"):
        load(folder, allow_pickle="true")


def test_a_header_length_that_looks_like_another_format(tmp_path: Path) -> None:
    """The first bytes of a safetensors file are a number: one that reads "PK" is no zip archive."""
    want = int.from_bytes(b"PK", "little")
    data = np.zeros(1, np.float32).tobytes()
    entry = {"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    padding = want - len(json.dumps({"__metadata__": {"x": ""}, **entry}))
    header = json.dumps({"__metadata__": {"x": " " * padding}, **entry}).encode()
    assert len(header) == want
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", want) + header + data)
    assert path.read_bytes()[:2] == b"PK"
    assert read_weights(path, ("weight",))["weight"].tolist() == [0.0]
    path.rename(tmp_path / "model.pth")  # safetensors under another name needs no permission
    assert read_weights(tmp_path / "model.pth", ("weight",))["weight"].tolist() == [0.0]


def test_names_that_are_not_looked_for_are_listed(folder: Path) -> None:
    weights_of(folder).rename(folder / "titok.safetensors")
    with pytest.raises(MissingError, match=r"found neither .*there is titok\.safetensors: rename it"):
        load(folder)
    (folder / "model.safetensors").symlink_to(folder / "blobs" / "gone")
    with pytest.raises(MissingError, match="a link to a file that is not there"):
        load(folder)


# ---------------------------------------------------------------- types and values

FLOATS = [torch.float16, torch.bfloat16, torch.float64]
WRONG = [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", FLOATS)
def test_floating_point_of_any_width_becomes_float32(folder: Path, dtype: torch.dtype) -> None:
    tensors = tensors_of(folder)
    want = weights(load(folder))
    save_file({k: v.to(dtype) for k, v in tensors.items()}, weights_of(folder))
    got = weights(load(folder))
    assert all(v.dtype == torch.float32 for v in got.values())
    assert all(torch.equal(got[k], want[k].to(dtype).float()) for k in want)


@every_family
@pytest.mark.parametrize("value", [math.nan, torch.int64], ids=str)
def test_every_family_refuses_bad_weights_at_loading(folder: Path, value: float | torch.dtype) -> None:
    tensors = tensors_of(folder)
    key = next(k for k, v in sorted(tensors.items()) if k.endswith("weight") and v.ndim > 1)
    if isinstance(value, float):
        tensors[key].view(-1)[-1] = value
        says = r"holds 1 of \d+ values that are NaN or infinite"
    else:
        tensors[key] = tensors[key].to(value)
        says = rf"is {str(value).removeprefix('torch.')}, expected floating-point numbers"
    save_file(tensors, weights_of(folder))
    with pytest.raises(CorruptFileError, match=says) as caught:
        load(folder)
    assert key in str(caught.value) and weights_of(folder).name in str(caught.value)


@pytest.mark.parametrize("dtype", WRONG, ids=str)
def test_numbers_of_another_type_are_no_weights(folder: Path, dtype: torch.dtype) -> None:
    tensors = tensors_of(folder)
    tensors["decoder.embed.weight"] = tensors["decoder.embed.weight"].to(dtype)
    save_file(tensors, weights_of(folder))
    with pytest.raises(
        CorruptFileError, match=rf"decoder\.embed\.weight is {str(dtype).removeprefix('torch.')}"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda t: t.to_sparse(), "sparse"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "quantized"),
        (lambda t: t.to("meta"), "has no values"),
        (lambda t: t.double() * 1e300, "float64 with values too large for float32"),
    ],
    ids=["sparse", "quantized", "meta", "too large"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_plain_numbers(
    tmp_path: Path, make: Callable[[Tensor], Tensor], says: str
) -> None:
    module, path = nn.Linear(2, 2), tmp_path / "x.pth"
    torch.save({k: make(v + 1) for k, v in module.state_dict().items()}, path)
    with pytest.raises(CorruptFileError, match=says):
        load_network(module, read_weights(path, ("weight",), allow_pickle=True), path)


def test_whole_numbers_stay_where_they_belong(tmp_path: Path) -> None:
    norm = nn.BatchNorm1d(3)
    state = {k: v.clone() for k, v in norm.state_dict().items()}
    state["num_batches_tracked"] += 7
    load_network(norm, state, tmp_path)
    assert norm.num_batches_tracked is not None and norm.num_batches_tracked.dtype == torch.int64
    with pytest.raises(CorruptFileError, match="num_batches_tracked is float32, expected whole numbers"):
        load_network(norm, state | {"num_batches_tracked": torch.tensor(7.0)}, tmp_path)


def test_export_does_not_overflow() -> None:
    with pytest.raises(BenchError, match="weight: not finite as float16"):
        as_stored({"weight": torch.tensor([1e6])}, torch.float16)
    stored = as_stored({"weight": torch.tensor([2.0]), "count": torch.tensor(3)}, torch.float16)
    assert stored["weight"].dtype == torch.float16 and stored["count"].dtype == torch.int64


def test_a_disagreement_names_the_setting(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model"]["depth"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError) as caught:
        load(folder)
    for part in (r"encoder.blocks: 3 blocks expected, 2 in the file", "model.depth", "belong together"):
        assert part in str(caught.value)
    config["model"] |= {"depth": 2, "fsq_levels": [4, 3]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"encoder\.head\.\w+ is decided by model\.fsq_levels"):
        load(folder)


# ---------------------------------------------------------------- where they lie


@every_family
def test_hub_snapshots_are_called_by_their_path(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--some-body--my-tokenizer"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):  # links to blobs, as the hub's client makes them
        shutil.move(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    info = load(snapshot).info
    assert (info.name, info.revision) == ("some-body/my-tokenizer", "0123abcd")
    assert load(repository).info == info  # the only revision
    (repository / "snapshots" / "ffff").mkdir()
    with pytest.raises(UsageError, match="several revisions"):
        load(repository)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    assert load(repository).info.revision == "0123abcd"
    if folder.name == "vqmodel":
        named = load_tokenizer("vqmodel", weights=str(snapshot), device="cpu")
        assert (named.info.name, named.info.revision) == ("some-body/my-tokenizer", "0123abcd")


def test_one_file_goes_with_a_name(masters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comit_bench.tokenizers.comit import adapter as comit_adapter
    from comit_bench.tokenizers.comit import model as comit
    from comit_bench.tokenizers.vq_grid import adapter as grid_adapter
    from comit_bench.tokenizers.vq_grid import model as vq_grid

    for family, presets, name in (
        ("comit", comit_adapter.PRESETS, "comit-nano"),
        ("vq-grid", grid_adapter.PRESETS, "vq-grid-nano"),
    ):
        loaded = load(masters / family)
        monkeypatch.setitem(presets, name, loaded.model.spec)
        path = tmp_path / f"{family}.ckpt"
        torch.save({"state_dict": behind("model.", tensors_of(masters / family))}, path)
        with pytest.raises(UsageError, match="allow_pickle=true"):
            load_tokenizer(name, weights=str(path), device="cpu")
        single = load_tokenizer(name, weights=str(path), device="cpu", allow_pickle="true")
        assert single.info.name == name and same(weights(single), weights(loaded))
        with pytest.raises(UsageError, match="a single file says nothing about sizes"):
            load_tokenizer(str(masters / family), weights=str(path), device="cpu", allow_pickle="true")
    assert comit.PRESETS is comit_adapter.PRESETS and vq_grid.PRESETS is grid_adapter.PRESETS


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ("vq-grid/model.safetensors", UsageError, "this is a file.*--tokenizer NAME --weights FILE"),
        ("vq-grid/gone", MissingError, "no such directory"),
        ("vq-grid/" + "x" * 300, UsageError, "cannot be used as a path"),
    ],
)
def test_a_file_is_no_directory(masters: Path, given: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        load_tokenizer(str(masters / given), device="cpu")
    with pytest.raises((UsageError, MissingError)):
        load_tokenizer("vq-grid-nano", weights=str(masters / "gone" / given), device="cpu")


def test_no_file_of_weights_is_more_than_read(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no such file"):
        read_torch(tmp_path / "gone.pth")
    with pytest.raises(MissingError, match="no such directory"):
        weight_file(tmp_path / "gone")


def test_hub_ids_may_be_sharded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    want = weights(load(folder))
    index = shard(folder)
    repository = tmp_path / "hub" / "models--some--vqmodel-like"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    shutil.move(folder, repository / "snapshots" / "abc")
    from comit_bench.tokenizers.hub import fetch_checkpoint

    place = fetch_checkpoint("some/vqmodel-like", offline=True, hint="or pass --weights DIR")
    loaded = load(place)
    assert same(weights(loaded), want) and loaded.info.revision == "abc"
    (place / json.loads((place / index.name).read_text())["weight_map"]["encoder.head.bias"]).unlink()
    with pytest.raises(MissingError, match=r"model-0000\d-of-00003\.safetensors of some/vqmodel-like"):
        fetch_checkpoint("some/vqmodel-like", offline=True, hint="or pass --weights DIR")


def test_another_autoencoder_beside_the_same_weights_is_another_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are kept by what made them: the SD-VAE that a COMiT checkpoint does not hold is part of it."""
    from dataclasses import replace

    from comit_bench.nn import vae
    from comit_bench.tokenizers.comit import checkpoint as comit_files
    from comit_bench.tokenizers.comit.model import PRESETS

    monkeypatch.setattr(vae, "SD_VAE", replace(vae.SD_VAE, widths=(32,) * 4, layers=1))
    model = comit_files.build(replace(PRESETS["comit-b"], depth=1, width=32, heads=2))
    comit_files.save(model, tmp_path)
    tensors = tensors_of(tmp_path)
    save_file({k: v for k, v in tensors.items() if not k.startswith("vae.")}, weights_of(tmp_path))
    own = {k.removeprefix("vae.vae."): v for k, v in tensors.items() if k.startswith("vae.")}
    (tmp_path / "vae").mkdir()
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    found = []
    for change in (own, others(own)):
        save_file(change, path)
        info = load(tmp_path).info
        found.append((info.weights, info.options["vae_weights"]))
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]
    save_file({k: v * math.nan for k, v in own.items()}, path)
    with pytest.raises(
        CorruptFileError,
        match=r"vae/diffusion_pytorch_model\.safetensors: \S+ holds \d+ of \d+ values that are NaN",
    ):
        load(tmp_path)


def test_several_files_of_weights_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = weights_of(folder)
    shutil.copy(path, folder / "weights.safetensors")
    load(folder)
    assert "model.safetensors is read, not weights.safetensors" in caplog.text


@pytest.mark.parametrize("option", ["steps", "guidance", "momentum"])
@pytest.mark.parametrize("value", ["many", True, math.nan, math.inf, None, [1], 10**9])
def test_options_are_numbers(option: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"{option} must be a"):
        load_tokenizer("comit-nano", weights="random", device="cpu", **{option: value})


@pytest.mark.parametrize("name", ["alit-small", "selftok-512"])
@pytest.mark.parametrize("kind", ["page", "pointer", "torchscript", "text"])
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_released_names_with_a_file_that_is_something_else(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / "released.pth"
    make, says = FOREIGN[kind]
    make(path)
    with pytest.raises(CorruptFileError, match=says):
        load_tokenizer(name, weights=str(path), device="cpu", offline=True, allow_pickle="true")
    from comit_bench.tokenizers.weights import convert

    with pytest.raises(CorruptFileError, match=says):
        convert(name, path, output=tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
