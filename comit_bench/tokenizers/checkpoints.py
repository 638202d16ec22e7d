"""Reading released checkpoints: find the files, check every key and shape, then load.

safetensors, unless somebody names one pickle, which is then read as plain tensors and nothing else. One
rule for all families: ``comit-bench weights fetch | convert NAME`` may read the released pickle of that
name, for the command itself names it; a pickle that is to be loaded as a tokenizer must be allowed with
``--option allow_pickle=true`` (:func:`require_allowed`).
A checkpoint that does not fit is refused with a list of what is missing, unexpected or of another shape,
before anything is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from comit_bench.errors import CorruptFileError, MissingError, UsageError
from comit_bench.files import atomic_path

WEIGHT_FILES = ("model.safetensors", "weights.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
ATTENTION_NAMES = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
SHOWN = 8


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint directory.

    Raises:
        MissingError: No such file.
        CorruptFileError: Not a JSON object.
    """
    import json

    path = directory / "config.json"
    if not path.is_file():
        raise MissingError(
            f"{path}: not found. A checkpoint directory holds config.json and {WEIGHT_FILES[0]}."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path}: not valid JSON ({error}). Download it again.") from error
    if not isinstance(config, dict):
        raise CorruptFileError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def weight_file(directory: Path) -> Path:
    """The weights of a checkpoint directory.

    Raises:
        MissingError: None of the accepted names exists.
    """
    for name in WEIGHT_FILES:
        if (directory / name).is_file():
            return directory / name
    raise MissingError(f"{directory}: found neither {' nor '.join(WEIGHT_FILES)}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CorruptFileError: Truncated, empty or not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, EOFError) as error:
        raise CorruptFileError(
            f"{path}: not a readable safetensors file ({error}). It is truncated or of another format: "
            "download or export it again."
        ) from error


def require_allowed(path: Path, allow: bool) -> None:
    """The one place where a pickle that is loaded as a tokenizer is let through.

    Raises:
        UsageError: It was not allowed.
    """
    if not allow:
        raise UsageError(
            f"{path}: a pickled checkpoint. It is read as tensors only, but even that must be asked for: "
            "add --option allow_pickle=true, or convert it to safetensors (`comit-bench weights convert NAME "
            "FILE` for released files)."
        )


def read_pickled(path: Path, *, allow: bool) -> dict[str, Tensor]:
    """A flat state dict out of a torch file, without running any code that the file may hold.

    Args:
        path: A ``.bin``, ``.pt`` or ``.pth`` file.
        allow: Whether the user has allowed this (``--option allow_pickle=true``).

    Raises:
        UsageError: Not allowed.
        CorruptFileError: Damaged, or it holds more than tensors.
    """
    import torch

    require_allowed(path, allow)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged files make torch.load raise almost anything
        raise CorruptFileError(
            f"{path}: not a readable checkpoint of plain tensors ({str(error).splitlines()[0]}). It is "
            "truncated, of another format, or holds objects that may not be loaded: download it again or "
            "convert it to safetensors."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise CorruptFileError(f"{path}: expected a flat dictionary of tensors, found {type(found).__name__}")
    return {str(key): value for key, value in found.items()}


def modern_attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the attention layers of old diffusers autoencoders to today's names and shapes."""
    renamed = {}
    for key, value in tensors.items():
        if ".attentions." in key:
            for old, new in ATTENTION_NAMES:
                key = key.replace(f".{old}.", f".{new}.")
            projection = any(f".{new}." in key for _, new in ATTENTION_NAMES)
            value = value[:, :, 0, 0] if projection and value.ndim == 4 else value
        renamed[key] = value
    return renamed


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
            temporary,
            metadata={"format": "pt"},
        )


def _some(items: list[str]) -> str:
    more = f" … and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


def check_tensors(
    expected: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    source: Path,
    *,
    what: str,
    optional: tuple[str, ...] = (),
) -> None:
    """Compare keys and shapes.

    Args:
        expected: State dict of the network, on any device.
        tensors: The checkpoint.
        source: File named in the error.
        what: What it should fit.
        optional: Prefixes of keys that may be absent.

    Raises:
        UsageError: Lists missing keys, unexpected keys and shapes that differ.
    """
    missing = [k for k in expected if k not in tensors and not k.startswith(optional or ("\0",))]
    unexpected = [k for k in tensors if k not in expected]
    shapes = [
        f"{k} {list(tensors[k].shape)} instead of {list(v.shape)}"
        for k, v in expected.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    if missing or unexpected or shapes:
        lines = [f"{source}: this checkpoint does not fit {what}"]
        for title, items in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes)):
            if items:
                lines.append(f"  {title} ({len(items)}): {_some(items)}")
        lines.append("Check that config.json and the weights belong together.")
        raise UsageError("\n".join(lines))


def load_checked(
    module: nn.Module, tensors: Mapping[str, Tensor], source: Path, *, optional: tuple[str, ...] = ()
) -> None:
    """Load ``tensors`` into ``module`` (which may be on the meta device) as float32.

    Args:
        module: Network whose state dict names the expected keys.
        tensors: The checkpoint.
        source: File named in the error.
        optional: Prefixes of keys that may be absent (they must be initialised already).

    Raises:
        UsageError: Lists missing keys, unexpected keys and shapes that differ.
    """
    check_tensors(
        module.state_dict(),
        tensors,
        source,
        what=f"{type(module).__name__} as config.json describes it",
        optional=optional,
    )
    module.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False, assign=True)
