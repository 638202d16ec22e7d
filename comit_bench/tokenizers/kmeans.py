"""``kmeans-patch``: visual words. What a vocabulary without any network can say about an image.

An image is cut into K patches; each becomes the id of the nearest of V centroids. At the message length
of a learned tokenizer it is the row to beat. Unusual:

- Centroids are whole numbers 0..255, like pixels. Squared distances are then whole numbers too, far
  below 2**53, so float64 computes them without rounding, in any order of summation: ids have the same
  bits for every batch size, thread count and device, and ties go to the lowest id. No tiling is needed.
- The fit (scikit-learn MiniBatchKMeans) runs in float64 on one thread, then rounds to that grid: the
  differences between processors and thread counts, about 1e-13, do not survive the rounding.
- Ids are ordered from dark to bright, so equal centroids always get equal ids.

Shape legend: ``B`` batch, ``K`` patches per image in raster order, ``V`` vocabulary, ``p`` patch side,
``S`` image side, ``d`` = 3 p p, the values of one patch ordered (channel, row, column).
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from comit_bench.errors import CorruptFileError, MissingError, UsageError, shown
from comit_bench.files import atomic_path, digest_json, locked, sweep
from comit_bench.tokenizers.base import (
    Streams,
    TokenizerInfo,
    Tokens,
    check_ids,
    check_images,
    refuse_unknown,
    warn_policy,
)
from comit_bench.tokenizers.checkpoints import read_config, read_tensors
from comit_bench.tokenizers.identity import configuration_digest
from comit_bench.tokenizers.pixels import check_grid, from_patches, to_codes, to_patches

FAMILY = "kmeans-patch"
FORMAT_VERSION = 1
VERSION = "1"  # raised when the same weights and configuration may give other ids
MAX_PATCHES = 32_768  # patches that a fit looks at, drawn from all images
PASSES = 6  # over those patches
FIT_BATCH = 4096
SEARCH_ROWS = 4096  # patches per distance table: bounds memory, cannot change an id

_log = logging.getLogger(__name__)


class _Options(TypedDict, total=False):
    """What :func:`load` takes beside what every loader takes."""

    patch: int
    resolution: int
    vocab: int


class KMeansPatchTokenizer:
    """Nearest-centroid ids of non-overlapping patches.

    Args:
        centroids: uint8 [V, 3 p p].
        patch: Side of one patch, in pixels.
        resolution: Side of the images, in pixels; a multiple of ``patch``.
        training_data: What the centroids were fitted on.
        device: Where ids and codes are computed.

    Raises:
        UsageError: The patches do not tile the image, or the centroids have another shape or type.
    """

    decodes_with_noise = False

    def __init__(
        self,
        centroids: Tensor,
        *,
        patch: int,
        resolution: int,
        training_data: str = "unknown",
        device: torch.device | str = "cpu",
    ) -> None:
        grid = check_grid(resolution, patch)
        dims = 3 * patch * patch
        if centroids.dtype != torch.uint8 or centroids.ndim != 2 or centroids.shape[1] != dims:
            raise UsageError(
                f"{FAMILY}: centroids of a patch of {patch} pixels are uint8 [V, {dims}], got "
                f"{str(centroids.dtype).removeprefix('torch.')} {list(centroids.shape)}"
            )
        self.patch = patch
        self.device = torch.device(device)
        self.centroids = centroids.to(self.device)
        self._codes = to_codes(self.centroids)
        self._exact = self.centroids.double()
        self._norms = self._exact.square().sum(1)  # [V]
        self.info = TokenizerInfo(
            name=FAMILY,
            family=FAMILY,
            kind="baseline",
            weights=f"fitted:{_content_digest(centroids, patch)}",
            parameters=centroids.numel(),
            message_length=grid * grid,
            vocab_size=centroids.shape[0],
            code_dim=dims,
            resolution=resolution,
            preprocessing=f"center_crop|resize({resolution},bilinear)",
            training_data=training_data,
            weights_licence="as the training data",
            options={"patch": str(patch)},
            configuration=configuration_digest({"patch": patch, "vocab": centroids.shape[0]}),
            version=VERSION,
        )

    def encode(self, images_u8: Tensor, *, policy: str | None = None, generators: Streams = None) -> Tokens:
        """See the contract; nothing about it is random."""
        check_images(images_u8, self.info)
        warn_policy(self.info.name, policy)
        patches = to_patches(images_u8.to(self.device), self.patch)
        ids = self._nearest(patches.flatten(0, 1)).view(patches.shape[:2])
        return Tokens(ids, self._codes[ids])

    def _nearest(self, patches: Tensor) -> Tensor:
        """Lowest index among the nearest centroids: uint8 [n, d] -> int64 [n]."""
        # |x - c|^2 without |x|^2, which is the same for all c. argmin returns the first minimum.
        parts = [
            (self._norms - 2.0 * (rows.double() @ self._exact.T)).argmin(1)
            for rows in patches.split(SEARCH_ROWS)
        ]
        return torch.cat(parts)

    def codes_from_ids(self, ids: Tensor) -> Tensor:
        """Centroids scaled to [-1, 1]; see the contract."""
        check_ids(ids, len(self.centroids))
        return self._codes[ids.to(self.device).long()]

    def decode(self, tokens: Tokens, *, seeds: Sequence[int]) -> Tensor:
        """Paste the centroids: uint8 [B, 3, S, S]; ``seeds`` are not used."""
        length = self.info.message_length
        if tokens.ids is None or tokens.ids.ndim != 2 or tokens.ids.shape[1] != length:
            got = "none" if tokens.ids is None else list(tokens.ids.shape)
            raise ValueError(f"{FAMILY} decodes ids of shape [B, {length}], got {got}")
        check_ids(tokens.ids, len(self.centroids))
        return from_patches(self.centroids[tokens.ids.to(self.device).long()], self.patch)

    @classmethod
    def fit(
        cls,
        images: Tensor | Iterable[Tensor],
        *,
        patch: int = 8,
        vocab: int = 1024,
        resolution: int = 32,
        seed: int = 0,
        training_data: str = "unknown",
        device: torch.device | str = "cpu",
    ) -> KMeansPatchTokenizer:
        """Fit the centroids on a deterministic sample of patches.

        Neither the way the images are cut into batches nor the number of threads changes the result.

        Args:
            images: uint8, one tensor [N, 3, S, S] or several [3, S, S] or [B, 3, S, S]; read once.
            patch: Side of one patch, in pixels.
            vocab: Number of centroids, V.
            resolution: S, a multiple of ``patch``.
            seed: Decides which patches are drawn and where the clusters start.
            training_data: Stored with the tokenizer and printed in tables.
            device: Where the fitted tokenizer computes; the fit itself runs on the CPU.

        Raises:
            UsageError: Sizes do not fit, or there are fewer patches than centroids.
            ValueError: Images of another type or shape.
        """
        check_settings(patch=patch, vocab=vocab, resolution=resolution)
        patches = _sample_patches(images, patch=patch, resolution=resolution, seed=seed)
        if len(patches) < vocab:
            raise UsageError(
                f"{FAMILY}: {len(patches)} training patches are too few for {vocab} centroids. "
                f"Use more images or a smaller vocabulary."
            )
        _log.info("fitting %d visual words to %d patches", vocab, len(patches))
        centroids = _cluster(patches, vocab, seed)
        return cls(
            torch.from_numpy(centroids),
            patch=patch,
            resolution=resolution,
            training_data=training_data,
            device=device,
        )

    @classmethod
    def fit_cached(
        cls,
        images_loader: Callable[[], Tensor | Iterable[Tensor]],
        key: Mapping[str, object],
        cache: Path,
        *,
        patch: int = 8,
        vocab: int = 1024,
        resolution: int = 32,
        seed: int = 0,
        training_data: str = "unknown",
        device: torch.device | str = "cpu",
    ) -> KMeansPatchTokenizer:
        """:meth:`fit`, once per settings and data: later calls read the stored centroids.

        A stored fit that is damaged is reported in the log and fitted again.

        Args:
            images_loader: Called only when a fit is needed; see ``images`` of :meth:`fit`.
            key: Whatever identifies the training images (data fingerprint, split, preprocessing).
            cache: Directory that holds all fits.
            patch: See :meth:`fit`, as for the other settings.
            vocab: Number of centroids.
            resolution: Side of the images.
            seed: Of the fit.
            training_data: Stored with the tokenizer.
            device: Where the tokenizer computes.
        """
        settings: dict[str, Any] = {
            "patch": patch,
            "vocab": vocab,
            "resolution": resolution,
            "seed": seed,
            "training_data": training_data,
        }
        folder = fit_folder(cache, settings, key)
        sweep(folder.parent)
        with suppress(MissingError, CorruptFileError):  # no lock to read, so a read-only cache will do
            return cls.load(folder, device=device)
        with locked(folder.with_name(f".{folder.name[:16]}.lock"), f"fitting {FAMILY} on the same images"):
            try:
                return cls.load(folder, device=device)
            except MissingError:
                pass
            except CorruptFileError as error:
                _log.warning("%s Fitting it again.", error)
            fitted = cls.fit(images_loader(), device=device, **settings)
            fitted.save(folder)
            return fitted

    def save(self, directory: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``; the whole directory or nothing."""
        config = {
            "family": FAMILY,
            "format": FORMAT_VERSION,
            "patch": self.patch,
            "resolution": self.info.resolution,
            "vocab": self.centroids.shape[0],
            "training_data": self.info.training_data,
            "weights": self.info.weights,
        }
        with atomic_path(directory) as temporary:
            temporary.mkdir()
            save_file({"centroids": self.centroids.cpu().contiguous()}, temporary / "model.safetensors")
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (temporary / "config.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, *, device: torch.device | str = "cpu") -> KMeansPatchTokenizer:
        """Read what :meth:`save` wrote."""
        config = read_config(directory)
        path = directory / "model.safetensors"
        if not path.exists():
            raise MissingError(f"{path}: not found. Fit the tokenizer again, or copy the whole directory.")
        _check_config(config, directory / "config.json")
        centroids = read_tensors(path).get("centroids")
        shape = (config["vocab"], 3 * config["patch"] ** 2)
        if centroids is None or centroids.dtype != torch.uint8 or tuple(centroids.shape) != shape:
            raise CorruptFileError(
                f"{path}: expected a uint8 tensor 'centroids' {list(shape)} as config.json says. "
                "Delete the directory and fit the tokenizer again."
            )
        tokenizer = cls(
            centroids,
            patch=config["patch"],
            resolution=config["resolution"],
            training_data=config["training_data"],
            device=device,
        )
        if tokenizer.info.weights != config["weights"]:
            raise CorruptFileError(
                f"{path}: its content is {tokenizer.info.weights}, but config.json was written for "
                f"{config['weights']}. Delete the directory and fit the tokenizer again."
            )
        return tokenizer


def load(
    name: str,
    *,
    weights: str | None = None,
    device: torch.device | str = "cpu",
    offline: bool = False,
    seed: int = 0,
    **options: Unpack[_Options],
) -> KMeansPatchTokenizer:
    """Load a fitted tokenizer; see :class:`~comit_bench.tokenizers.base.Loader`.

    Args:
        name: Directory, or ``kmeans-patch`` when ``weights`` is one.
        **options: ``patch``, ``resolution``, ``vocab``: must be those of the fit.
    """
    if weights == "random":
        raise UsageError(f"{FAMILY} has no random weights: it is fitted on images. Leave --weights away.")
    directory = Path(weights or name).expanduser()
    if not directory.is_dir():
        raise MissingError(f"{directory}: no such directory. Give one that a fitted {FAMILY} was saved to.")
    tokenizer = KMeansPatchTokenizer.load(directory, device=device)
    info = tokenizer.info
    known = {"patch": tokenizer.patch, "resolution": info.resolution, "vocab": info.vocab_size}
    refuse_unknown(options, known, FAMILY)
    for option, value in options.items():
        if value != known[option]:
            raise UsageError(
                f"{directory}: was fitted with {option} {known[option]}, not {value}. Fit it again."
            )
    return tokenizer


def check_settings(*, patch: int = 8, vocab: int = 1024, resolution: int = 32) -> None:
    """Refuse settings of a fit that cannot be, before images are read."""
    check_grid(resolution, patch)
    if type(vocab) is not int or not 1 <= vocab <= MAX_PATCHES:
        raise UsageError(
            f"{FAMILY}: vocab must be a whole number of centroids from 1 to {MAX_PATCHES}, got {shown(vocab)}"
        )


def fit_folder(cache: Path, settings: Mapping[str, object], key: Mapping[str, object]) -> Path:
    """Where a fit lies: named by everything that can change its bytes."""
    payload = {
        "format": FORMAT_VERSION,
        "settings": dict(settings),
        "sample": [MAX_PATCHES, PASSES, FIT_BATCH],
        "scikit-learn": version("scikit-learn"),
        "data": dict(key),
    }
    return cache / FAMILY / digest_json(payload).removeprefix("sha256:")


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    wanted = {"patch": int, "resolution": int, "vocab": int, "training_data": str, "weights": str}
    wrong = [k for k, kind in wanted.items() if type(config.get(k)) is not kind]
    if "vocab" not in wrong and config["vocab"] < 1:
        wrong.append("vocab")
    if config.get("family") != FAMILY or config.get("format") != FORMAT_VERSION or wrong:
        detail = f" ({', '.join(wrong)} missing or of another type)" if wrong else ""
        raise CorruptFileError(
            f"{path}: not a {FAMILY} tokenizer of format {FORMAT_VERSION}{detail}. "
            "Delete the directory and fit the tokenizer again."
        )
    try:
        check_grid(config["resolution"], config["patch"])
    except UsageError as error:
        raise CorruptFileError(f"{path}: {error}") from error


def _content_digest(centroids: Tensor, patch: int) -> str:
    """sha256 (hex) over patch, shape and values: equal centroids, equal digest, wherever they lie."""
    header = f"{FAMILY}/{FORMAT_VERSION} {patch} {tuple(centroids.shape)} "
    return hashlib.sha256(header.encode() + centroids.cpu().contiguous().numpy().tobytes()).hexdigest()


def _batches(images: Tensor | Iterable[Tensor], resolution: int) -> Iterator[Tensor]:
    """uint8 [b, 3, S, S] on the CPU, checked."""
    if isinstance(images, Tensor):
        images = images.split(256) if images.ndim == 4 else [images]
    for part in images:
        batch = part[None] if part.ndim == 3 else part
        if batch.dtype != torch.uint8 or batch.shape[1:] != (3, resolution, resolution):
            raise ValueError(
                f"{FAMILY} is fitted on uint8 images [3, {resolution}, {resolution}], got "
                f"{str(part.dtype).removeprefix('torch.')} {list(part.shape)}"
            )
        yield batch.cpu()


def _sample_patches(
    images: Tensor | Iterable[Tensor], *, patch: int, resolution: int, seed: int
) -> NDArray[np.uint8]:
    """At most MAX_PATCHES patches [n, d] in the order of the images, each equally likely.

    Every patch of the stream draws a number and the lowest are kept: memory stays bounded, and the
    sample does not depend on how the stream is cut into batches.
    """
    rng = np.random.default_rng(seed)
    patches = np.empty((0, 3 * patch * patch), dtype=np.uint8)
    draws = np.empty(0, dtype=np.float64)
    waiting: list[NDArray[np.uint8]] = []

    def keep_lowest() -> None:
        nonlocal patches, draws
        joined = np.concatenate([patches, *waiting])
        drawn = np.concatenate([draws, rng.random(len(joined) - len(draws))])
        kept = np.sort(np.argsort(drawn, kind="stable")[:MAX_PATCHES])
        patches, draws = joined[kept], drawn[kept]
        waiting.clear()

    for batch in _batches(images, resolution):
        waiting.append(to_patches(batch, patch).flatten(0, 1).numpy())
        if sum(map(len, waiting)) >= MAX_PATCHES:
            keep_lowest()
    keep_lowest()
    return patches


def _cluster(patches: NDArray[np.uint8], vocab: int, seed: int) -> NDArray[np.uint8]:
    """uint8 centroids [V, d] of uint8 patches [n, d], ordered from dark to bright."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    model = MiniBatchKMeans(
        vocab,
        init="k-means++",
        n_init=1,
        init_size=3 * vocab,
        max_iter=PASSES,
        batch_size=FIT_BATCH,
        tol=0.0,
        max_no_improvement=None,
        reassignment_ratio=0.0,
        compute_labels=False,
        random_state=seed,
    )
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct patches than centroids
        centers: NDArray[np.float64] = model.fit(patches.astype(np.float64)).cluster_centers_
    # The mean of a few pixels may be exactly a half: the margin takes it upwards on every processor.
    grid = np.clip(np.floor(centers + 0.5 + 1e-6), 0, 255).astype(np.uint8)
    brightness = grid.sum(axis=1, dtype=np.int64)
    return grid[np.lexsort((*grid.T[::-1], brightness))]
