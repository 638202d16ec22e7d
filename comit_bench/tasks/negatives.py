"""Candidates for relation samples: the true triplet first, then negatives that are not true of the image.

Lists are made once per data set and role, in an order that ids decide, and kept on disk; their digest is
part of the protocol. Kinds of negatives:

- ``random``: the triplets of other images of the same role;
- ``predicate``: the same two objects with the predicates of other images of the role;
- ``swapped``: subject and object exchanged.

A reader that sees no image must gain nothing, however uneven the world is. Drawing negatives as often as they
occur is not enough: a list holds nothing twice and nothing that is true of its image, so what is common
would be true more often than its share. Therefore samples are put into *groups* that lend each other what
they say: the members of a group say different things, none of which is true of another member. All have the
same candidates, and each candidate is the true one of exactly one member, so every reader of candidates alone
is right once per group. The first ``BLOCK`` candidates are those of a part of the group, of which the same
holds. For ``predicate`` this is so for what predicates alone tell; which predicate goes with two words
(man, shirt: wears) remains to be known, and ``swapped`` is what it is. The ``blind`` row measures both.

A triplet that is annotated for the image in any way (``Triplets.known``) is never a negative for it, nor is
one that differs from it by synonyms only. What nobody annotated may still be true; no data set lists
everything.

Shape legend: ``m`` triplets, ``n`` images of the role, ``q`` samples, ``C`` candidates per sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from comit_bench.errors import CorruptFileError
from comit_bench.files import atomic_path, digest_json
from comit_bench.recipes.kinds import BLOCK, NegativesSpec
from comit_bench.seeding import generator_for
from comit_bench.tasks.base import Role

Ints = NDArray[np.int64]
FORMAT = 2
SEED = 0
OPEN = 256  # groups that wait for members at the same time; beyond that the oldest stays smaller


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """Vocabularies.

    Attributes:
        objects: Number of words of objects.
        predicates: Number of words of predicates.
        object_sense: int64 [objects], equal numbers (below ``objects``) for synonyms; None: there are none.
        predicate_sense: int64 [predicates], the same of predicates.
    """

    objects: int
    predicates: int
    object_sense: Ints | None = None
    predicate_sense: Ints | None = None

    @property
    def triplets(self) -> int:
        """Number of triplets that can be said."""
        return self.objects * self.predicates * self.objects

    def senses(self, triplets: Ints) -> Ints:
        """Triplets [..., 3] with one word for all of its synonyms."""
        s, p, o = triplets[..., 0], triplets[..., 1], triplets[..., 2]
        if self.object_sense is not None:
            s, o = self.object_sense[s], self.object_sense[o]
        if self.predicate_sense is not None:
            p = self.predicate_sense[p]
        return np.stack([s, p, o], axis=-1)

    def number(self, triplets: Ints) -> Ints:
        """One number for each triplet, equal for those that say the same: int64 [..., 3] -> [...]."""
        meant = self.senses(triplets)
        found: Ints = (meant[..., 0] * self.predicates + meant[..., 1]) * self.objects + meant[..., 2]
        return found


class Truth:
    """Which triplets are known to be true of which image.

    Args:
        table: int64 [m, 4], rows (image, subject, predicate, object).
        words: Vocabularies.
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

    def columns(self) -> dict[str, list[int]]:
        """Metric -> its candidates, the true one first."""
        found = {}
        for kind, part in self.kinds.items():
            if kind != "random":
                found[kind] = [0, *range(part.start, part.stop)]
                continue
            for count in sorted({BLOCK, part.stop}):
                found[f"top1@{count}"] = list(range(count))
        return found

    def only(self, chosen: Sequence[int]) -> Lists:
        """These columns, the first being 0, of the samples that have a negative among them."""
        valid = self.valid[:, chosen]
        fair = valid.sum(axis=1) > 1
        return Lists(self.images[fair], self.triplets[fair][:, chosen], valid[fair], {})

    def hard(self) -> list[int]:
        """The true one and the negatives that share its words."""
        return [0, *range(self.kinds["random"].stop, self.valid.shape[1])]


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


def groups_of(said: Sequence[int], true: Sequence[Set[int]], size: int) -> list[list[int]]:
    """Groups in which nothing that a member says is true of another.

    Args:
        said: What each sample says, in the order in which they look for a group: the first that takes them.
        true: What is true of each sample; what it says is.
        size: Most members. The last groups stay smaller, also those of what nearly everybody says.

    Returns:
        Members by group; every sample is in one.
    """
    waiting: list[tuple[list[int], set[int], set[int]]] = []  # members, what they say, what is true of them
    done: list[list[int]] = []
    for sample, (own, holds) in enumerate(zip(said, true, strict=True)):
        for place, (members, says, truth) in enumerate(waiting):
            if own not in truth and holds.isdisjoint(says):
                members.append(sample)
                says.add(own)
                truth |= holds
                if len(members) == size:
                    done.append(waiting.pop(place)[0])
                break
        else:
            waiting.append(([sample], {own}, set(holds)))
            if len(waiting) > OPEN:
                done.append(waiting.pop(0)[0])
    return done + [members for members, _, _ in waiting]


def _samples(role: Role, table: Ints, per_image: int | None) -> Ints:
    """The samples of a role, at most so many of an image: int64 [q, 4], sorted by image."""
    starts = np.searchsorted(table[:, 0], np.arange(len(role) + 1))
    chosen: list[int] = []
    for image, name in enumerate(role.ids):
        count = int(starts[image + 1] - starts[image])
        order = torch.randperm(count, generator=generator_for(SEED, f"negatives/{name}"))
        chosen += sorted((int(starts[image]) + order[: per_image or count]).tolist())
    return table[np.array(chosen, dtype=np.int64)]


def _true_of(samples: Ints, known: Ints, words: Words) -> dict[str, tuple[list[int], list[Set[int]]]]:
    """For each kind with groups: what every sample says, and what is true of it."""
    meant, numbers = words.senses(known[:, 1:]), words.number(known[:, 1:])
    of_image: dict[int, set[int]] = {}
    of_ends: dict[tuple[int, int, int], set[int]] = {}
    for image, number, (s, p, o) in zip(known[:, 0].tolist(), numbers.tolist(), meant.tolist(), strict=True):
        of_image.setdefault(image, set()).add(number)
        of_ends.setdefault((image, s, o), set()).add(p)
    said, parts, images = (
        words.number(samples[:, 1:]).tolist(),
        words.senses(samples[:, 1:]).tolist(),
        samples[:, 0].tolist(),
    )
    ends = [of_ends[image, s, o] for image, (s, _, o) in zip(images, parts, strict=True)]
    return {
        "random": (said, [of_image[image] for image in images]),
        "predicate": ([p for _, p, _ in parts], [*ends]),
    }


def draw_lists(role: Role, words: Words, spec: NegativesSpec) -> Lists:
    """The samples of a role and their candidates; they depend on the ids of its images and on the labels.

    Args:
        role: Images of the early-stop or report set.
        words: Vocabularies.
        spec: How many of what.
    """
    kinds, known = columns(spec), role_table(role, known=True)
    samples = _samples(role, role_table(role, known=False), spec.per_image)
    width = 1 + sum(part.stop - part.start for part in kinds.values())
    triplets = np.zeros((len(samples), width, 3), np.int64)
    valid = np.zeros((len(samples), width), np.bool_)
    triplets[:, 0], valid[:, 0] = samples[:, 1:], True
    for kind, (said, true) in _true_of(samples, known, words).items():
        if kind not in kinds:
            continue
        order = torch.randperm(len(samples), generator=generator_for(SEED, f"negatives/{kind}")).tolist()
        start, size = kinds[kind].start, 1 + kinds[kind].stop - kinds[kind].start
        block = BLOCK if kind == "random" else size
        for group in groups_of([said[n] for n in order], [true[n] for n in order], size):
            members = [order[n] for n in group]
            for near in np.array_split(members, -(-len(members) // block)):  # of a block or one less
                far = [n for n in members if n not in near]
                for sample in near.tolist():
                    others = [n for n in near.tolist() if n != sample]
                    for begin, lent in ((start, others), (start + block - 1, far)):
                        part = slice(begin, begin + len(lent))
                        triplets[sample, part] = samples[lent, 1:]
                        valid[sample, part] = True
    if "predicate" in kinds:
        part = kinds["predicate"]
        ends = np.where(valid[:, part, None], samples[:, None, 1:], 0)
        triplets[:, part, 0], triplets[:, part, 2] = ends[..., 0], ends[..., 2]
    if "swapped" in kinds:
        turned, part = samples[:, :0:-1], kinds["swapped"].start
        valid[:, part] = ~Truth(known, words).holds(samples[:, 0], turned)
        triplets[valid[:, part], part] = turned[valid[:, part]]
    return Lists(samples[:, 0].copy(), triplets, valid, kinds)


def stored_lists(
    role: Role, words: Words, spec: NegativesSpec, *, cache: Path, fingerprint: str
) -> tuple[Lists, str]:
    """The lists of a role and their digest, from the cache when they were drawn before.

    Args:
        role: Images of the role, broken ones included, so that the lists depend on the data alone.
        words: Vocabularies.
        spec: How many of what.
        cache: The cache directory.
        fingerprint: Of the split.
    """
    senses = [None if s is None else s.tolist() for s in (words.object_sense, words.predicate_sense)]
    key: dict[str, Any] = {
        "format": FORMAT,
        "seed": SEED,
        "split": fingerprint,
        "spec": spec.model_dump(mode="json", exclude={"train"}),
        "images": digest_json(role.ids),
        "senses": digest_json(senses),
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
