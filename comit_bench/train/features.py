"""Teacher features on disk: every image goes through the teacher once, not once per epoch.

``<cache>/features/<digest[:2]>/<digest>/`` holds the features of one list of images by one teacher. The
digest is that of ``key.json`` beside the shards (the teacher's weights, its preprocessing and grid, the
images, the type of the numbers, the device). Shard i is a safetensors file of ``data.tokens.shards``:
``cls`` [rows, D1] and ``patches`` [rows, X, D2] in float32 or float16, memory-mapped when read, and
``valid`` uint8 [rows], 0 where the image was broken. Shards are written whole or not at all, each by one
process, so a killed run continues with the shards that are missing.

Exactness: training images are at most mirrored (:class:`WithMirrored` keeps both), so features depend on the
image alone. On a CPU they are
always computed one image at a time, with the cache and without, so both give the same bits (in float32,
with the same number of threads): in larger batches an image's place decides about its rounding. On a GPU
they are computed in batches and may round differently. float16 halves the space and rounds to 11 bits.

Shape legend: ``n`` images, ``D1`` / ``D2`` vector sizes, ``X`` image tokens.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from comit_bench.data.digests import file_digests
from comit_bench.data.tokens.shards import Array, ShardStore, SharedWork
from comit_bench.data.workers import read_ahead
from comit_bench.errors import BenchError, CorruptFileError
from comit_bench.files import cache_root, require_room
from comit_bench.nn.teachers import Teacher, TeacherFeatures
from comit_bench.train.config import TeacherConfig
from comit_bench.train.data import FolderImages, Images, to_pixels
from comit_bench.train.sources import DecodedImages

BATCH = 64  # images per read; on a GPU also per call of the teacher
SHARD_BYTES = 2**27


def compute_features(teacher: Teacher, images: Tensor) -> TeacherFeatures:
    """Features of [B, 3, S, S] in [-1, 1]; on a CPU one by one, so that no image notices its company."""
    if images.device.type != "cpu":
        return teacher.features(images)
    parts = [teacher.features(image) for image in images.split(1)]
    return TeacherFeatures(torch.cat([p.cls for p in parts]), torch.cat([p.patches for p in parts]))


def images_digest(source: Images) -> str:
    """``sha256:<hex>`` of a list of images.

    Names, contents and preprocessing of files, which are read once (``comit_bench.data.digests``); names and
    pixels of any other source.

    Raises:
        MissingError: A file vanished.
    """
    digest = hashlib.sha256()
    if isinstance(source, FolderImages):
        _add(digest, source.recipe, source.ids, file_digests(source.root, source.ids, cache=cache_root()))
    elif isinstance(source, DecodedImages):
        rows = source.rows.tolist()
        contents = source.source.digests(rows, cache=cache_root(), title="contents", progress=False)
        _add(digest, source.recipe, source.ids, contents)
    else:
        digest.update("\n".join(source.ids).encode("utf-8", "surrogateescape"))
        for row in range(len(source.ids)):
            try:
                digest.update(source.read(row).contiguous().numpy().data)
            except CorruptFileError:
                digest.update(b"broken")
    return "sha256:" + digest.hexdigest()


def _add(digest: hashlib._Hash, recipe: str, ids: Sequence[str], contents: Sequence[bytes]) -> None:
    digest.update(recipe.encode())
    for name, content in zip(ids, contents, strict=True):
        digest.update(f"\n{name}\t{content.hex()}".encode("utf-8", "surrogateescape"))


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureLayout:
    """Shape of a feature store; a part of its key."""

    count: int
    cls_dim: int
    tokens: int
    patch_dim: int
    dtype: str
    shard_size: int

    @property
    def optional(self) -> frozenset[str]:
        """Every tensor must be there."""
        return frozenset()

    def shapes(self, rows: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type and shape of every tensor of a shard of ``rows`` rows."""
        kind = np.dtype(self.dtype)
        return {
            "cls": (kind, (rows, self.cls_dim)),
            "patches": (kind, (rows, self.tokens, self.patch_dim)),
            "valid": (np.dtype(np.uint8), (rows,)),
        }

    def nbytes(self, rows: int) -> int:
        """Bytes of the tensors of ``rows`` images."""
        return rows * (1 + np.dtype(self.dtype).itemsize * (self.cls_dim + self.tokens * self.patch_dim))


def layout_for(count: int, dims: tuple[int, int], tokens: int, dtype: str) -> FeatureLayout:
    """Shards of at most about 128 MiB."""
    one = FeatureLayout(
        count=count, cls_dim=dims[0], tokens=tokens, patch_dim=dims[1], dtype=dtype, shard_size=1
    )
    return replace(one, shard_size=max(1, SHARD_BYTES // one.nbytes(1)))


class FeatureStore(ShardStore[FeatureLayout]):
    """Features of one list of images; make it with :meth:`open`, complete it with :meth:`fill`."""

    what = "feature cache"
    absent = (
        "this part of the teacher's features is not here. All processes must see the same cache directory "
        "(COMIT_BENCH_CACHE)."
    )

    @classmethod
    def open(cls, key: dict[str, object], layout: FeatureLayout, *, root: Path | None = None) -> FeatureStore:
        """Find or begin the store for a key below ``root`` (None: the package's cache); reads no shard."""
        return cls((root or cache_root()) / "features", key, layout, check=False)

    def missing(self) -> list[int]:
        """Shards without a file."""
        return [i for i in range(self.num_shards) if not self.shard_path(i).is_file()]

    def check_room(self) -> None:
        """Refuse to begin what will not fit."""
        need = self.layout.nbytes(sum(len(self.shard_range(i)) for i in self.missing()))
        what = f"teacher.cache=disk: the features of {self.layout.count} images need"
        half = ", use teacher.cache_dtype=float16 (half)" if self.layout.dtype == "float32" else ""
        require_room(self.directory, need, what, advice=f"{half}, or use teacher.cache=none")

    def _is_whole(self, shard: int) -> bool:
        """Whether a shard is there and every byte is right; a damaged one is removed."""
        try:
            self._load(shard, check=True)
        except FileNotFoundError:
            return False
        except CorruptFileError:
            self.shard_path(shard).unlink(missing_ok=True)
            return False
        return True

    def fill(
        self,
        source: Images,
        teacher: Teacher,
        *,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        stopped: Callable[[], bool] = lambda: False,
        progress: bool = False,
    ) -> int:
        """Compute what is missing: this process checks and writes every ``ranks``-th shard.

        Args:
            source: The images, ``layout.count`` of them.
            teacher: Runs on ``device``.
            device: Where the images go.
            rank: Number of this process,
            ranks: of so many.
            workers: Processes that read images ahead.
            stopped: Asked after every shard; True ends with KeyboardInterrupt, what is written stays.
            progress: Show a bar.

        Returns:
            How many images went through the teacher here.

        Raises:
            BenchError: Features that are not finite (in float16: too large), or no room on the disk.
            KeyboardInterrupt: See ``stopped``.
        """
        self.remove_stale()
        mine = range(rank, self.num_shards, ranks)
        todo = [shard for shard in mine if not self._is_whole(shard) or self._forget_if_mended(shard, source)]
        total = sum(len(self.shard_range(shard)) for shard in todo)
        work = SharedWork(todo, self.shard_path, "the teacher's features")
        made = 0
        with tqdm(total=total, desc="teacher features", unit="img", disable=not progress) as bar:
            while work.left:
                work.wait()
                with work:
                    made += self._fill(work, source, teacher, device, workers if total else 0, stopped, bar)
        return made

    def _fill(
        self,
        work: SharedWork,
        source: Images,
        teacher: Teacher,
        device: torch.device,
        workers: int,
        stopped: Callable[[], bool],
        bar: Any,
    ) -> int:
        """Every shard that nobody else is making; how many images went through the teacher."""
        taken: deque[int] = deque()

        def rows() -> Iterator[int]:
            for shard in work.take():
                taken.append(shard)
                yield from self.shard_range(shard)

        images, made = read_ahead(_Reader(source), rows(), workers), 0
        while (first := next(images, None)) is not None:
            if stopped():
                raise KeyboardInterrupt
            shard = taken.popleft()
            self._compute(shard, chain([first], images), teacher, device, bar)
            work.done(shard)
            made += len(self.shard_range(shard))
        return made

    def _compute(
        self,
        shard: int,
        images: Iterator[tuple[Tensor | None, str]],
        teacher: Teacher,
        device: torch.device,
        bar: Any,
    ) -> None:
        rows = self.shard_range(shard)
        tensors: dict[str, Array] = {n: np.zeros(s, t) for n, (t, s) in self.layout.shapes(len(rows)).items()}
        broken: dict[int, str] = {}
        for start in range(0, len(rows), BATCH):
            pixels, places = [], []
            for place in range(start, min(start + BATCH, len(rows))):
                image, problem = next(images)
                if image is None:
                    broken[rows[place]] = problem
                else:
                    pixels.append(image)
                    places.append(place)
            if pixels:
                done = compute_features(teacher, to_pixels(torch.stack(pixels), device))
                with np.errstate(over="ignore"):  # becomes infinite, which is refused below
                    tensors["cls"][places] = done.cls.cpu().numpy()
                    tensors["patches"][places] = done.patches.cpu().numpy()[:, : self.layout.tokens]
                tensors["valid"][places] = 1
            bar.update(len(pixels))
        for name in ("cls", "patches"):
            if not np.isfinite(tensors[name]).all():
                raise BenchError(
                    f"teacher features of images {rows.start} to {rows.stop - 1} are not finite as "
                    f"{self.layout.dtype}. Use teacher.cache_dtype=float32, or look at the teacher's weights."
                )
        self._write(shard, tensors, broken)

    def _forget_if_mended(self, shard: int, source: Images) -> bool:
        """Remove a shard when an image that was broken when it was made can be read now."""
        if all(_Reader(source)[row][0] is None for row in self._shard(shard).broken):
            return False
        del self._shards[shard]
        self.shard_path(shard).unlink(missing_ok=True)
        return True

    def take(self, numbers: Sequence[int] | Tensor) -> TeacherFeatures:
        """Features of some images, float32 on the CPU, in this order.

        Raises:
            MissingError: Their shard has not been written, or is not seen from this machine.
            CorruptFileError: Their shard is damaged.
            BenchError: The image was broken when the features were made.
        """
        shapes = self.layout.shapes(len(numbers))
        out = {name: np.empty(shapes[name][1], np.float32) for name in ("cls", "patches")}
        shards, rows = np.divmod(np.asarray(numbers), self.layout.shard_size)
        for shard in np.unique(shards).tolist():
            here, tensors = shards == shard, self._shard(shard).tensors
            if not (valid := tensors["valid"][rows[here]] > 0).all():
                number = shard * self.layout.shard_size + int(rows[here][~valid][0])
                raise BenchError(
                    f"image {number} was broken when its features were computed: "
                    f"{self._shard(shard).broken.get(number)}. Remove {self.directory} to compute them again."
                )
            for name, values in out.items():
                values[here] = tensors[name][rows[here]]
        return TeacherFeatures(torch.from_numpy(out["cls"]), torch.from_numpy(out["patches"]))


class WithMirrored:
    """A list of images, followed by the same images left to right."""

    def __init__(self, source: Images) -> None:
        self.source = source
        self.ids = (*source.ids, *(f"{name} mirrored" for name in source.ids))

    def read(self, index: int) -> Tensor:
        """As :meth:`Images.read`."""
        mirrored, number = divmod(index, len(self.source.ids))
        image = self.source.read(number)
        return image.flip(-1) if mirrored else image


class _Reader:
    """Gives the image of a row; a broken one is None and its message."""

    def __init__(self, source: Images) -> None:
        self.source = source

    def __getitem__(self, row: int) -> tuple[Tensor | None, str]:
        try:
            return self.source.read(row), ""
        except CorruptFileError as error:
            return None, str(error)


def open_features(
    config: TeacherConfig,
    teacher: Teacher,
    source: Images,
    *,
    tokens: int,
    data: str,
    device: torch.device,
    precision: str,
) -> FeatureStore:
    """The store for a run, after making sure that there is room for it.

    ``tokens`` are the image tokens X, or 0 to keep no patches; ``data`` is the :func:`images_digest` of the
    source. Features of another device or precision are kept apart: they round differently.

    Raises:
        BenchError: Not enough room.
    """
    key: dict[str, object] = {
        "teacher": teacher.identity(),
        "data": data,
        "device": device.type,
        "precision": precision,
    }
    store = FeatureStore.open(key, layout_for(len(source.ids), teacher.dims, tokens, config.cache_dtype))
    store.check_room()
    return store
