"""Frozen networks whose features the alignment losses of COMiT's training follow.

``dinov2-b`` and ``dinov2-l`` are timm's DINOv2 (Oquab et al., 2023; weights from the hub or a file);
``scenes-teacher`` is our own small convolutional network for 32 px scenes, always from a directory.
Every teacher gives one vector per image and a grid of patch vectors, resized to the token grid of the
network that is trained. Nothing here is ever trained through: features carry no gradient.

Shape legend: ``B`` images, ``S`` image side, ``g`` grid side, ``X`` = g*g, ``D1`` / ``D2`` vector sizes.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comit_bench.errors import CorruptFileError, MissingError, UsageError, shown
from comit_bench.nn.plain_files import read_json
from comit_bench.nn.state_dicts import INDEX, check_types, compare, fill, read, select

DINOV2 = {
    "dinov2-b": "vit_base_patch14_dinov2.lvd142m",
    "dinov2-l": "vit_large_patch14_dinov2.lvd142m",
}
TEACHERS = ("none", *DINOV2, "scenes-teacher")
WEIGHTS = "model.safetensors"
LARGEST = 1 << 14  # of every size of a scenes-teacher
SMALLEST_GRID, LARGEST_GRID = 8, 37  # patches per side that DINOv2 is run on: 112 to 518 px
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, eq=False)
class TeacherFeatures:
    """Features of some images: ``cls`` float32 [B, D1], ``patches`` float32 [B, X, D2], row-major."""

    cls: Tensor
    patches: Tensor

    def to(self, device: torch.device | str) -> TeacherFeatures:
        """Move both."""
        return TeacherFeatures(
            self.cls.to(device, non_blocking=True), self.patches.to(device, non_blocking=True)
        )

    def select(self, rows: slice | Tensor) -> TeacherFeatures:
        """The features of some of the images."""
        return TeacherFeatures(self.cls[rows], self.patches[rows])


class Teacher(Protocol):
    """What training asks of a teacher; ``dims`` is (D1, D2)."""

    dims: tuple[int, int]

    def features(self, images: Tensor) -> TeacherFeatures:
        """[B, 3, S, S] in [-1, 1] -> features without gradient."""
        ...

    def identity(self) -> dict[str, object]:
        """Everything that determines the features of an image, as plain JSON values."""
        ...


def weights_digest(network: nn.Module) -> str:
    """``sha256:<hex>`` over names, types, shapes and values of all tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return "sha256:" + digest.hexdigest()


def resize_pixels(images: Tensor, side: int) -> Tensor:
    """[B, 3, S, S] -> [B, 3, side, side], bicubic with antialiasing; unchanged when it fits."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True, align_corners=False)


def fit_grid(patches: Tensor, grid: int) -> Tensor:
    """Patch features on another grid: [B, D, g, g] -> [B, grid*grid, D], bilinear with antialiasing."""
    if patches.shape[-2:] != (grid, grid):
        patches = F.interpolate(patches, (grid, grid), mode="bilinear", antialias=True, align_corners=False)
    return patches.flatten(2).transpose(1, 2)


class DinoTeacher:
    """A timm vision transformer as teacher.

    The input is resized so that the patch grid is the token grid. Outside 8 to 37 patches per side
    (37 is what the network was trained on last) the nearest of these is run and its patch features
    are resized.

    Args:
        network: Made with ``dynamic_img_size=True``; frozen here.
        grid: Token grid side.
        device: Where it runs.

    Raises:
        UsageError: ``grid`` is not positive.
    """

    def __init__(self, network: Any, *, grid: int, device: torch.device | str = "cpu") -> None:
        _check_grid(grid)
        self.network = network.to(device).requires_grad_(False).eval()
        self.grid = grid
        self.run_grid = min(max(grid, SMALLEST_GRID), LARGEST_GRID)
        self.dims = (int(network.num_features), int(network.num_features))
        self._side = self.run_grid * int(network.patch_embed.patch_size[0])
        self._prefix = int(network.num_prefix_tokens)
        self._mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
        self._std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)

    @torch.no_grad()
    def features(self, images: Tensor) -> TeacherFeatures:
        """[B, 3, S, S] in [-1, 1] -> features, under the ambient autocast."""
        pixels = resize_pixels((images + 1) / 2, self._side)
        tokens = self.network.forward_features((pixels - self._mean) / self._std).float()
        patches = tokens[:, self._prefix :].transpose(1, 2).unflatten(2, (self.run_grid, self.run_grid))
        return TeacherFeatures(tokens[:, 0], fit_grid(patches, self.grid))

    def identity(self) -> dict[str, object]:
        """See :class:`Teacher`."""
        return {
            "kind": "dinov2",
            "weights": weights_digest(self.network),
            "preprocessing": f"bicubic({self._side})|imagenet",
            "grid": [self.run_grid, self.grid],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ScenesTeacherSpec:
    """Everything that determines a :class:`ScenesTeacherNet`; stands in its ``config.json``.

    ``patch`` is the pixels per patch feature, a power of two; ``dim`` the size of both outputs.
    """

    image_size: int = 32
    patch: int = 4
    width: int = 64
    depth: int = 2
    dim: int = 128

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or not int(name != "depth") <= value <= LARGEST:
                raise ValueError(
                    f"{name} must be a positive whole number up to {LARGEST}, found {shown(value)}"
                )
        if self.patch & (self.patch - 1) or self.image_size % (2 * self.patch):
            raise ValueError(
                f"patch {self.patch} must be a power of two and twice it must divide {self.image_size}"
            )
        if self.width % 8:
            raise ValueError(f"width {self.width} must be a multiple of 8 (normalisation groups)")


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return out


class ScenesTeacherNet(nn.Module):
    """Small residual convolutional network; group norms, so an image's features are its own.

    Halves the resolution down to one cell per patch (patch features), then once more; the image
    vector is a linear map of the flattened last grid, because where things are matters in scenes.
    Outputs are standardised by stored statistics, which training sets at its end.
    """

    cls_mean: Tensor
    cls_deviation: Tensor
    patch_mean: Tensor
    patch_deviation: Tensor

    def __init__(self, spec: ScenesTeacherSpec) -> None:
        super().__init__()
        self.spec = spec
        for name in ("cls", "patch"):
            self.register_buffer(f"{name}_mean", torch.zeros(spec.dim))
            self.register_buffer(f"{name}_deviation", torch.ones(spec.dim))
        self.stem = nn.Conv2d(3, spec.width, 3, padding=1)
        stages: list[nn.Module] = []
        for _ in range(int(math.log2(spec.patch))):
            stages += [nn.Conv2d(spec.width, spec.width, 2, stride=2)]
            stages += [_Residual(spec.width) for _ in range(spec.depth)]
        self.trunk = nn.Sequential(*stages)
        self.to_patches = nn.Sequential(
            nn.GroupNorm(8, spec.width), nn.SiLU(), nn.Conv2d(spec.width, spec.dim, 1)
        )
        self.tail = nn.Sequential(
            nn.Conv2d(spec.width, spec.width, 2, stride=2),
            *(_Residual(spec.width) for _ in range(spec.depth)),
            nn.GroupNorm(8, spec.width),
            nn.SiLU(),
        )
        cells = (spec.image_size // (2 * spec.patch)) ** 2
        self.to_cls = nn.Linear(spec.width * cells, spec.dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] in [-1, 1] -> image vectors [B, dim] and patches [B, dim, S/patch, S/patch]."""
        x = self.trunk(self.stem(images))
        cls = (self.to_cls(self.tail(x).flatten(1)) - self.cls_mean) / self.cls_deviation
        mean, deviation = self.patch_mean[:, None, None], self.patch_deviation[:, None, None]
        return cls, (self.to_patches(x) - mean) / deviation

    def forget_statistics(self) -> None:
        """Back to outputs that are not standardised."""
        for name in ("cls", "patch"):
            getattr(self, f"{name}_mean").zero_()
            getattr(self, f"{name}_deviation").fill_(1.0)


class ScenesTeacher:
    """A frozen :class:`ScenesTeacherNet`; other image sizes and grids are resized to and from its own."""

    def __init__(self, network: ScenesTeacherNet, *, grid: int, device: torch.device | str = "cpu") -> None:
        _check_grid(grid)
        self.network = network.to(device).requires_grad_(False).eval()
        self.grid = grid
        self.dims = (network.spec.dim, network.spec.dim)

    @torch.no_grad()
    def features(self, images: Tensor) -> TeacherFeatures:
        """[B, 3, S, S] in [-1, 1] -> features, under the ambient autocast."""
        cls, patches = self.network(resize_pixels(images, self.network.spec.image_size))
        return TeacherFeatures(cls.float(), fit_grid(patches.float(), self.grid))

    def identity(self) -> dict[str, object]:
        """See :class:`Teacher`."""
        spec = self.network.spec
        return {
            "kind": "scenes-teacher",
            "weights": weights_digest(self.network),
            "preprocessing": f"bicubic({spec.image_size})",
            "grid": [spec.image_size // spec.patch, self.grid],
        }


def _check_grid(grid: int) -> None:
    if grid < 1:
        raise UsageError(f"the token grid must have at least one row, got {grid}")


def load_teacher(
    name: str, *, path: Path | None, grid: int, device: torch.device | str = "cpu"
) -> Teacher | None:
    """Load a teacher.

    Args:
        name: ``none``, ``dinov2-b``, ``dinov2-l`` or ``scenes-teacher``.
        path: Weights: for DINOv2 a ``.safetensors`` or ``.pth`` file (timm's or the original release's
            keys) or a directory that holds one, None asks the hub; for the scenes-teacher a directory
            with ``config.json`` and ``model.safetensors``.
        grid: Token grid side of the network to be trained.
        device: Where it runs.

    Returns:
        None for ``none``.

    Raises:
        MissingError: The weights are not here and cannot be fetched.
        UsageError: Unknown name, or weights of another network.
        CorruptFileError: Damaged files.
    """
    if name == "none":
        return None
    if name == "scenes-teacher":
        return ScenesTeacher(_read_scenes_teacher(path), grid=grid, device=device)
    if name in DINOV2:
        return DinoTeacher(_read_dino(name, path), grid=grid, device=device)
    raise UsageError(f"unknown teacher {name!r}: expected {', '.join(TEACHERS)}")


def _read_scenes_teacher(path: Path | None) -> ScenesTeacherNet:
    if path is None:
        raise MissingError("scenes-teacher: needs the directory of its weights")
    config_file, weights = path / "config.json", path / WEIGHTS
    for file in (config_file, weights):
        if not file.exists():
            raise MissingError(f"{file}: not found. A scenes-teacher is config.json and {WEIGHTS}.")
    config = read_json(config_file)
    try:
        spec = ScenesTeacherSpec(**config)
    except (TypeError, ValueError) as error:
        known = ", ".join(asdict(ScenesTeacherSpec()))
        raise CorruptFileError(f"{config_file}: no scenes-teacher ({error}); its keys are {known}") from error
    with torch.device("meta"):
        network = ScenesTeacherNet(spec)
    _fill(network, _read(weights, ("stem", "trunk", "to_cls")), weights)
    return network


def _read_dino(name: str, path: Path | None) -> nn.Module:
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    weights = _download(DINOV2[name]) if path is None else _weight_file(path)
    tensors = _read(weights, ("patch_embed.proj", "blocks", "cls_token"))
    network: nn.Module = timm.create_model(
        DINOV2[name], pretrained=False, dynamic_img_size=True, num_classes=0
    )
    try:
        fitting = checkpoint_filter_fn(tensors, network)  # type: ignore[arg-type]
    except Exception as error:  # it assumes the keys of a vision transformer
        raise UsageError(f"{weights}: not the weights of {DINOV2[name]} ({error!r})") from error
    _fill(network, fitting, weights)
    return network


def _weight_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise MissingError(f"{path}: no file and no directory")
    if shards := sorted(path.glob(f"*{INDEX}")):
        return shards[0]
    found = sorted([*path.glob("*.safetensors"), *path.glob("*.pth"), *path.glob("*.bin")])
    preferred = [p for p in found if p.name == WEIGHTS] or found
    if not preferred:
        raise MissingError(f"{path}: no file and no directory with a .safetensors, .pth or .bin file")
    if len(preferred) > 1:
        names = ", ".join(p.name for p in preferred)
        raise UsageError(f"{path} holds several weight files ({names}): name the one that is meant")
    return preferred[0]


def _download(model: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    repository = f"timm/{model}"
    try:
        return Path(hf_hub_download(repository, WEIGHTS))
    except (HfHubHTTPError, OSError) as error:
        raise MissingError(
            f"{WEIGHTS} of {repository} is not on this machine and could not be downloaded "
            f"({type(error).__name__}). Fetch it where there is a network (huggingface-cli download "
            f"{repository} {WEIGHTS}) and set teacher.path to the file."
        ) from error


def _read(path: Path, landmarks: tuple[str, ...]) -> dict[str, Tensor]:
    tensors, nested = read(path)
    return select(tensors, landmarks, path, nested=nested)


def _fill(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    expected = network.state_dict()
    compare(expected, tensors, path, what=type(network).__name__)
    check_types(expected, tensors, path)
    fill(network, tensors)
