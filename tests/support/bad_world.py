"""Files for the cases of ``tests/slow/test_bad_inputs.py``: a few good ones, and many that are broken.

Everything lies below one folder and is written once. A broken file differs from a good one in one thing.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from comit_bench.files import shipped_weights

ROOT = Path(__file__).parents[2]
LONG = "x" * 5000  # longer than any path
DIGITS = "9" * 5000  # more than int() reads
DEEP = 100_000

# ---------------------------------------------------------------- YAML and JSON

BAD_YAML: dict[str, bytes] = {
    "empty": b"",
    "only-comment": b"# nothing\n",
    "list": b"- a\n- b\n",
    "text": b"just words\n",
    "number": b"12\n",
    "cut": b"name: {a: [1, 2\n",
    "tab": b"name: x\n\tkind: y\n",
    "not-utf8": b"name: \xff\xfe\xfa\n",
    "utf16": "name: x\n".encode("utf-16"),
    "nul": b"name: a\0b\n",
    "binary": bytes(range(256)) * 4,
    "deep-list": b"name: " + b"[" * DEEP + b"]" * DEEP,
    "deep-map": b"name: " + b"{a: " * 5000 + b"1" + b"}" * 5000,
    "deep-dashes": b"name:\n " + b"- " * 5000 + b"1\n",
    "laughs": b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"%c: &%c [" % (98 + i, 98 + i) + b"*%c, " % (97 + i) * 9 + b"]\n" for i in range(9)),
    "merged-laughs": b"a: &a {x: 1}\n"
    + b"".join(b"%c: &%c {<<: [" % (98 + i, 98 + i) + b"*%c, " % (97 + i) * 9 + b"]}\n" for i in range(9)),
    "cyclic-list": b"name: &a [*a]\n",
    "cyclic-map": b"&a name: &b {x: *b}\n",
    "unknown-anchor": b"name: *nowhere\n",
    "key-twice": b"name: a\nname: b\n",
    "key-is-list": b"[a, b]: 1\n",
    "key-is-number": b"1: 2\n",
    "wrong-date": b"name: 2024-13-45\n",
    "date": b"version: 2024-01-31\n",
    "digits": b"version: " + DIGITS.encode() + b"\n",
    "hex-digits": b"version: 0x" + b"f" * 20000 + b"\n",
    "sixties": b"version: " + b"1" + b":59" * 3000 + b"\n",
    "infinite": b"version: .inf\n",
    "not-a-number": b"version: .nan\n",
    "python-tag": b"name: !!python/object/apply:os.system [ls]\n",
    "own-tag": b"name: !mine x\n",
    "int-tag": b"version: !!int ''\n",
    "float-tag": b"version: !!float abc\n",
    "bool-tag": b"version: !!bool perhaps\n",
    "time-tag": b"version: !!timestamp today\n",
    "binary-tag": b"name: !!binary '$$$'\n",
    "surrogate": b'name: "\\ud800"\n',
    "two-documents": b"name: a\n---\nname: b\n",
    "long-line": b"name: " + b"y" * 2_000_000 + b"\n",
}
BAD_JSON: dict[str, bytes] = {
    "empty": b"",
    "blank": b"  \n",
    "list": b"[]",
    "number": b"1",
    "null": b"null",
    "text": b'"words"',
    "cut": b'{"a": [1, 2',
    "comma": b'{"a": 1,}',
    "comment": b'{"a": 1} // no',
    "not-utf8": b'{"a": "\xff\xfe"}',
    "utf16": '{"a": 1}'.encode("utf-16"),
    "nul": b'{"a": "\0"}',
    "binary": bytes(range(256)) * 4,
    "deep-list": b'{"a": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep-map": b'{"a": ' * DEEP + b"1" + b"}" * DEEP,
    "digits": b'{"a": ' + DIGITS.encode() + b"}",
    "not-a-number": b'{"a": NaN}',
    "infinite": b'{"a": 1e999}',
    "key-twice": b'{"a": 1, "a": 2}',
    "surrogate": b'{"a": "\\ud800"}',
    "empty-object": b"{}",
}
# Where a broken YAML or JSON file is something else than a file with broken content.
BAD_PLACES = ("folder", "fifo", "loop", "unreadable", "absent")


def place_badly(path: Path, how: str) -> None:
    """Something at ``path`` that is no file with content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if how == "folder":
        path.mkdir()
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "loop":
        path.symlink_to(path)
    elif how == "unreadable":  # a superuser reads every file, but nobody reads memory at address 0
        path.symlink_to("/proc/self/mem")


def write(path: Path, content: bytes | str | object) -> Path:
    """A file of bytes, text, or a value as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return path


# ---------------------------------------------------------------- images


def png(side: int = 32, number: int = 0) -> bytes:
    """A small image."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _bomb() -> bytes:
    """A PNG that says it has 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


BAD_IMAGES: dict[str, bytes] = {
    "empty": b"",
    "text": b"this is no image\n",
    "cut": png()[:200],
    "cut-header": png()[:20],
    "changed": png()[:60] + b"\0\0\0\0" + png()[64:],
    "bomb": _bomb(),
    "html": b"<!doctype html><title>404</title>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "nothing-but-zeros": bytes(4096),
}


# ---------------------------------------------------------------- safetensors


def safetensors(header: object, body: bytes = b"") -> bytes:
    """A file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _tensor(
    kind: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, int] = (0, 8)
) -> dict[str, Any]:
    return {"dtype": kind, "shape": list(shape), "data_offsets": list(offsets)}


BAD_SAFETENSORS: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x08\0\0",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 12\n",
    "html": b"<!doctype html><title>404</title>" * 9,
    "zip": b"PK\x03\x04" + bytes(200),
    "long-header": struct.pack("<Q", 2**62) + b"{}",
    "no-json": safetensors(b"hello"),
    "deep-json": safetensors(b"[" * DEEP + b"]" * DEEP),
    "no-tensors": safetensors({}),
    "list": safetensors([]),
    "beyond": safetensors({"w": _tensor(offsets=(0, 8))}, b"\0" * 4),
    "kind": safetensors({"w": _tensor("F99")}, bytes(8)),
    "shape": safetensors({"w": _tensor(shape=(3,))}, bytes(8)),
    "negative": safetensors({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8)),
    "other": safetensors({"w": _tensor()}, bytes(8)),
}
BAD_PICKLES: dict[str, bytes] = {
    "empty": b"",
    "text": b"hello\n",
    "html": b"<!doctype html>" * 9,
    "zip": b"PK\x03\x04" + bytes(200),
    "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "number": b"\x80\x04K\x01.",
    "cut": b"\x80\x04}q\x00(X\x05",
}


# ---------------------------------------------------------------- records


def _edit(change: Callable[[dict[str, Any]], None]) -> bytes:
    source = ROOT / "tests/fixtures/records/measured-v1.json"
    record = json.loads(source.read_text(encoding="utf-8"))
    change(record)
    return json.dumps(record).encode()


def _set(*path: str, value: Any) -> bytes:
    def change(record: dict[str, Any]) -> None:
        place = record
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value

    return _edit(change)


def bad_records() -> dict[str, bytes]:
    """Records edited by hand."""
    return {
        "value": _set("metrics", "top1", "value", value=99.0),
        "value-is-text": _set("metrics", "top1", "value", value="45"),
        "value-nan": _edit(lambda r: r["metrics"]["top1"].update(value=float("nan"))),
        "value-infinite": _edit(lambda r: r["metrics"]["top1"].update(value=float("inf"))),
        "value-huge": _set("metrics", "top1", "value", value=0).replace(
            b'"value": 0', b'"value": 1' + b"0" * 400
        ),
        "value-true": _set("metrics", "top1", "value", value=True),
        "std-negative": _set("metrics", "top1", "std", value=-1.0),
        "no-metrics": _set("metrics", value={}),
        "metrics-list": _set("metrics", value=[]),
        "metric-name-empty": _edit(lambda r: r["metrics"].update({"": r["metrics"]["top1"]})),
        "metric-name-lines": _edit(lambda r: r["metrics"].update({"a\nb": r["metrics"]["top1"]})),
        "schema-newer": _set("schema", value=99),
        "schema-zero": _set("schema", value=0),
        "schema-text": _set("schema", value="1"),
        "schema-float": _set("schema", value=1.0),
        "schema-true": _set("schema", value=True),
        "schema-absent": _edit(lambda r: r.pop("schema")),
        "unknown-key": _set("extra", value=1),
        "near-key": _edit(lambda r: r.update(seed=r.pop("seeds"))),
        "protocol": _set("protocol", "seeds", value=[0, 1, 2, 3]),
        "digest": _set("protocol_digest", value="sha256:" + "0" * 64),
        "digest-short": _set("protocol_digest", value="sha256:00"),
        "seeds-twice": _set("seeds", value=[0, 0, 1]),
        "limit-complete": _set("limit", value=5),
        "created-naive": _set("created", value="2026-01-01T00:00:00"),
        "created-words": _set("created", value="yesterday"),
        "name-empty": _set("tokenizer", "name", value=""),
        "name-control": _set("tokenizer", "name", value="a\x1b[31m"),
        "weights-null": _set("tokenizer", "weights", value=None),
        "counts-negative": _set("counts", "train", value=-1),
        "counts-float": _set("counts", "train", value=1.5),
        "timing-negative": _set("timings", value={"probe": -1.0}),
    }


# ---------------------------------------------------------------- token files


def _tokens(source: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> bytes:
    from safetensors import safe_open
    from safetensors.numpy import save

    with safe_open(source, "np") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata.pop("sha256")  # a program may leave it out
    change(tensors, metadata)
    return bytes(save(tensors, metadata))


def _json_bytes(value: object) -> Any:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return np.frombuffer(text, dtype=np.uint8)


def bad_tokens(source: Path) -> dict[str, bytes]:
    """Token files that differ from a good one."""

    def tensor(name: str, value: Any) -> bytes:
        return _tokens(source, lambda t, m: t.update({name: value}))

    def meta(name: str, value: str | None) -> bytes:
        def change(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
            metadata.pop(name)
            metadata.update({} if value is None else {name: value})

        return _tokens(source, change)

    whole = source.read_bytes()
    return {
        "cut": whole[:-10],
        "changed": whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
        "format": meta("format", "other"),
        "version": meta("format_version", "99"),
        "no-version": meta("format_version", None),
        "vocab-text": meta("vocab_size", "many"),
        "vocab-digits": meta("vocab_size", DIGITS),
        "vocab-small": meta("vocab_size", "1"),
        "vocab-zero": meta("vocab_size", "0"),
        "vocab-huge": meta("vocab_size", "9" * 30),
        "length": meta("message_length", "3"),
        "length-square": meta("message_length", "²"),
        "length-negative": meta("message_length", "-16"),
        "no-tokenizer": meta("tokenizer", None),
        "tokenizer-unknown": meta("tokenizer", "nothing-of-this-name"),
        "tokenizer-long": meta("tokenizer", LONG),
        "tokenizer-home": meta("tokenizer", "~nobody-at-all/x"),
        "tokenizer-empty": meta("tokenizer", ""),
        "weights-other": meta("weights", "sha256:" + "0" * 64),
        "options-list": meta("options", "[]"),
        "options-broken": meta("options", "{"),
        "options-deep": meta("options", "[" * DEEP + "]" * DEEP),
        "options-digits": meta("options", DIGITS),
        "resolution": meta("resolution", "1e9"),
        "names-list": tensor("names", _json_bytes({"a": 1})),
        "names-broken": tensor("names", _json_bytes(b"[")),
        "names-deep": tensor("names", _json_bytes(b"[" * DEEP + b"]" * DEEP)),
        "names-digits": tensor("names", _json_bytes(DIGITS.encode())),
        "names-fewer": tensor("names", _json_bytes(["a.png"])),
        "names-twice": tensor("names", _json_bytes(["a.png"] * 3)),
        "names-outside": tensor("names", _json_bytes(["../a.png", "b.png", "c.png"])),
        "names-absolute": tensor("names", _json_bytes(["/a.png", "b.png", "c.png"])),
        "names-nul": tensor("names", _json_bytes(["a\0.png", "b.png", "c.png"])),
        "names-numbers": tensor("names", _json_bytes([1, 2, 3])),
        "names-surrogate": tensor("names", _json_bytes(b'["\\ud800.png", "b.png", "c.png"]')),
        "names-long": tensor("names", _json_bytes([LONG, "b.png", "c.png"])),
        "broken-list": tensor("broken", _json_bytes([1])),
        "ids-float": tensor("ids", np.zeros((3, 16), dtype=np.float32)),
        "ids-shape": tensor("ids", np.zeros((3, 15), dtype=np.uint16)),
        "ids-large": tensor("ids", np.full((3, 16), 60000, dtype=np.uint16)),
        "ids-negative": tensor("ids", np.full((3, 16), -1, dtype=np.int32)),
        "ids-absent": _tokens(source, lambda t, m: t.pop("ids")),
        "names-absent": _tokens(source, lambda t, m: t.pop("names")),
        "offsets-nan": tensor("offsets", np.full((3, 2), np.nan, dtype=np.float32)),
        "offsets-shape": tensor("offsets", np.zeros((2, 2), dtype=np.float32)),
        "codes-too": tensor("codes", np.zeros((3, 16, 6), dtype=np.float32)),
    }


# ---------------------------------------------------------------- data sets and tars

DATASETS = {
    "mini-classes": "reader: class-folders\nclass_list: classes.txt\nsplits: {train: [train], val: [val]}\n"
    "labels: {val: [LOC_val_solution.csv]}\nshards: {train: ['train-*.tar'], val: ['val-*.tar']}\n",
    "mini-coco": "reader: coco\nsplits: {train: [train.json], val: [val.json]}\n"
    "images: {train: [images], val: [images]}\npairs: {policy: given}\n",
    "mini-vg": "reader: visual-genome\nsplits: {train: [train.txt], val: [val.txt]}\n"
    "images: {bases: [.], folders: [pics]}\n"
    "labels: {relationships: [relationships.json], image_data: [image_data.json], object_alias: [words.txt],"
    " relationship_alias: [verbs.txt]}\nrelations: {min_area: 0.0, aliases: true}\n",
    "mini-masks": "reader: saliency\nsplits: {val: [images]}\nlabels: {val: [masks]}\n",
}
TASKS = {
    "mini-recognition": ("classification", "mini-classes"),
    "mini-pairs": ("multilabel", "mini-coco"),
    "mini-relations": ("relations", "mini-vg"),
    "mini-objects": ("objectness", "mini-masks"),
}
_NUMBERS = range(1, 7)


def write_recipes(root: Path) -> None:
    """A folder of recipes whose data sets are small."""
    for name, text in DATASETS.items():
        head = f"name: {name}\nversion: 1\ntitle: t\nfolder: {name}\nlicence: none\n"
        write(root / "datasets" / name / "dataset.yaml", head + text)
        write(root / "datasets" / name / "README.md", "# words\n")
    write(root / "datasets/mini-classes/classes.txt", "cat\ndog\n")
    for name, (kind, dataset) in TASKS.items():
        text = f"name: {name}\nversion: 1\ntitle: t\nkind: {kind}\nsuite: extra\ndataset: {dataset}\n"
        write(root / "probes" / name / "task.yaml", text)
        write(root / "probes" / name / "README.md", "# words\n")


def coco(split: str) -> dict[str, Any]:
    """Annotations of six images with two categories each."""
    shift = 0 if split == "train" else 100
    return {
        "images": [{"id": n + shift, "file_name": f"{n}.png", "width": 32, "height": 32} for n in _NUMBERS],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {
                "id": 10 * n + c + shift * 10,
                "image_id": n + shift,
                "category_id": c,
                "iscrowd": 0,
                "bbox": [0, 0, 9, 9],
            }
            for n in _NUMBERS
            for c in (1, 2)
        ],
    }


def image_data() -> list[dict[str, Any]]:
    """Visual Genome's list of images."""
    return [{"image_id": n, "width": 32, "height": 32, "url": f"http://x/pics/{n}.jpg"} for n in _NUMBERS]


def relationships() -> list[dict[str, Any]]:
    """Visual Genome's relations, one per image."""
    end = {"x": 0, "y": 0, "w": 16, "h": 16}
    relation = {"subject": {"name": "cat", **end}, "predicate": "on", "object": {"name": "mat", **end}}
    return [{"image_id": n, "relationships": [relation]} for n in _NUMBERS]


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    """A tar shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, body in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))


def write_data(root: Path) -> None:
    """Good data of every reader below one data root."""
    for split in ("train", "val"):
        for number in _NUMBERS:
            write(
                root / "mini-classes" / split / ("cat", "dog")[number % 2] / f"{number}.png", png(32, number)
            )
        write(root / "mini-coco" / f"{split}.json", coco(split))
    for number in _NUMBERS:
        write(root / f"mini-coco/images/{number}.png", png(32, number))
        write(root / f"mini-vg/pics/{number}.jpg", png(32, number))
        write(root / f"mini-masks/images/{number}.png", png(32, number))
        stream = io.BytesIO()
        Image.fromarray(np.eye(32, dtype=np.uint8) * 255).save(stream, "PNG")
        write(root / f"mini-masks/masks/{number}.png", stream.getvalue())
    write(root / "mini-vg/relationships.json", relationships())
    write(root / "mini-vg/image_data.json", image_data())
    write(root / "mini-vg/train.txt", "1\n2\n3\n4\n")
    write(root / "mini-vg/val.txt", "5\n6\n")
    write(root / "mini-vg/words.txt", "cat,kitten\n")
    write(root / "mini-vg/verbs.txt", "on,upon\n")


Change = Callable[[Path], object]


def _json_change(name: str, change: Callable[[Any], object]) -> Change:
    def apply(root: Path) -> None:
        value = json.loads((root / name).read_text(encoding="utf-8"))
        made = change(value)
        write(root / name, json.dumps(value if made is None else made))

    return apply


def _replaced(name: str, content: bytes) -> Change:
    return lambda root: write(root / name, content)


def _misplaced(name: str, how: str) -> Change:
    def apply(root: Path) -> None:
        if (root / name).is_dir():
            shutil.rmtree(root / name)
        else:
            (root / name).unlink()
        place_badly(root / name, how)

    return apply


def _first(key: str, name: str, value: Any) -> Callable[[Any], None]:
    """Sets one key of the first entry of a list."""

    def change(content: Any) -> None:
        (content[key] if key else content)[0][name] = value

    return change


def bad_data() -> dict[str, tuple[str, Change]]:
    """Name -> the data set, and what is done to good data of it."""
    vg, words = "mini-vg/relationships.json", ("not-utf8", "binary", "deep-list")
    found: dict[str, tuple[str, Change]] = {}
    for name, content in BAD_JSON.items():
        found[f"coco-{name}"] = ("mini-coco", _replaced("mini-coco/train.json", content))
        found[f"vg-{name}"] = ("mini-vg", _replaced(vg, content))
        found[f"vg-images-{name}"] = ("mini-vg", _replaced("mini-vg/image_data.json", content))
    for how in BAD_PLACES:
        found[f"coco-{how}"] = ("mini-coco", _misplaced("mini-coco/val.json", how))
        found[f"vg-{how}"] = ("mini-vg", _misplaced(vg, how))
        found[f"classes-{how}"] = ("mini-classes", _misplaced("mini-classes/train", how))
        found[f"masks-{how}"] = ("mini-masks", _misplaced("mini-masks/masks", how))
    for name in words:
        found[f"vg-list-{name}"] = ("mini-vg", _replaced("mini-vg/train.txt", BAD_JSON[name]))
    found |= {
        "vg-list-words": ("mini-vg", _replaced("mini-vg/train.txt", b"one two\n")),
        "vg-list-square": ("mini-vg", _replaced("mini-vg/train.txt", "²\n".encode())),
        "vg-list-digits": ("mini-vg", _replaced("mini-vg/train.txt", DIGITS.encode())),
        "vg-list-empty": ("mini-vg", _replaced("mini-vg/train.txt", b"")),
        "vg-list-both": ("mini-vg", _replaced("mini-vg/train.txt", b"1\n5\n")),
        "vg-aliases": ("mini-vg", _replaced("mini-vg/words.txt", b"\xff\xfe\xfa")),
    }
    coco_changes: dict[str, Callable[[Any], object]] = {
        "no-images": lambda c: c.pop("images") and None,
        "no-annotations": lambda c: c.pop("annotations") and None,
        "images-map": lambda c: c.update(images={}),
        "images-null": lambda c: c.update(images=None),
        "annotations-text": lambda c: c.update(annotations="x"),
        "image-without-id": lambda c: c["images"][0].pop("id") and None,
        "image-id-list": _first("images", "id", [1]),
        "image-id-nan": _first("images", "id", float("nan")),
        "file-number": _first("images", "file_name", 5),
        "file-outside": _first("images", "file_name", "../../secret.png"),
        "file-absolute": _first("images", "file_name", "/etc/passwd"),
        "file-nul": _first("images", "file_name", "a\0b.png"),
        "file-long": _first("images", "file_name", LONG + ".png"),
        "file-surrogate": _first("images", "file_name", "\ud800.png"),
        "category-unknown": _first("annotations", "category_id", 99),
        "category-text": _first("annotations", "category_id", "cat"),
        "category-float": _first("annotations", "category_id", 1.5),
        "category-digits": _first("annotations", "category_id", 10**30),
        "category-twice": lambda c: c["categories"].append({"id": 1, "name": "cow"}),
        "category-negative": lambda c: c["categories"].append({"id": -1, "name": "cow"}),
        "category-nameless": _first("categories", "name", None),
        "annotation-null": lambda c: c.update(annotations=[None]),
    }
    for name, change in coco_changes.items():
        found[f"coco-{name}"] = ("mini-coco", _json_change("mini-coco/train.json", change))
    vg_changes: dict[str, Callable[[Any], object]] = {
        "entry-null": lambda v: [None],
        "relations-null": _first("", "relationships", None),
        "relation-text": _first("", "relationships", ["x"]),
        "subject-list": lambda v: v[0]["relationships"][0].update(subject=[]),
        "subject-nan": lambda v: v[0]["relationships"][0]["subject"].update(x=float("nan")),
        "subject-words": lambda v: v[0]["relationships"][0]["subject"].update(x="left"),
        "id-text": _first("", "image_id", "one"),
        "id-digits": _first("", "image_id", 10**30),
    }
    for name, change in vg_changes.items():
        found[f"vg-{name}"] = ("mini-vg", _json_change(vg, change))
    image_changes: dict[str, Callable[[Any], object]] = {
        "url-null": _first("", "url", None),
        "width-text": _first("", "width", "wide"),
        "width-nan": _first("", "width", float("nan")),
        "url-outside": _first("", "url", "http://x/pics/.."),
        "url-long": _first("", "url", f"http://x/pics/{LONG}.jpg"),
        "url-nul": _first("", "url", "http://x/pics/a\0.jpg"),
    }
    for name, change in image_changes.items():
        found[f"vg-images-{name}"] = ("mini-vg", _json_change("mini-vg/image_data.json", change))
    for name, content in BAD_IMAGES.items():
        found[f"classes-image-{name}"] = ("mini-classes", _replaced("mini-classes/train/cat/2.png", content))
        found[f"masks-image-{name}"] = ("mini-masks", _replaced("mini-masks/images/1.png", content))
        found[f"masks-mask-{name}"] = ("mini-masks", _replaced("mini-masks/masks/1.png", content))
    found |= {
        "classes-one-gone": ("mini-classes", lambda r: shutil.rmtree(r / "mini-classes/train/dog")),
        "classes-one-empty": (
            "mini-classes",
            lambda r: [p.unlink() for p in (r / "mini-classes/train/dog").iterdir()],
        ),
        "classes-image-is-fifo": ("mini-classes", _misplaced("mini-classes/train/cat/2.png", "fifo")),
        "classes-image-is-loop": ("mini-classes", _misplaced("mini-classes/train/cat/2.png", "loop")),
        "classes-flat": ("mini-classes", _flat),
        "masks-alone": ("mini-masks", _replaced("mini-masks/masks/77.png", png())),
        "masks-empty": ("mini-masks", lambda r: [p.unlink() for p in (r / "mini-masks/images").iterdir()]),
        "root-itself": ("mini-classes", lambda r: [p.unlink() for p in r.rglob("*.png")]),
    }
    for name, body in {
        "csv-empty": b"",
        "csv-columns": b"a,b\n1,2\n",
        "csv-short": b"ImageId,PredictionString\n1\n",
        "csv-binary": bytes(range(256)),
        "csv-huge-field": b"ImageId,PredictionString\n" + b"x" * 200_000 + b",cat\n",
        "csv-unknown": b"ImageId,PredictionString\n1,cow 1 2 3 4\n",
        "csv-some": b"ImageId,PredictionString\n1,cat 1 2 3 4\n",
    }.items():
        found[name] = ("mini-classes", _flat_with(body))
    for name, body in {
        "tar-empty": b"",
        "tar-text": b"hello" * 200,
        "tar-zeros": bytes(10240),
        "tar-cut": None,
        "tar-gzip": b"\x1f\x8b\x08\0" + bytes(100),
        "tar-no-images": b"tar:a.txt",
        "tar-no-label": b"tar:a.png",
        "tar-bad-label": b"tar:a.png,a.cls=cow",
        "tar-square-label": "tar:a.png,a.cls=²".encode(),
        "tar-digits-label": b"tar:a.png,a.cls=" + DIGITS.encode(),
        "tar-large-label": b"tar:a.png,a.cls=99999999",
        "tar-bad-json": b"tar:a.png,a.json={",
    }.items():
        found[name] = ("mini-classes", _tars(body))
    return found


def _flat(root: Path) -> None:
    for path in list((root / "mini-classes/val").rglob("*.png")):
        path.rename(root / "mini-classes/val" / path.name)
    for folder in ("cat", "dog"):
        (root / "mini-classes/val" / folder).rmdir()


def _flat_with(table: bytes) -> Change:
    def apply(root: Path) -> None:
        _flat(root)
        write(root / "mini-classes/LOC_val_solution.csv", table)

    return apply


def _tars(body: bytes | None) -> Change:
    def apply(root: Path) -> None:
        folder = root / "mini-classes"
        for split in ("train", "val"):
            shutil.rmtree(folder / split)
            good = {f"{n}.{kind}": content for n in _NUMBERS for kind, content in
                    (("png", png(32, n)), ("cls", str(n % 2).encode()))}  # fmt: skip
            write_tar(folder / f"{split}-0.tar", good)
        place = folder / "train-0.tar"
        if body is None:
            place.write_bytes(place.read_bytes()[:2000])
        elif body.startswith(b"tar:"):
            files = {}
            for entry in body.decode().removeprefix("tar:").split(","):
                name, _, text = entry.partition("=")
                files[name] = png() if name.endswith("png") else text.encode()
            write_tar(place, files)
        else:
            place.write_bytes(body)

    return apply


# ---------------------------------------------------------------- all of them


def build(world: Path) -> None:
    """Everything but what needs a command to be made."""
    for name, number in (("a.png", 1), ("b.png", 2), ("sub/c.png", 3)):
        write(world / "images" / name, png(32, number))
    for name, content in BAD_IMAGES.items():
        write(world / "bad-images" / name / "x.png", content)
    write(world / "no-images" / "notes.txt", "none")
    write(world / "a-file", "text\n")
    (world / "a-folder").mkdir()
    shutil.copytree(shipped_weights("comit-nano"), world / "nano")
    shutil.copytree(shipped_weights("titok-nano"), world / "titok")
    for name, content in BAD_JSON.items():
        write(world / "config" / name / "config.json", content)
        shutil.copy(world / "nano/model.safetensors", world / "config" / name)
        write(world / "json" / f"{name}.json", content)
    for name, content in BAD_SAFETENSORS.items():
        write(world / "weights" / name / "model.safetensors", content)
        shutil.copy(world / "nano/config.json", world / "weights" / name)
        write(world / "safetensors" / f"{name}.safetensors", content)
    for how in BAD_PLACES:
        place_badly(world / "config" / how / "config.json", how)
        shutil.copy(world / "nano/model.safetensors", world / "config" / how)
        place_badly(world / "weights" / how / "model.safetensors", how)
        shutil.copy(world / "nano/config.json", world / "weights" / how)
        place_badly(world / "json" / f"{how}.json", how)
        place_badly(world / "yaml" / f"{how}.yaml", how)
        place_badly(world / "recipe" / how / "probes" / "mine" / "task.yaml", how)
        place_badly(world / "safetensors" / f"{how}.safetensors", how)
    for name, content in BAD_PICKLES.items():
        write(world / "pickles" / f"{name}.pth", content)
    for name, content in BAD_YAML.items():
        write(world / "yaml" / f"{name}.yaml", content)
        write(world / "recipe" / name / "probes" / "mine" / "task.yaml", content)
    for name, content in bad_records().items():
        write(world / "records" / name / "x.json", content)
    for name, content in BAD_JSON.items():
        write(world / "records" / f"json-{name}" / "x.json", content)
    write(world / "good-records/x.json", (ROOT / "tests/fixtures/records/measured-v1.json").read_bytes())
    write_recipes(world / "recipes")
    write_data(world / "data")
    for name, (dataset, change) in bad_data().items():
        shutil.copytree(world / "data" / dataset, world / "bad-data" / name / dataset)
        change(world / "bad-data" / name)
    for name, body in {"cut": png()[:300], "text": b"no tar" * 100, "empty": b""}.items():
        write(world / "tars" / f"{name}.tar", body)


def build_tokens(world: Path, good: Path) -> None:
    """Broken token files, after a command has made a good one of the three images."""
    for name, content in bad_tokens(good).items():
        write(world / "tokens" / f"{name}.safetensors", content)
