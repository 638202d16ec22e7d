"""Candidates for relation samples: the true triplet first, then negatives that are not true of the image.

Lists are drawn once per data set and role, from generators keyed by image id, and kept on disk; their
digest is part of the protocol. Kinds of negatives:

- ``random``: triplets of other images of the same role, drawn as often as they occur there. A reader that
  knows only how common a triplet is gains nothing: negatives are as common as positives;
- ``predicate``: the same two objects with another predicate;
- ``swapped``: subject and object exchanged.

A triplet that is annotated for the image in any way (``Triplets.known``) is never a negative for it, and no
triplet occurs twice in a list. What nobody annotated may still be true; no data set lists everything.

Shape legend: ``m`` triplets, ``n`` images of the role, ``q`` samples, ``C`` candidates per sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from comit_bench.errors import CorruptFileError
from comit_bench.files import atomic_path, digest_json
from comit_bench.recipes.kinds import NegativesSpec
from comit_bench.seeding import generator_for
from comit_bench.tasks.base import Role

Ints = NDArray[np.int64]
FORMAT = 1
SEED = 0
_ROUNDS = 32  # attempts to fill a list of random negatives before it stays shorter


@dataclass(frozen=True, slots=True)
class Words:
    """Sizes of the vocabularies: objects, predicates."""

    objects: int
    predicates: int

    @property
    def triplets(self) -> int:
        """Number of triplets that can be said."""
        return self.objects * self.predicates * self.objects

    def number(self, triplets: Ints) -> Ints:
        """One number for each triplet: [..., 3] (subject, predicate, object) -> [...]."""
        s, p, o = triplets[..., 0], triplets[..., 1], triplets[..., 2]
        found: Ints = (s * self.predicates + p) * self.objects + o
        return found


class Truth:
    """Which triplets are known to be true of which image.

    Args:
        table: int64 [m, 4], rows (image, subject, predicate, object).
        words: Vocabulary sizes.
    """

    def __init__(self, table: Ints, words: Words) -> None:
        self.words = words
        self.keys = np.unique(table[:, 0] * words.triplets + words.number(table[:, 1:]))

    def holds(self, images: Ints, triplets: Ints) -> NDArray[np.bool_]:
        """Whether triplets [..., 3] are known of images [...] (broadcast against each other)."""
        keys = images * self.words.triplets + self.words.number(triplets)
        if self.keys.size == 0:
            return np.zeros(keys.shape, dtype=np.bool_)
        place = np.minimum(np.searchsorted(self.keys, keys), self.keys.size - 1)
        found: NDArray[np.bool_] = self.keys[place] == keys
        return found


def role_table(role: Role, *, known: bool) -> Ints:
    """Triplets of the images of a role, the image column counting the role's images: int64 [m, 4].

    Args:
        role: Images of a split of kind ``relations``.
        known: All that is known to be true instead of the samples only.
    """
    labels = role.split.labels
    table = labels.known if known and len(labels.known) else labels.table
    place = np.full(len(role.split), -1, dtype=np.int64)
    place[role.images] = np.arange(len(role))
    kept = table[place[table[:, 0]] >= 0]
    moved: Ints = np.concatenate([place[kept[:, :1]], kept[:, 1:]], axis=1)
    return moved[np.lexsort(moved.T[::-1])]


@dataclass(frozen=True, eq=False, slots=True)
class Lists:
    """Samples with their candidates; column 0 is the true triplet.

    Attributes:
        images: int64 [q], positions within the role.
        triplets: int64 [q, C, 3]; rows that are not valid hold zeros.
        valid: bool [q, C].
        kinds: Name of a kind of negatives -> its columns, without column 0.
    """

    images: Ints
    triplets: Ints
    valid: NDArray[np.bool_]
    kinds: dict[str, slice]

    def digest(self) -> str:
        """``sha256:<hex>`` of the content."""
        import hashlib

        total = hashlib.sha256(repr([(k, s.start, s.stop) for k, s in self.kinds.items()]).encode())
        for array in (self.images, self.triplets, self.valid):
            total.update(np.ascontiguousarray(array).tobytes())
        return "sha256:" + total.hexdigest()

    def keep(self, images: Ints) -> Lists:
        """The samples of some images only, renumbered in the order given (positions within the role)."""
        place = np.full(max(int(images.max(initial=-1)), int(self.images.max(initial=-1))) + 1, -1, np.int64)
        place[images] = np.arange(len(images))
        chosen = place[self.images] >= 0
        return Lists(place[self.images[chosen]], self.triplets[chosen], self.valid[chosen], self.kinds)


def columns(spec: NegativesSpec) -> dict[str, slice]:
    """Which columns each kind of negatives takes."""
    found, start = {}, 1
    for name, count in (
        ("random", spec.report),
        ("predicate", spec.predicate),
        ("swapped", int(spec.swapped)),
    ):
        if count:
            found[name] = slice(start, start + count)
            start += count
    return found


def draw_lists(role: Role, words: Words, spec: NegativesSpec) -> Lists:
    """Draw the samples of a role and their candidates; each depends on the id of its image and the pool.

    Args:
        role: Images of the early-stop or report set.
        words: Vocabulary sizes.
        spec: How many of what.
    """
    table, truth, kinds = (
        role_table(role, known=False),
        Truth(role_table(role, known=True), words),
        columns(spec),
    )
    width = 1 + sum(part.stop - part.start for part in kinds.values())
    starts = np.searchsorted(table[:, 0], np.arange(len(role) + 1))
    images: list[int] = []
    rows: list[Ints] = []
    masks: list[NDArray[np.bool_]] = []
    for image, name in enumerate(role.ids):
        own = range(int(starts[image]), int(starts[image + 1]))
        if not own:
            continue
        generator = generator_for(SEED, f"negatives/{name}")
        order = torch.randperm(len(own), generator=generator).tolist()[: spec.per_image or len(own)]
        for position in sorted(order):
            true = table[own.start + position, 1:]
            row, mask = np.zeros((width, 3), np.int64), np.zeros(width, np.bool_)
            row[0], mask[0] = true, True
            for kind, part in kinds.items():
                found = _draw(kind, part.stop - part.start, image, true, table, truth, generator)
                row[part.start : part.start + len(found)] = found
                mask[part.start : part.start + len(found)] = True
            images.append(image)
            rows.append(row)
            masks.append(mask)
    return Lists(
        np.array(images, np.int64),
        np.stack(rows) if rows else np.zeros((0, width, 3), np.int64),
        np.stack(masks) if masks else np.zeros((0, width), np.bool_),
        kinds,
    )


def _draw(
    kind: str, count: int, image: int, true: Ints, table: Ints, truth: Truth, generator: torch.Generator
) -> Ints:
    """Up to ``count`` distinct negatives of one kind for one sample: int64 [<= count, 3]."""
    here = np.array(image, np.int64)
    if kind == "swapped":
        turned = true[::-1][None]
        fresh: Ints = turned[~truth.holds(here, turned) & (turned != true).any(axis=1)]
        return fresh
    if kind == "predicate":
        others = np.repeat(true[None], truth.words.predicates, axis=0)
        others[:, 1] = np.arange(truth.words.predicates)
        others = others[~truth.holds(here, others) & (others[:, 1] != true[1])]
        order = torch.randperm(len(others), generator=generator).numpy()[:count]
        some: Ints = others[order]
        return some
    found: dict[int, Ints] = {}
    for _ in range(_ROUNDS):
        drawn = table[torch.randint(len(table), (2 * count,), generator=generator).numpy()]
        drawn = drawn[(drawn[:, 0] != image) & ~truth.holds(here, drawn[:, 1:])][:, 1:]
        for number, triplet in zip(truth.words.number(drawn).tolist(), drawn, strict=True):
            found.setdefault(number, triplet)
        if len(found) >= count:
            break
    return np.stack(list(found.values())[:count]) if found else np.zeros((0, 3), np.int64)


def stored_lists(
    role: Role, words: Words, spec: NegativesSpec, *, cache: Path, fingerprint: str
) -> tuple[Lists, str]:
    """The lists of a role and their digest, from the cache when they were drawn before.

    Args:
        role: Images of the role, broken ones included, so that the lists depend on the data alone.
        words: Vocabulary sizes.
        spec: How many of what.
        cache: The cache directory.
        fingerprint: Of the split.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    key: dict[str, Any] = {
        "format": FORMAT,
        "seed": SEED,
        "split": fingerprint,
        "spec": spec.model_dump(mode="json", exclude={"train"}),
        "images": digest_json(role.ids),
    }
    path = cache / "negatives" / f"{digest_json(key).removeprefix('sha256:')}.safetensors"
    if path.is_file():
        try:
            held = load_file(path)
            lists = Lists(held["images"], held["triplets"], held["valid"].astype(np.bool_), columns(spec))
            if lists.digest() != bytes(held["digest"].tolist()).decode():
                raise ValueError("its digest differs")
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise CorruptFileError(
                f"{path}: damaged list of negatives ({error}). Remove it and run the same command again."
            ) from error
        return lists, lists.digest()
    lists = draw_lists(role, words, spec)
    digest = lists.digest()
    arrays = {
        "images": lists.images,
        "triplets": lists.triplets,
        "valid": lists.valid.astype(np.uint8),
        "digest": np.frombuffer(digest.encode(), dtype=np.uint8),
    }
    with atomic_path(path) as temporary:
        save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, temporary)
    return lists, digest
