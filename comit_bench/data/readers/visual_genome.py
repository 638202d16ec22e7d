"""The reader ``visual-genome``: relations between objects, streamed from ``relationships.json``.

The file is 0.7 to 1 GB: it is parsed entry by entry (ijson), and of every relation four numbers are kept.
What happens to a relation, in this order (paper, Appendix B.4; the order and the ties are ours):

1. words in lower case, single spaces, of several ``names`` the first that is not empty; then replaced by the
   first entry of their line in ``object_alias.txt`` or ``relationship_alias.txt``;
2. images are split by a hash of their id, or by lists of ids;
3. the area filter: a box, clipped to the image, must cover ``min_area`` of it;
4. vocabularies: the most frequent words of the train images' remaining relations, one vocabulary for
   subjects and objects together and one for predicates, ties in alphabetical order;
5. relations with a word outside of them are dropped, then images without any relation;
6. words of a vocabulary whose most frequent synset (WordNet) is the same are noted as synonyms: "on" said of
   an image makes "upon" no negative for it.
"""

from __future__ import annotations

import logging
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from comit_bench.data.manifests import Manifest, rows_from
from comit_bench.data.readers.common import check_file, find_file, whole_number
from comit_bench.data.splitting import holdout
from comit_bench.errors import BenchError, CorruptFileError, MissingError
from comit_bench.recipes.reading import parse_json, read_text
from comit_bench.recipes.specs import DatasetSpec

_log = logging.getLogger(__name__)

FILES = {
    "relationships": ("relationships.json", "relationships_v1_4.json", "relationships_v1_2.json"),
    "image_data": ("image_data.json",),
    "object_alias": ("object_alias.txt",),
    "relationship_alias": ("relationship_alias.txt",),
}
BASES = (".", "images", "images2")
DEEPEST = 5000  # brackets within brackets
GIVEN = "ids of "  # prefix of the sources that list image ids
SYNSET = re.compile(r"[^\s'\",\[\]]+\.[a-z]\.\d+")  # shirt.n.01


def sources(spec: DatasetSpec, folder: Path) -> dict[str, Path]:
    """Annotation files, alias files that exist, and lists of ids when the recipe names some."""
    found = {}
    for what, names in FILES.items():
        candidates = spec.labels.get(what, names)
        if what in ("relationships", "image_data"):
            found[what] = find_file(spec, folder, f"{what}.json", candidates)
        elif spec.relations.aliases:
            there = next((folder / name for name in candidates if (folder / name).is_file()), None)
            if there is not None:
                found[what] = there
    for split, candidates in spec.splits.items():
        if candidates:
            found[GIVEN + split] = find_file(spec, folder, f"list of ids for {split!r}", candidates)
    return found


def folder_names(spec: DatasetSpec) -> tuple[str, ...]:
    """The image folders that urls name."""
    return spec.images.get("folders", ("VG_100K", "VG_100K_2"))


def places(spec: DatasetSpec, folder: Path) -> dict[str, Path]:
    """Directory of every image folder that occurs in urls: ``VG_100K``, ``VG_100K_2``."""
    bases = spec.images.get("bases", BASES)
    found = {}
    for name in folder_names(spec):
        for base in bases:
            if (folder / base / name).is_dir():
                found[name] = folder / base / name
                break
    if not found:
        raise MissingError(
            f"dataset {spec.name}: {folder} has no images: looked for VG_100K/ and VG_100K_2/ there and in "
            f"{' and '.join(b + '/' for b in bases if b != '.')}. "
            f"`comit-bench data download {spec.name}` fetches them."
        )
    return found


@dataclass(slots=True)
class _Words:
    """Texts as numbers."""

    aliases: dict[str, str]
    number: dict[str, int] = field(default_factory=dict)
    raw: dict[str, int] = field(default_factory=dict)  # as written in the file -> number
    synsets: Counter[tuple[int, str]] = field(default_factory=Counter)  # number and synset -> occurrences

    def __call__(self, text: str, synsets: Any = None) -> int:
        """The number of a text; -1 for an empty one. ``synsets`` are what the file says of it there."""
        found = self.raw.get(text)
        if found is None:
            plain = _canonical(text, self.aliases)
            found = self.number.setdefault(plain, len(self.number)) if plain else -1
            self.raw[text] = found
        if synsets and (named := SYNSET.search(str(synsets))):
            self.synsets[found, named[0]] += 1
        return found

    @property
    def texts(self) -> list[str]:
        return list(self.number)

    def synonyms(self, chosen: Sequence[int]) -> list[list[str]]:
        """Groups of the chosen words, by number, that are mostly used in the same sense."""
        most: dict[int, tuple[int, str]] = {}
        for (number, synset), count in self.synsets.items():
            most[number] = min(most.get(number, (0, "")), (-count, synset))
        texts, groups = self.texts, dict[str, list[str]]()
        for number in chosen:
            if number in most:
                groups.setdefault(most[number][1], []).append(texts[number])
        return [group for group in groups.values() if len(group) > 1]


@dataclass(slots=True)
class _Relations:
    """All relations of the file as parallel columns."""

    image: array[int] = field(default_factory=lambda: array("q"))
    subject: array[int] = field(default_factory=lambda: array("i"))
    predicate: array[int] = field(default_factory=lambda: array("i"))
    object: array[int] = field(default_factory=lambda: array("i"))
    large: array[int] = field(default_factory=lambda: array("b"))


def normalise(text: str) -> str:
    """Lower case, single spaces, none at the ends."""
    return " ".join(text.lower().split())


def read_aliases(path: Path | None) -> dict[str, str]:
    """Word -> canonical word, from a file with one comma-separated group per line, first entry canonical.

    A word counts where it first occurs; a canonical word that an earlier line replaces is replaced too.
    """
    if path is None:
        return {}
    try:
        lines = read_text(path).splitlines()
    except CorruptFileError as error:
        raise CorruptFileError(f"{path}: not a list of aliases ({error})") from error
    first: dict[str, str] = {}
    for line in lines:
        group = [word for word in map(normalise, line.split(",")) if word]
        for word in group:
            first.setdefault(word, group[0])
    final = {}
    for word in first:
        end, seen = first[word], {word}
        while end not in seen:
            seen.add(end)
            end = first[end]
        final[word] = end
    return {word: end for word, end in final.items() if word != end}


class _Shallow:
    """A stream that refuses brackets within brackets without end, over which ijson would take for ever."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream, self.path, self.depth = stream, path, 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes. Brackets inside of texts count too; there are never thousands of them alone."""
        block = self.stream.read(size)
        values = np.frombuffer(block, dtype=np.uint8)
        opened, closed = (values == 91) | (values == 123), (values == 93) | (values == 125)
        levels = self.depth + np.cumsum(opened.astype(np.int64) - closed)
        if len(levels):
            self.depth = int(levels[-1])
            if int(levels.max()) > DEEPEST:
                raise CorruptFileError(f"{self.path}: not valid JSON: nested too deeply")
        return block


def _items(path: Path) -> Iterator[dict[str, Any]]:
    """Entries of a JSON list, one at a time."""
    try:
        with path.open("rb") as stream:
            count = 0
            for item in ijson.items(_Shallow(stream, path), "item", use_float=True):
                count += 1
                yield item
            if count == 0:
                raise CorruptFileError(f"{path}: holds no entries; expected a list of images")
    except (ijson.JSONError, ValueError, OSError) as error:
        if isinstance(error, BenchError):
            raise
        raise CorruptFileError(
            f"{path}: damaged or cut short ({error}). Replace it by an intact copy."
        ) from error


def _image_number(item: dict[str, Any]) -> int:
    return whole_number(item["image_id"] if "image_id" in item else item["id"])


def _images(path: Path) -> dict[int, tuple[int, int, str, bool]]:
    """Image id -> width, height, ``<folder>/<file>`` from its url, whether MSCOCO has it."""
    found = {}
    for item in _items(path):
        try:
            number = _image_number(item)
            place = check_file("/".join(str(item["url"]).split("?")[0].split("/")[-2:]))
            width, height = whole_number(item["width"]), whole_number(item["height"])
            found[number] = (width, height, place, item.get("coco_id") is not None)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CorruptFileError(
                f"{path}: an entry is not an image ({error!r}): {str(item)[:200]}"
            ) from error
    return found


def _text(value: Any) -> str:
    """A name that may be a list of names."""
    if isinstance(value, list | tuple):
        return next((str(v) for v in value if str(v).strip()), "")
    return "" if value is None else str(value)


def _name(end: dict[str, Any]) -> str:
    return _text(end.get("name")) or _text(end.get("names"))


def _covers(box: dict[str, Any], width: int, height: int) -> float:
    """Share of the image that a box covers once clipped to it."""
    x, y, w, h = (float(box[k]) for k in "xywh")
    across = min(x + w, width) - max(x, 0.0)
    down = min(y + h, height) - max(y, 0.0)
    return max(across, 0.0) * max(down, 0.0) / (width * height)


def counted(manifest: Manifest, samples: dict[str, int]) -> dict[str, int]:
    """Images that ``image_data.json`` lists; those of the relations' file where it has far fewer entries."""
    listed, entries = (int(manifest.notes["counts"][key]) for key in ("images", "entries"))
    return {"images": listed if entries >= 0.9 * listed else entries}


def build(spec: DatasetSpec, found: dict[str, Path], *, progress: bool) -> Manifest:
    """Read, filter and split the relations."""
    rules = spec.relations
    if rules.aliases and not {"object_alias", "relationship_alias"} <= found.keys():
        _log.warning("%s: alias files are not there; words stay as they are written", spec.name)
    pictures = _images(found["image_data"])
    objects = _Words(read_aliases(found.get("object_alias")))
    predicates = _Words(read_aliases(found.get("relationship_alias")))
    table, counts = _stream(spec, found["relationships"], pictures, objects, predicates, progress)
    sides, split_notes = _sides(spec, found, pictures)
    counts |= {"images": len(pictures), "images_in_no_split": len(pictures) - len(sides)}
    image = np.frombuffer(table.image, dtype=np.int64) if table.image else np.empty(0, dtype=np.int64)
    columns = [np.array(c, dtype=np.int64) for c in (table.subject, table.predicate, table.object)]
    large = np.array(table.large, dtype=np.bool_)
    names = list(dict.fromkeys([*spec.splits, "train", "val"]))
    side = np.array([names.index(sides[i]) if i in sides else -1 for i in image.tolist()], dtype=np.int64)
    train = (side == names.index("train")) & large
    words = _frequent(np.concatenate([columns[0][train], columns[2][train]]), objects.texts, rules.words)
    verbs = _frequent(columns[1][train], predicates.texts, rules.predicates)
    if not words or not verbs:
        raise CorruptFileError(
            f"{found['relationships']}: no relation of a train image passes the filter "
            f"(boxes of at least {rules.min_area:.0%} of the image), so there are no vocabularies"
        )
    lookup_word = _lookup(words, len(objects.number))
    lookup_verb = _lookup(verbs, len(predicates.number))
    labels = np.stack(
        [lookup_word[columns[0]], lookup_verb[columns[1]], lookup_word[columns[2]], large], axis=1
    )
    inside = (labels[:, :3] >= 0).all(axis=1) & (side >= 0)
    counts |= {
        "small_boxes": int((~large).sum()),
        "outside_vocabulary": int((large & ~inside & (side >= 0)).sum()),
    }
    splits = {
        name: _rows(image, labels, inside & (side == number), pictures)
        for number, name in enumerate(names)
        if name in spec.splits
    }
    counts["images_without_a_relation"] = len(sides) - sum(len(rows.ids) for rows in splits.values())
    notes = {
        "counts": counts,
        "split": split_notes,
        "aliases": {"object": len(objects.aliases), "predicate": len(predicates.aliases)},
        "vocabulary": {"words": len(words), "predicates": len(verbs)},
        "images": {name: len(rows.ids) for name, rows in splits.items()},
        "relations": {name: int(rows.values[:, 3].sum()) for name, rows in splits.items()},
    }
    if rules.synsets:
        groups = {"words": objects.synonyms(words), "predicates": predicates.synonyms(verbs)}
        notes |= {"synonyms": groups} if any(groups.values()) else {}
    texts, verb_texts = objects.texts, predicates.texts
    manifest = Manifest(
        "relations", tuple(texts[i] for i in words), tuple(verb_texts[i] for i in verbs), splits, notes
    )
    verify(spec, manifest, str(found["relationships"]))
    return manifest


def verify(spec: DatasetSpec, manifest: Manifest, where: str) -> None:
    """Check from the samples alone that no id is in two splits and that every sample has a relation.

    One photograph under two ids is found later, by what its files hold.
    """
    seen: dict[str, str] = {}
    for name, rows in manifest.splits.items():
        for image in rows.ids:
            if seen.setdefault(image, name) != name:
                raise CorruptFileError(f"{where}: image {image} is in {seen[image]} and in {name}")
        kept = np.add.reduceat(rows.values[:, 3], rows.offsets[:-1]) if len(rows.ids) else np.empty(0)
        if (np.diff(rows.offsets) == 0).any() or (kept == 0).any():
            raise CorruptFileError(f"{where}: split {name!r} has an image without relations")


def _stream(
    spec: DatasetSpec,
    path: Path,
    pictures: dict[int, tuple[int, int, str, bool]],
    objects: _Words,
    predicates: _Words,
    progress: bool,
) -> tuple[_Relations, dict[str, int]]:
    """Read ``relationships.json`` entry by entry."""
    table = _Relations()
    rule = all if spec.relations.area_of == "both" else any
    counts = dict.fromkeys(("entries", "relations", "unnamed", "unknown_images"), 0)
    for item in tqdm(
        _items(path), "relationships", unit=" images", delay=1.0, leave=False, disable=not progress
    ):
        try:
            number = _image_number(item)
            found = item["relationships"]
            counts["entries"] += 1
            counts["relations"] += len(found)
            if number not in pictures or pictures[number][0] * pictures[number][1] <= 0:
                counts["unknown_images"] += 1
                continue
            width, height = pictures[number][:2]
            for relation in found:
                ends = (relation["subject"], relation["object"])
                a, b = (objects(_name(end), end.get("synsets")) for end in ends)
                p = predicates(_text(relation["predicate"]), relation.get("synsets"))
                if min(a, b, p) < 0:
                    counts["unnamed"] += 1
                    continue
                table.image.append(number)
                table.subject.append(a)
                table.predicate.append(p)
                table.object.append(b)
                table.large.append(
                    rule(_covers(end, width, height) >= spec.relations.min_area for end in ends)
                )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CorruptFileError(
                f"{path}: an entry is not as expected ({error!r}): {str(item)[:200]}"
            ) from error
    return table, counts


@dataclass(frozen=True, slots=True)
class Region:
    """A relation with the places of its two ends.

    Attributes:
        words: Subject, predicate and object.
        boxes: Of subject and object: left, top, width and height as shares of the image.
    """

    words: tuple[str, str, str]
    boxes: tuple[tuple[float, ...], tuple[float, ...]]


def regions(
    spec: DatasetSpec, folder: Path, wanted: Mapping[str, Sequence[tuple[str, str, str]]]
) -> dict[str, list[Region]]:
    """Boxes of some relations of some images, read from the annotation files again.

    Args:
        spec: The data set's recipe.
        folder: Where it lies.
        wanted: Image id -> its relations, as words.

    Returns:
        Image id -> first occurrences that pass the area filter, in the order asked for.
    """
    found = sources(spec, folder)
    pictures = _images(found["image_data"])
    things, verbs = (read_aliases(found.get(what)) for what in ("object_alias", "relationship_alias"))
    rule = all if spec.relations.area_of == "both" else any
    left = {int(name): set(words) for name, words in wanted.items()}
    held: dict[str, list[Region]] = {name: [] for name in wanted}
    for item in _items(found["relationships"]):
        number = _image_number(item)
        if number not in left or number not in pictures:
            continue
        width, height = pictures[number][:2]
        for relation in item["relationships"]:
            ends = (relation["subject"], relation["object"])
            a, b = (_canonical(_name(end), things) for end in ends)
            words = (a, _canonical(_text(relation["predicate"]), verbs), b)
            large = rule(_covers(end, width, height) >= spec.relations.min_area for end in ends)
            if large and words in left[number]:
                left[number].remove(words)
                boxes = [
                    tuple(float(end[k]) / size for k, size in zip("xywh", (width, height) * 2, strict=True))
                    for end in ends
                ]
                held[f"{number:07d}"].append(Region(words, (boxes[0], boxes[1])))
        del left[number]
        if not left:
            break
    return {
        name: sorted(found_here, key=lambda region: wanted[name].index(region.words))
        for name, found_here in held.items()
    }


def _canonical(text: str, aliases: Mapping[str, str]) -> str:
    plain = normalise(text)
    return aliases.get(plain, plain)


def _sides(
    spec: DatasetSpec, found: dict[str, Path], pictures: dict[int, tuple[int, int, str, bool]]
) -> tuple[dict[int, str], dict[str, Any]]:
    """Image id -> split, for the images that are in one, and what to note about it."""
    rules, numbers = spec.relations, sorted(pictures)
    lists = {name.removeprefix(GIVEN): path for name, path in found.items() if name.startswith(GIVEN)}
    sides: dict[int, str] = {}
    if lists:
        for name, path in lists.items():
            for number in _id_list(path):
                if sides.setdefault(number, name) != name:
                    raise CorruptFileError(f"{path}: image {number} is also in the list of {sides[number]!r}")
        return {n: sides[n] for n in numbers if n in sides}, {"policy": "lists of ids"}
    everything = len(numbers)
    if rules.exclude_coco:
        numbers = [n for n in numbers if not pictures[n][3]]
    chosen = holdout([str(n) for n in numbers], rules.val_share, f"{spec.name}/val/{rules.seed}")
    sides = {n: "val" if c else "train" for n, c in zip(numbers, chosen.tolist(), strict=True)}
    share = float(chosen.mean()) if len(chosen) else 0.0
    notes = {
        "policy": "hash of the image id",
        "target_val_share": rules.val_share,
        "val_share": share,
        "mscoco_images_excluded": everything - len(numbers),
    }
    return sides, notes


def _id_list(path: Path) -> list[int]:
    """A JSON list of numbers, or one number per line."""
    try:
        text = read_text(path)
        values = parse_json(text, path) if text.lstrip().startswith("[") else text.split()
        return [whole_number(value) for value in values]
    except (ValueError, TypeError) as error:
        raise CorruptFileError(f"{path}: not a list of image ids ({error})") from error


def _frequent(numbers: NDArray[np.int64], texts: list[str], count: int) -> list[int]:
    """The most frequent word numbers, ties in alphabetical order."""
    occurrences = np.bincount(numbers, minlength=len(texts)).tolist() if len(numbers) else []
    present = [i for i, n in enumerate(occurrences) if n > 0]
    return sorted(present, key=lambda i: (-occurrences[i], texts[i]))[:count]


def _lookup(chosen: list[int], size: int) -> NDArray[np.int64]:
    """Word number -> position in the vocabulary, -1 for the others."""
    positions = np.full(size, -1, dtype=np.int64)
    positions[chosen] = np.arange(len(chosen))
    return positions


def _rows(
    image: NDArray[np.int64],
    labels: NDArray[np.int64],
    chosen: NDArray[np.bool_],
    pictures: dict[int, tuple[int, int, str, bool]],
) -> Any:
    """Rows of one split: unique relations of every image that keeps at least one."""
    numbers = np.unique(image[chosen & (labels[:, 3] > 0)])
    part = chosen & np.isin(image, numbers)
    table = np.concatenate([image[part, None], labels[part]], axis=1)
    # One line per triplet; it is kept when any of its occurrences passes the area filter.
    table = table[np.lexsort((-table[:, 4], table[:, 3], table[:, 2], table[:, 1], table[:, 0]))]
    first = np.ones(len(table), dtype=np.bool_)
    first[1:] = (table[1:, :4] != table[:-1, :4]).any(axis=1)
    table = table[first]
    bounds = [*np.searchsorted(table[:, 0], numbers).tolist(), len(table)]
    samples = [
        (f"{number:07d}", pictures[number][2], table[bounds[i] : bounds[i + 1], 1:].astype(np.int32))
        for i, number in enumerate(numbers.tolist())
    ]
    return rows_from(samples, 4)
