"""No image in two splits: proven by what the files hold, whatever they are called.

Two samples are one image when their files hold the same bytes: copies, hard links, links, one file under
two ids, a folder that is another one's link. Copies that were encoded anew are other bytes and are not
found. Within one split such twins are harmless. Between splits they would let a probe see what it is asked
about, so the one in the training split is left out: ``train`` gives way to all others, and of those the one
that the recipe lists first. Files without content are broken and no twins.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np

from comit_bench.data.digests import EMPTY
from comit_bench.data.readers.common import few
from comit_bench.data.split import Split
from comit_bench.errors import CorruptFileError
from comit_bench.files import write_atomic

_log = logging.getLogger(__name__)


def without_shared(
    splits: dict[str, Split], *, where: Path, report: Path
) -> tuple[dict[str, Split], dict[str, int]]:
    """The splits without images that another one holds too.

    ``report`` lists the images that are left out, when there are some.

    Returns:
        The splits in their order; and for those that lost images, how many.

    Raises:
        CorruptFileError: Nothing is left of a split, or of a class in it.
    """
    names = sorted(splits, key=lambda name: name != "train")  # train gives way first, then in order
    owner: dict[bytes, tuple[str, int]] = {}
    left: dict[str, Split] = {}
    listed: dict[str, dict[str, str]] = {}
    for name in reversed(names):
        split = splits[name]
        twins = {row: owner[digest] for row, digest in enumerate(split.contents) if digest in owner}
        if twins:
            listed[name] = {
                split.ids[row]: f"{other}: {splits[other].ids[place]}"
                for row, (other, place) in twins.items()
            }
            split = split.take([row for row in range(len(split)) if row not in twins])
            _check_left(splits[name], split, listed[name], where)
        left[name] = split
        for row, digest in enumerate(splits[name].contents):
            if digest != EMPTY:
                owner.setdefault(digest, (name, row))
    if listed:
        write_atomic(report, json.dumps({"folder": str(where), "left_out": listed}, indent=1) + "\n")
        for name, twins_of in listed.items():
            pairs = few((f"{own} = {other}" for own, other in twins_of.items()), 3)
            _log.warning(
                "%s: %d of %d images of split %r are in another split too and are left out of %r: %s (all of "
                "them: %s)",
                *(where, len(twins_of), len(splits[name]), name, name, pairs, report),
            )
    return {name: left[name] for name in splits}, {name: len(twins) for name, twins in listed.items()}


def _check_left(before: Split, after: Split, twins: dict[str, str], where: Path) -> None:
    pair = next(iter(twins.items()))
    if not len(after):
        raise CorruptFileError(
            f"{where}: every image of split {before.name!r} is in another split too ({pair[0]} is "
            f"{pair[1]}). Do both lead to one folder? A probe must not be asked about images it has seen."
        )
    if isinstance(before.labels, np.ndarray) and before.labels.ndim == 1:
        lost = sorted(set(before.labels.tolist()) - set(after.labels.tolist()))
        if lost:
            example = before.ids[int(np.flatnonzero(before.labels == lost[0])[0])]
            raise CorruptFileError(
                f"{where}: all images of {len(lost)} classes of split {before.name!r} are in another split "
                f"too, e.g. {example}. Nothing would be left to learn them from."
            )
