"""Pictures of a data set: histograms of what is in it, and ten random samples with their labels."""

from __future__ import annotations

import io
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from comit_bench.data.images import read_mask, whole_image, whole_mask
from comit_bench.data.readers.visual_genome import Region
from comit_bench.data.split import OpenData, Split
from comit_bench.errors import BenchError, CorruptFileError
from comit_bench.files import write_atomic
from comit_bench.seeding import generator_for

TOP = 30  # bars of one histogram
SAMPLES = 10
MOST = 3  # relations of an image that are named and drawn
SAMPLE_SIDE = 256
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44")


def counts_of(data: OpenData, split: Split) -> dict[str, Counter[str]]:
    """What there is to count in a split, by heading: classes; categories and pairs; predicates and words."""
    if data.kind == "classes":
        numbers = np.bincount(split.labels, minlength=len(data.classes)).tolist()
        return {"images per class": Counter(dict(zip(data.classes, numbers, strict=True)))}
    if data.kind == "multilabel":
        numbers = split.labels.sum(axis=0).tolist()
        names = {c: n for c, n in zip(data.classes, numbers, strict=True) if n}
        pairs = Counter(" + ".join(data.classes[c] for c in np.flatnonzero(row)) for row in split.labels)
        return {"images per category": Counter(names), "images per pair": pairs}
    if data.kind == "relations":
        table = split.labels.table
        verbs = Counter(data.predicates[i] for i in table[:, 2].tolist())
        words = Counter(data.classes[i] for i in table[:, [1, 3]].ravel().tolist())
        return {"relations per predicate": verbs, "relations per word": words}
    return {"salient share of the image": Counter(_coverage(split))}


def _coverage(split: Split) -> list[str]:
    """For every mask, the tenth of the image that is salient, e.g. ``10-20 %``."""
    names = []
    for path in split.labels:
        try:
            tenth = min(int(read_mask(path).share * 10), 9)
            names.append(f"{tenth * 10:02d}-{tenth * 10 + 10} %")
        except CorruptFileError:
            names.append("cannot be read")
    return names


def write_histograms(data: OpenData, target: Path) -> Path:
    """One PNG with a row of histograms per heading: the most frequent entries, and all counts by rank."""
    counted = {name: counts_of(data, split) for name, split in data.splits.items() if len(split)}
    headings = list(dict.fromkeys(h for counts in counted.values() for h in counts))
    figure = Figure(figsize=(15, 1.2 + 4.6 * len(headings)), layout="constrained")
    axes = figure.subplots(len(headings), 2, squeeze=False, width_ratios=[3, 1])
    for row, heading in enumerate(headings):
        _bars(axes[row][0], heading, {name: counts[heading] for name, counts in counted.items()})
        for number, (name, counts) in enumerate(counted.items()):
            values = sorted((n for n in counts[heading].values() if n), reverse=True)
            axes[row][1].plot(range(1, len(values) + 1), values, label=name, color=COLOURS[number % 4])
        _scale(axes[row][1], [n for counts in counted.values() for n in counts[heading].values() if n])
    sizes = ", ".join(f"{name} {len(split):,}" for name, split in data.splits.items())
    figure.suptitle(f"{data.name} v{data.version}: {sizes} images", fontweight="bold")
    return _save(figure, target)


def _scale(axes: Any, values: list[int]) -> None:
    """Logarithmic only where counts differ by more than a factor of 20."""
    axes.set(xlabel="rank", title="all, by rank")
    if values and max(values) > 20 * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.05 * max(values, default=1))
    axes.legend(frameon=False)


def _bars(axes: Any, heading: str, counts: dict[str, Counter[str]]) -> None:
    total: Counter[str] = sum(counts.values(), Counter())
    ordered = sorted(total, key=lambda name: (-total[name], name))
    names = sorted(ordered) if heading.startswith("salient") else ordered[:TOP]
    places, width = np.arange(len(names)), 0.8 / len(counts)
    for number, (split, found) in enumerate(counts.items()):
        heights = [found[name] for name in names]
        axes.bar(places + number * width, heights, width, label=split, color=COLOURS[number % 4])
    shown = f" ({TOP} most frequent of {len(ordered):,})" if len(ordered) > TOP and len(names) == TOP else ""
    axes.set_title(heading + shown, loc="left")
    axes.set_xticks(places + 0.4 - width / 2, [textwrap.shorten(n, 28, placeholder="…") for n in names])
    axes.tick_params(axis="x", rotation=60)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right")
        label.set_rotation_mode("anchor")
    axes.legend(frameon=False, ncols=len(counts), loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0)
    axes.margins(x=0.01)


def caption(data: OpenData, split: Split, row: int, *, most: int = MOST) -> str:
    """What a sample's labels say."""
    if data.kind == "classes":
        return data.classes[int(split.labels[row])]
    if data.kind == "multilabel":
        return " + ".join(data.classes[c] for c in np.flatnonzero(split.labels[row]))
    if data.kind == "relations":
        texts = [" ".join(words) for words in relations_of(data, split, row)]
        more = [f"... {len(texts) - most} more"] if len(texts) > most else []
        return "\n".join(texts[:most] + more)
    return "image and mask"


def relations_of(data: OpenData, split: Split, row: int) -> list[tuple[str, str, str]]:
    """The relations of an image as words."""
    table = split.labels.table
    start, stop = np.searchsorted(table[:, 0], [row, row + 1]).tolist()
    return [(data.classes[s], data.predicates[p], data.classes[o]) for _, s, p, o in table[start:stop]]


def relations_shown(data: OpenData, split: Split, *, seed: int) -> dict[str, list[tuple[str, str, str]]]:
    """Image id -> the relations that the contact sheet names, of the images that it shows."""
    return {split.ids[row]: relations_of(data, split, row)[:MOST] for row in choose(split, seed=seed)}


def choose(split: Split, *, seed: int, count: int = SAMPLES) -> list[int]:
    """Random rows, in ascending order."""
    order = torch.randperm(len(split), generator=generator_for(seed, f"show/{split.name}"))
    return sorted(order[:count].tolist())


def write_samples(
    data: OpenData,
    target: Path,
    *,
    split: str | None = None,
    seed: int = 0,
    regions: Mapping[str, Sequence[Region]] | None = None,
) -> Path:
    """One PNG with ten random samples, their ids and labels. Broken images are shown as such.

    Args:
        data: The opened data set.
        target: The PNG.
        split: Which split; None: the last one (val).
        seed: Another seed shows others.
        regions: Image id -> relations with their boxes, which are drawn.
    """
    chosen = data.splits[split if split is not None else list(data.splits)[-1]]
    rows = choose(chosen, seed=seed)
    figure = Figure(figsize=(16, 8.2), layout="constrained")
    for place, axes in enumerate(figure.subplots(2, SAMPLES // 2).ravel()):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if place >= len(rows):
            continue
        row = rows[place]
        picture = _picture(data, chosen, row)
        if isinstance(picture, str):
            axes.text(0.5, 0.5, textwrap.fill(picture, 30), ha="center", va="center", color="crimson")
        else:
            small = max(picture.shape[:2]) <= SAMPLE_SIDE // 2
            axes.imshow(picture, interpolation="nearest" if small else "antialiased")
            _draw(axes, (regions or {}).get(chosen.ids[row], ()), picture.shape)
        lines = [
            textwrap.shorten(line, 34, placeholder="…") for line in caption(data, chosen, row).split("\n")
        ]
        axes.set_title("\n".join(lines), fontsize=11)
        axes.set_xlabel(chosen.ids[row][-40:], fontsize=8, color="0.4")
    title = f"{data.name} v{data.version}, split {chosen.name}: {len(rows)} of {len(chosen):,}"
    figure.suptitle(title, fontweight="bold")
    return _save(figure, target)


def _draw(axes: Any, regions: Sequence[Region], shape: tuple[int, ...]) -> None:
    """Boxes of subjects (full lines) and objects (broken lines) with their words, a colour per relation."""
    height, width = shape[:2]
    for number, region in enumerate(regions):
        colour = COLOURS[number % len(COLOURS)]
        ends = zip(region.boxes, (region.words[0], region.words[2]), ("-", "--"), strict=True)
        for (x, y, w, h), word, line in ends:
            corner = (x * width - 0.5, y * height - 0.5)
            axes.add_patch(Rectangle(corner, w * width, h * height, fill=False, lw=2, ls=line, ec=colour))
            at = (min(max(corner[0], 0), width - 1), min(max(corner[1], 0), height - 1))
            box = {"fc": colour, "ec": "none", "pad": 1, "alpha": 0.8}
            text = axes.text(*at, word, color="white", fontsize=8, va="top", bbox=box, clip_on=True)
            text.set_in_layout(False)
    if regions:
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def _picture(data: OpenData, split: Split, row: int) -> Any:
    """uint8 [H, W, 3], or why there is none; a mask stands beside its image."""
    try:
        picture = Image.fromarray(whole_image(split.paths, row, exif=split.exif))
        if max(picture.size) > SAMPLE_SIDE:
            picture.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
        if data.kind == "masks":
            pixels = whole_mask(split.paths[row], split.labels[row], exif=split.exif)
            mask = Image.fromarray(pixels).resize(picture.size, Image.Resampling.NEAREST).convert("RGB")
            gap = np.full((picture.height, max(1, picture.width // 16), 3), 255, dtype=np.uint8)
            return np.concatenate([np.asarray(picture), gap, np.asarray(mask)], axis=1)
        return np.asarray(picture)
    except BenchError as error:
        return f"cannot be read: {error}"


def _save(figure: Any, target: Path) -> Path:
    stream = io.BytesIO()
    try:
        figure.savefig(stream, format="png", dpi=80)
    except (ValueError, RuntimeError) as error:
        raise BenchError(f"{target}: cannot draw the picture ({error})") from error
    write_atomic(target, stream.getvalue())
    return target


def summary(data: OpenData) -> Sequence[tuple[str, str]]:
    """Rows of a table: what there is, split by split."""
    rows = [("kind", data.kind), ("folder", str(data.folder)), ("fingerprint", data.fingerprint)]
    rows += [(f"images in {name}", f"{len(split):,}") for name, split in data.splits.items()]
    rows.append(("classes", f"{sum(not c.startswith('(unused') for c in data.classes):,}"))
    if data.predicates:
        rows.append(("predicates", f"{len(data.predicates):,}"))
    for name, split in data.splits.items():
        for heading, counts in counts_of(data, split).items() if data.kind != "masks" else ():
            rows.append((f"{name}: {heading}", f"{sum(n > 0 for n in counts.values()):,} different, "
                         f"{sum(counts.values()):,} in all"))  # fmt: skip
    rows += [(f"note: {key}", _plain(value)) for key, value in data.notes.items()]
    return rows


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_plain(v)}" for k, v in value.items()) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
