"""Frozen networks that judge reconstructions: features for Fréchet distances, and LPIPS.

Nothing is downloaded here. Inception's weights are looked for in ``COMIT_BENCH_INCEPTION`` and where
torch-fidelity keeps its own; those of LPIPS where torchvision keeps its own. Pickled files are read as
plain tensors only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from comit_bench.errors import BenchError, CorruptFileError, MissingError
from comit_bench.files import sha256_file, shipped_weights, user_path
from comit_bench.nn.precision import exact_products
from comit_bench.nn.teachers import load_teacher
from comit_bench.tokenizers.checkpoints import check_values, read_floats, read_weights

FeatureName = Literal["inception", "scenes-teacher"]
LpipsName = Literal["alex", "vgg", "squeeze"]
INCEPTION_VARIABLE = "COMIT_BENCH_INCEPTION"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_LAYER = "2048"
EXTRA = "pip install 'comit-bench[metrics]'"
SCENES_TEACHER = "scenes-teacher"
LPIPS_BACKBONES: dict[LpipsName, str] = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
TILE = 16  # images per call, whatever the batch size


class FeatureNetwork(Protocol):
    """Turns images into vectors that are compared as sets; :func:`feature_identity` says which."""

    def __call__(self, images_u8: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] on any device -> float32 [B, D] on the CPU."""
        ...


class ScenesTeacherFeatures:
    """Image vectors of the scenes-teacher that comes with the package."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._teacher: Any = load_teacher(
            SCENES_TEACHER, path=shipped_weights(SCENES_TEACHER), grid=1, device=device
        )

    def __call__(self, images_u8: Tensor) -> Tensor:
        pixels = images_u8.to(self.device).float().div(127.5).sub(1)
        return _tiled(lambda tile: self._teacher.features(tile).cls, pixels, name=SCENES_TEACHER)


class InceptionFeatures:
    """The 2048 pooled features of torch-fidelity's ``inception-v3-compat``, as FID is computed with them."""

    def __init__(self, path: Path, device: torch.device) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.device = device
        again = BytesIO()  # the extractor reads a pickle: it is handed one that we wrote
        tensors = read_plain_tensors(path, ("Conv2d_1a_3x3", "Mixed_5b", "fc"))
        torch.save(tensors, again)
        again.seek(0)
        try:
            self._network: Any = FeatureExtractorInceptionV3(
                "inception-v3-compat", [INCEPTION_LAYER], feature_extractor_weights_path=again
            ).to(device)
        except RuntimeError as error:
            raise CorruptFileError(
                f"{path}: not the weights of torch-fidelity's Inception ({str(error).splitlines()[0]}). "
                f"{_how_to_get_inception()}"
            ) from error
        check_values(self._network.state_dict(), tensors, path)

    def __call__(self, images_u8: Tensor) -> Tensor:
        return _tiled(lambda tile: self._network(tile)[0], images_u8.to(self.device), name="inception")


def _tiled(function: Callable[[Tensor], Tensor], images: Tensor, *, name: str) -> Tensor:
    """Call ``function`` on ``TILE`` images at a time, the last tile padded by repetition."""
    total = len(images)
    parts = []
    with torch.inference_mode(), exact_products(images.device):
        for start in range(0, total, TILE):
            index = torch.arange(start, start + TILE, device=images.device).clamp_(max=total - 1)
            parts.append(function(images[index]).float())
        found = torch.cat(parts)[:total].cpu()
    if not bool(found.isfinite().all()):
        raise BenchError(
            f"{name}: what it computes is not finite (NaN or infinity), so it cannot judge images. Its "
            "weights are damaged: fetch them again."
        )
    return found


def read_plain_tensors(path: Path, landmarks: Sequence[str] = ()) -> dict[str, Tensor]:
    """A state dict from safetensors or a pickled file, never running any code of it.

    Args:
        path: The file.
        landmarks: Beginnings of its keys, to find it under an entry or a prefix.

    Raises:
        MissingError: No such file.
        CorruptFileError: Not such a file.
    """
    return read_weights(path, landmarks, allow_pickle=True)


def find_inception() -> Path:
    """The file of Inception's weights."""
    try:
        version("torch-fidelity")
    except PackageNotFoundError as error:
        raise MissingError(f"rFID needs torch-fidelity: {EXTRA}") from error
    named = os.environ.get(INCEPTION_VARIABLE)
    if named:
        path = user_path(named, INCEPTION_VARIABLE)
        if not path.is_file():
            raise MissingError(f"{INCEPTION_VARIABLE}={named}: no such file. {_how_to_get_inception()}")
        return path
    path = _hub_folder() / INCEPTION_FILE
    if not path.is_file():
        raise MissingError(
            f"{path}: the weights of Inception, for rFID, are not here. {_how_to_get_inception()}"
        )
    return path


def _how_to_get_inception() -> str:
    target = _hub_folder() / INCEPTION_FILE
    return (
        f"Where there is a network: curl -L --create-dirs -o {target} {INCEPTION_URL} (95 MB). Or set "
        f"{INCEPTION_VARIABLE} to the file."
    )


def _hub_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def feature_network(name: FeatureName, device: torch.device) -> FeatureNetwork:
    """Load a feature network.

    Raises:
        MissingError: Its weights are not here.
        CorruptFileError: They are not its weights.
    """
    if name == "inception":
        return InceptionFeatures(find_inception(), device)
    return ScenesTeacherFeatures(device)


def feature_identity(name: FeatureName) -> dict[str, object]:
    """Everything that determines the vector of an image, as plain JSON values; part of the protocol.

    Raises:
        MissingError: Its weights are not here.
    """
    if name == "inception":
        return {
            "network": "inception-v3-compat",
            "weights": _digest(find_inception()),
            "vector": INCEPTION_LAYER,
        }
    weights = shipped_weights(SCENES_TEACHER) / "model.safetensors"
    return {"network": SCENES_TEACHER, "weights": _digest(weights), "vector": "cls"}


def _digest(path: Path) -> str:
    state = path.stat()
    return _digest_once(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=8)
def _digest_once(path: Path, changed: int, size: int) -> str:
    return sha256_file(path)


def why_no_lpips(name: LpipsName) -> str | None:
    """What is missing for LPIPS, and how to get it; None when it is all here."""
    for package in ("torchmetrics", "torchvision"):
        try:
            version(package)
        except PackageNotFoundError:
            return f"{package} is not installed: {EXTRA}"
    path = _hub_folder() / LPIPS_BACKBONES[name]
    if path.is_file():
        return None
    url = f"https://download.pytorch.org/models/{path.name}"
    return f"the weights of its backbone are not here: curl -L --create-dirs -o {path} {url}"


def load_lpips(name: LpipsName, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (Zhang et al. 2018) as torchmetrics computes it.

    Args:
        name: Backbone.
        device: Where it runs.

    Returns:
        uint8 [B, 3, S, S] twice -> float64 [B] on the CPU, one number per image.
    """
    reason = why_no_lpips(name)
    if reason is not None:
        raise MissingError(f"LPIPS: {reason}")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    path = _hub_folder() / LPIPS_BACKBONES[name]
    read_floats(path, ("features",), allow_pickle=True)
    try:
        network: Any = LearnedPerceptualImagePatchSimilarity(net_type=name).net.to(device)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CorruptFileError(
            f"{path}: not the weights that LPIPS ({name}) needs ({str(error).splitlines()[0]}). Fetch it "
            "again."
        ) from error

    def scores(one: Tensor, two: Tensor) -> Tensor:
        pairs = torch.stack([one, two], dim=1).to(device)

        def tile(images: Tensor) -> Tensor:
            pixels = images.float().div(127.5).sub(1)
            out: Tensor = network(pixels[:, 0], pixels[:, 1])
            return out.flatten(1)

        return _tiled(tile, pairs, name=f"LPIPS ({name})").double()[:, 0]

    return scores
