"""The layouts of the embedded scenes, official ones but for the last: which files, what the label files say.

=============  ==========================================================================
layout         tree
=============  ==========================================================================
recognition    ``train/cat/00042.png``, ``val/...``: class folders; digits: ``train/red_3/...``;
               drawings: ``attributes.json`` with vendor, place and hue of each
pairs          ``annotations/instances_{train,val}.json`` (COCO), ``train/``, ``val/``
relations      ``relationships.json``, ``image_data.json`` (Visual Genome), ``VG_100K/`` holding the
               train images and ``VG_100K_2/`` the val images, ``splits/{train,val}.json`` id lists
objectness     ``images/0001.jpg``, ``ground_truth_mask/0001.png`` (CSSD)
counterfactual ``val/moved_large/00042.png``: class folders, one per edit; equal names are one scene
=============  ==========================================================================

Files named ``.jpg`` (as Visual Genome and CSSD want) hold PNG data: image libraries recognise a file
by its content, so the pixels are exact and do not depend on a JPEG encoder.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from comit_bench.data.scenes import digits, painting
from comit_bench.files import write_atomic
from comit_bench.recipes.specs import GeneratorSpec

FORMAT = 1  # raise it when the same settings would give other images or labels
PREDICATES = ("left of", "right of", "above", "below", "larger than", "smaller than")

Box = tuple[int, int, int, int]
Pixels = NDArray[np.uint8]
Scenes = digits.Scenes | painting.Scenes


def painter(spec: GeneratorSpec) -> Any:
    """The module that paints these scenes."""
    return painting if spec.name == "drawings" else digits


def relations_between(subject: Box, target: Box) -> tuple[str, ...]:
    """All predicates that hold from ``subject`` to ``target``, boxes as x, y, width, height.

    Left, right, above and below need boxes that do not overlap in that direction; larger and
    smaller need a height ratio of at least 1.2 and an area that agrees.
    """
    (ax, ay, aw, ah), (bx, by, bw, bh) = subject, target
    larger = 5 * ah >= 6 * bh and aw * ah > bw * bh
    smaller = 5 * bh >= 6 * ah and bw * bh > aw * ah
    holds = (ax + aw <= bx, bx + bw <= ax, ay + ah <= by, by + bh <= ay, larger, smaller)
    return tuple(name for name, true in zip(PREDICATES, holds, strict=True) if true)


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed run lengths of [H, W]: column by column, starting with zeros."""
    flat = mask.ravel(order="F")
    ends = np.concatenate([np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    counts = np.diff(ends, prepend=0).tolist()
    return [0, *counts] if flat[0] else list(counts)


def box_of(scenes: Scenes, row: int, thing: int) -> Box:
    """x, y, width and height as Python integers."""
    x, y, w, h = (int(v) for v in scenes.boxes[row, thing])
    return x, y, w, h


def _objects(scenes: Scenes, row: int) -> list[dict[str, Any]]:
    return [
        {
            "category": int(scenes.concepts[row, k]),
            "name": scenes.name(row, k),
            "box": list(box_of(scenes, row, k)),
            "area": int(scenes.masks[row, k].sum()),
            "counts": run_lengths(scenes.masks[row, k]),
        }
        for k in range(scenes.concepts.shape[1])
    ]


def _image_path(spec: GeneratorSpec, split: str, index: int, class_name: str) -> str:
    if spec.layout == "recognition":
        return f"{split}/{class_name}/{index:05d}.png"
    if spec.layout == "counterfactual":
        edits = painter(spec).EDITS
        return f"{split}/{edits[index % len(edits)]}/{index // len(edits):05d}.png"
    if spec.layout == "objectness":
        return f"images/{index + 1:04d}.jpg"
    number = _image_id(spec, split, index)
    if spec.layout == "pairs":
        return f"{split}/{number:012d}.png"
    return f"{'VG_100K' if split == 'train' else 'VG_100K_2'}/{number}.jpg"


def _image_id(spec: GeneratorSpec, split: str, index: int) -> int:
    """Image numbers start at 1; val goes on where train ends."""
    return index + 1 + (spec.train if split == "val" else 0)


def paint_files(
    spec: GeneratorSpec, split: str, start: int, stop: int
) -> Iterator[tuple[dict[str, Pixels], dict[str, Any]]]:
    """Paint images ``start`` to ``stop``: the files of each, and what the label files need."""
    scenes = painter(spec).paint(spec, split, range(start, stop))
    for row, index in enumerate(range(start, stop)):
        path = _image_path(spec, split, index, painter(spec).class_name(scenes, row))
        files = {path: scenes.images[row]}
        record: dict[str, Any] = {}
        if spec.layout == "objectness":
            mask = scenes.masks[row].any(axis=0)
            files[f"ground_truth_mask/{index + 1:04d}.png"] = mask.astype(np.uint8) * np.uint8(255)
        elif spec.layout == "recognition" and spec.name == "drawings":
            record = {"id": path.removesuffix(".png"), "attributes": painting.attributes_of(scenes, row)}
        elif spec.layout not in ("recognition", "counterfactual"):
            record = {"id": _image_id(spec, split, index), "path": path, "objects": _objects(scenes, row)}
        yield files, record


def _coco(spec: GeneratorSpec, records: list[dict[str, Any]], first: int) -> dict[str, Any]:
    """The content of one ``instances_*.json``; annotation ids count on from ``first``."""
    side = spec.image_size
    annotations: list[dict[str, Any]] = []
    for record in records:
        for thing in record["objects"]:
            annotations.append(
                {
                    "id": first + len(annotations),
                    "image_id": record["id"],
                    "category_id": thing["category"] + 1,
                    "segmentation": {"size": [side, side], "counts": thing["counts"]},
                    "area": thing["area"],
                    "bbox": thing["box"],
                    "iscrowd": 0,
                }
            )
    images = [
        {"id": r["id"], "file_name": Path(r["path"]).name, "width": side, "height": side, "license": 1}
        for r in records
    ]
    return {
        "info": {"description": "comit_bench embedded scenes: pairs", "version": str(FORMAT)},
        "licenses": [{"id": 1, "name": "CC BY 4.0", "url": "https://creativecommons.org/licenses/by/4.0/"}],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name, "supercategory": "drawing" if spec.name == "drawings" else "digit"}
            for number, name in enumerate(painter(spec).categories(), start=1)
        ],
    }


def _visual_genome(spec: GeneratorSpec, records: list[dict[str, Any]]) -> dict[str, Any]:
    """``relationships.json`` and ``image_data.json``; every true relation is listed, both ways."""
    side, number, images, data = spec.image_size, 0, [], []
    for record in records:
        things = record["objects"]
        ends = [
            dict(
                zip("xywh", thing["box"], strict=True),
                object_id=2 * record["id"] - 1 + k,
                name=thing["name"],
                synsets=[],
            )
            for k, thing in enumerate(things)
        ]
        found = []
        for a, b in ((0, 1), (1, 0)):
            for predicate in relations_between(tuple(things[a]["box"]), tuple(things[b]["box"])):
                number += 1
                found.append(
                    {
                        "relationship_id": number,
                        "predicate": predicate,
                        "synsets": [],
                        "subject": ends[a],
                        "object": ends[b],
                    }
                )
        images.append({"image_id": record["id"], "relationships": found})
        data.append(
            {
                "image_id": record["id"],
                "width": side,
                "height": side,
                "url": record["path"],
                "coco_id": None,
                "flickr_id": None,
            }
        )
    return {"relationships.json": images, "image_data.json": data}


def label_files(spec: GeneratorSpec, records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Relative path -> JSON content of everything that is no image."""
    if spec.layout == "pairs":
        first = 1 + 2 * len(records["train"])
        return {
            "annotations/instances_train.json": _coco(spec, records["train"], 1),
            "annotations/instances_val.json": _coco(spec, records["val"], first),
        }
    if spec.layout == "relations":
        lists = {f"splits/{split}.json": [r["id"] for r in records[split]] for split in records}
        return _visual_genome(spec, records["train"] + records["val"]) | lists
    if spec.layout == "recognition" and spec.name == "drawings":
        every = {r["id"]: r["attributes"] for r in records["train"] + records["val"]}
        return {"attributes.json": {"values": painting.attribute_values(), "images": every}}
    return {}


def _caption(spec: GeneratorSpec, scenes: Scenes, row: int, index: int) -> str:
    if spec.layout == "counterfactual":
        edits = painter(spec).EDITS
        return str(edits[index % len(edits)]).replace("_", "\n")
    names = [scenes.name(row, k) for k in range(scenes.concepts.shape[1]) if scenes.boxes[row, k, 2]]
    if spec.layout != "relations":
        return "\n".join(names)
    holds = relations_between(box_of(scenes, row, 0), box_of(scenes, row, 1))
    return f"{names[0]}\n{holds[row % len(holds)]}\n{names[1]}"


# What a contact sheet shows: title, layout, variant, whether masks, lines of captions.
_SHEET = (
    ("recognition", "recognition", "default", False, 1),
    ("recognition\n(hard)", "recognition", "hard", False, 1),
    ("pairs", "pairs", "default", False, 2),
    ("relations", "relations", "default", False, 3),
    ("objectness", "objectness", "default", False, 1),
    ("objectness\nmask", "objectness", "default", True, 0),
    ("counterfactual", "counterfactual", "default", False, 2),
    ("mixture", "mixture", "default", False, 3),
)


def _sheet_rows(name: str) -> list[tuple[str, str, str, bool, int]]:
    if name == "drawings":
        return [row for row in _SHEET if row[2] == "default"]
    return [row for row in _SHEET if row[1] not in ("counterfactual", "mixture")]


def contact_sheet(
    target: Path, *, name: str = "scenes", image_size: int = 32, seed: int = 0, columns: int = 10
) -> None:
    """Write one PNG with labelled val samples of every set, each pixel enlarged without smoothing.

    Raises:
        BenchError: The picture cannot be written.
    """
    rows = _sheet_rows(name)
    zoom = max(1, (96 if name == "scenes" else 128) // image_size)
    cell, left = image_size * zoom, 100
    heights = [cell + 6 + 14 * lines for *_, lines in rows]
    sheet = Image.new("RGB", (left + columns * (cell + 4), sum(heights)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for line, (title, layout, variant, masked, _) in enumerate(rows):
        spec = GeneratorSpec.model_validate(
            {"name": name, "layout": layout, "variant": variant, "seed": seed, "image_size": image_size}
            | {"train": 0, "val": 1001}  # whole scenes of 11 or 13 edits
        )
        # Edits of one scene; elsewhere steps that go through classes and arrangements.
        picks = [k * (1 if layout == "counterfactual" else 13) for k in range(columns)]
        scenes, top = painter(spec).paint(spec, "val", picks), sum(heights[:line])
        pen.text((4, top + cell // 3), title, fill="black", font=font)
        for k in range(columns):
            pixels = scenes.masks[k, 0].astype(np.uint8) * np.uint8(255) if masked else scenes.images[k]
            picture = Image.fromarray(pixels).convert("RGB").resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + k * (cell + 4), top))
            caption = "" if masked else _caption(spec, scenes, k, picks[k])
            pen.text((left + k * (cell + 4), top + cell), caption, fill="black", font=font, spacing=1)
    stream = io.BytesIO()
    sheet.save(stream, format="PNG", optimize=True)
    write_atomic(target, stream.getvalue())
