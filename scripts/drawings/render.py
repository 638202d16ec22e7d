"""Render the atlases of drawings: ``python scripts/drawings/render.py SETS PICTURES``. Development only.

SETS is a folder with the unpacked npm packages ``@iconify-json/<set>`` (any folder below it that holds
icons.json, info.json and package.json), PICTURES the folder ``skimage/data`` of scikit-image 0.26.0.
Needs resvg-py (0.5.0 made the shipped files) and pyoxipng (9.1.1; it changes the size of the files,
never their pixels). Everything is rendered large, cropped tight, shrunk with an averaging filter on
premultiplied values and centred in its cell; the same inputs and versions give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import oxipng
import resvg_py
import yaml
from PIL import Image

HERE = Path(__file__).resolve().parent
TARGET = HERE.parents[1] / "comit_bench" / "data" / "scenes" / "atlas"
CELL, COLUMNS = 64, 16
LARGE = 512  # pixels a drawing is rendered at before it is cropped
BUDGET = 5_850_000  # bytes of all files; the sentence vectors and the index need the rest of 6 MB

PICTURES = {
    "coffee.png": {"author": "Rachel Michetti, courtesy of Pikolo Espresso Bar", "licence": "CC0-1.0"},
    "rocket.jpg": {"author": "SpaceX", "licence": "LicenseRef-public-domain"},
    "hubble_deep_field.jpg": {"author": "NASA", "licence": "LicenseRef-public-domain"},
    "brick.png": {"author": "CC0Textures", "licence": "CC0-1.0"},
    "grass.png": {"author": "linolafett", "licence": "CC0-1.0"},
    "gravel.png": {"author": "CC0Textures", "licence": "CC0-1.0"},
}
# Regions for train and val: left, top, right, bottom in the picture. They share no column, and the
# region between those of the rocket is the rocket (one of the concepts).
REGIONS = {
    "coffee.png": ((0, 0, 360, 400), (360, 0, 600, 400)),
    "rocket.jpg": ((0, 0, 290, 427), (372, 0, 640, 427)),
    "hubble_deep_field.jpg": ((0, 0, 360, 400), (360, 0, 600, 400)),
    "brick.png": ((0, 0, 307, 342), (307, 0, 512, 342)),
    "grass.png": ((0, 0, 307, 342), (307, 0, 512, 342)),
    "gravel.png": ((0, 0, 307, 342), (307, 0, 512, 342)),
}
PHOTO_ROWS = 192


class IconSet:
    """One unpacked npm package: SVG bodies by name, with aliases."""

    def __init__(self, folder: Path) -> None:
        self.data = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        self.package = json.loads((folder / "package.json").read_text(encoding="utf-8"))
        self.licence = json.loads((folder / "info.json").read_text(encoding="utf-8"))["license"]
        metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        self.categories: dict[str, list[str]] = metadata.get("categories", {})

    def __contains__(self, name: str) -> bool:
        return name in self.data["icons"] or name in self.data.get("aliases", {})

    def icon(self, name: str) -> dict[str, Any]:
        """Body, size and offset of an icon; an alias takes what it does not say from its parent."""
        if name in self.data["icons"]:
            return dict(self.data["icons"][name])
        alias = self.data["aliases"][name]
        return self.icon(alias["parent"]) | {key: value for key, value in alias.items() if key != "parent"}

    def render(self, name: str) -> np.ndarray:
        """[64, 64, 4] premultiplied RGBA, longer side 64, centred."""
        icon = self.icon(name)
        width, height = (icon.get(side, self.data.get(side, 16)) for side in ("width", "height"))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=LARGE, height=LARGE, skip_system_fonts=True))
        large = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).astype(np.float32)
        large[..., :3] *= large[..., 3:] / 255.0
        return _fitted(large)


def _fitted(large: np.ndarray) -> np.ndarray:
    """Crop premultiplied RGBA tight and shrink it into a cell."""
    solid = large[..., 3] > 12
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    tight = large[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = CELL / max(tight.shape[:2])
    height, width = (max(1, round(side * scale)) for side in tight.shape[:2])
    cell = np.zeros((CELL, CELL, 4), np.float32)
    top, left = (CELL - height) // 2, (CELL - width) // 2
    for channel in range(4):  # Hamming: weights are never negative, so rgb stays below alpha
        shrunk = Image.fromarray(tight[..., channel]).resize((width, height), Image.Resampling.HAMMING)
        cell[top : top + height, left : left + width, channel] = np.asarray(shrunk)
    whole = np.floor(cell + 0.5).clip(0, 255).astype(np.uint8)
    whole[..., :3] = np.minimum(whole[..., :3], whole[..., 3:])
    return whole


def _named(icons: IconSet, vendor: str, concept: str, entry: dict[str, list[str]]) -> list[str]:
    """What a set calls a concept: every name listed for it, or the first of ``any`` that it has."""
    if vendor in entry:
        missing = [name for name in entry[vendor] if name not in icons]
        if missing:
            sys.exit(f"{vendor}: no drawing {missing[0]!r} for the concept {concept!r}")
        return entry[vendor]
    found = [name for name in entry.get("any", [concept]) if name in icons][:1]
    if not found:
        sys.exit(f"{vendor}: no drawing for the concept {concept!r}")
    return found


def _others(icons: IconSet, categories: list[str], words: set[str]) -> list[str]:
    """Names of drawings without a label, sorted."""
    names = {name for category in categories for name in icons.categories[category]}
    return sorted(
        name
        for name in names & set(icons.data["icons"])
        if not any(f"-{word}-" in f"-{name}-" for word in words) and not set(name.split("-")) & {"1st", "2nd"}
    )


def _png(image: Image.Image) -> bytes:
    plain = io.BytesIO()
    image.save(plain, "PNG")
    return oxipng.optimize_from_memory(plain.getvalue(), level=4, strip=oxipng.StripChunks.all())


def _atlas(cells: list[np.ndarray]) -> bytes:
    rows = -(-len(cells) // COLUMNS)
    sheet = np.zeros((rows * CELL, COLUMNS * CELL, 4), np.uint8)
    for number, cell in enumerate(cells):
        row, column = divmod(number, COLUMNS)
        sheet[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = cell
    return _png(Image.fromarray(sheet, "RGBA"))


def _photos(folder: Path, target: Path) -> list[dict[str, Any]]:
    """Write two files per picture, one per split; entries of the index."""
    entries = []
    (target / "photos").mkdir(parents=True, exist_ok=True)
    for name, facts in PICTURES.items():
        picture = Image.open(folder / name)
        picture = picture.convert("L" if picture.mode == "L" else "RGB")
        for split, box in zip(("train", "val"), REGIONS[name], strict=True):
            crop = picture.crop(box)
            size = (round(crop.width * PHOTO_ROWS / crop.height), PHOTO_ROWS)
            content = _png(crop.resize(size, Image.Resampling.HAMMING))
            file = f"photos/{Path(name).stem}-{split}.png"
            (target / file).write_bytes(content)
            entries.append({"file": file, "split": split, **facts, "sha256": sha256(content).hexdigest()})
    return entries


def _vendors(
    listed: dict[str, Any], sets: dict[str, IconSet]
) -> tuple[dict[str, list[dict[str, Any]]], dict[tuple[str, str], np.ndarray]]:
    """Entries of every vendor with its labelled drawings, and all cells by vendor and name."""
    entries: dict[str, list[dict[str, Any]]] = {}
    cells: dict[tuple[str, str], np.ndarray] = {}
    for vendor in listed["vendors"]:
        entries[vendor] = []
        for concept, entry in sorted(listed["concepts"].items()):
            for name in _named(sets[vendor], vendor, concept, entry):
                entries[vendor].append({"name": name, "concept": concept})
                cells[vendor, name] = sets[vendor].render(name)
    return entries, cells


def _add_others(
    listed: dict[str, Any],
    sets: dict[str, IconSet],
    entries: dict[str, list[dict[str, Any]]],
    cells: dict[tuple[str, str], np.ndarray],
    count: int,
) -> None:
    """Add drawings without a label: the ``count`` names that most vendors draw, by all who draw them."""
    words = {word for line in listed["without"] for word in line.split()}
    offered = {
        vendor: _others(sets[vendor], facts["categories"], words)
        for vendor, facts in listed["vendors"].items()
        if "categories" in facts
    }
    drawn_by = Counter(name for names in offered.values() for name in names)
    chosen = sorted(drawn_by, key=lambda name: (-drawn_by[name], name))[:count]
    seen = {cell.tobytes() for cell in cells.values()}
    for vendor, names in offered.items():
        for name in sorted(set(chosen) & set(names)):
            cell = sets[vendor].render(name)
            if (content := cell.tobytes()) not in seen:
                seen.add(content)
                entries[vendor].append({"name": name, "concept": None})
                cells[vendor, name] = cell


def main() -> None:
    """Render everything and write the index."""
    parser = argparse.ArgumentParser(prog="render", description=__doc__)
    parser.add_argument("sets", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument("--others", type=int, default=400, help="names of drawings without a label")
    given = parser.parse_args()
    listed = yaml.safe_load((HERE / "drawings.yaml").read_text(encoding="utf-8"))
    folders = {
        json.loads(path.read_text(encoding="utf-8"))["name"]: path.parent
        for path in sorted(given.sets.rglob("package.json"))
    }
    sets = {
        vendor: IconSet(folders[f"@iconify-json/{facts['set']}"])
        for vendor, facts in listed["vendors"].items()
    }
    for vendor, facts in listed["vendors"].items():
        said = sets[vendor].licence["spdx"]
        if said != facts["licence"]:
            sys.stderr.write(f"{vendor}: the package says {said}, the list {facts['licence']}\n")
    given.out.mkdir(parents=True, exist_ok=True)
    photos = _photos(given.pictures, given.out)
    entries, cells = _vendors(listed, sets)
    _add_others(listed, sets, entries, cells, given.others)
    vendors = []
    for vendor, facts in listed["vendors"].items():
        content = _atlas([cells[vendor, entry["name"]] for entry in entries[vendor]])
        file = f"{vendor}.png"
        (given.out / file).write_bytes(content)
        drawings = [entry | {"cell": cell} for cell, entry in enumerate(entries[vendor])]
        kept = {key: facts[key] for key in ("title", "author", "licence", "homepage", "split")}
        package = {"package": sets[vendor].package["name"], "version": sets[vendor].package["version"]}
        digest = {"file": file, "sha256": sha256(content).hexdigest()}
        vendors.append({"name": vendor, **kept, **package, **digest, "drawings": drawings})
        sys.stderr.write(f"{vendor}: {len(drawings)} drawings, {len(content):,} bytes\n")
    index = {"cell": CELL, "columns": COLUMNS, "photos": photos, "vendors": vendors}
    text = re.sub(r"\n {5,}| *\n {4}(?=})", " ", json.dumps(index, indent=1))  # one line per drawing
    (given.out / "index.json").write_text(text + "\n", encoding="utf-8")
    total = sum(path.stat().st_size for path in given.out.rglob("*") if path.is_file())
    sys.stderr.write(f"{total:,} bytes in all\n")
    if total > BUDGET:
        sys.exit(f"more than {BUDGET:,} bytes: take fewer --others")


if __name__ == "__main__":
    main()
