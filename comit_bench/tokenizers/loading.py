"""``load_tokenizer``: the one way from a name, hub id or directory to a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from comit_bench.errors import MissingError, UsageError, did_you_mean
from comit_bench.registry import TokenizerEntry, find_tokenizer, tokenizers
from comit_bench.tokenizers.base import Tokenizer
from comit_bench.tokenizers.checkpoints import read_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(name: str = "auto") -> torch.device:
    """``auto`` is CUDA when there is one, else the CPU.

    Raises:
        UsageError: Unknown device, or CUDA asked for where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"--device {name}: this machine has no usable CUDA device. Use --device cpu or auto."
        )
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``float32`` everywhere; ``bfloat16`` (autocast) on CUDA only.

    Raises:
        UsageError: Unknown dtype, or bfloat16 on the CPU, where it is pathologically slow.
    """
    if name not in DTYPES:
        raise UsageError(f"--dtype {name!r}: not one of {', '.join(DTYPES)}.{did_you_mean(name, DTYPES)}")
    if DTYPES[name] is not torch.float32 and device.type != "cuda":
        raise UsageError(f"--dtype {name} needs a CUDA device; on {device.type} use float32.")
    return DTYPES[name]


def _is_comit(config: dict[str, Any]) -> bool:
    predictor = config.get("predictor")
    return isinstance(predictor, dict) and str(predictor.get("_target_", "")).endswith("RuledDiT")


def _is_titok(config: dict[str, Any]) -> bool:
    model = config.get("model")
    return isinstance(model, dict) and isinstance(model.get("vq_model"), dict)


def _is_flextok(config: dict[str, Any]) -> bool:
    inner = config.get("config", {})  # some files wrap everything in one more node
    blocks = config if "encoder" in config else inner if isinstance(inner, dict) else {}
    parts = (blocks.get("encoder"), blocks.get("decoder"))
    return all(isinstance(part, dict) and isinstance(part.get("module_dict"), dict) for part in parts)


def _is_selftok(config: dict[str, Any]) -> bool:
    encoder = config.get("encoder")
    kind = config.get("kind") in ("tokenizer", "renderer")
    return config.get("system") == "selftok" or (
        kind and isinstance(encoder, dict) and "query_dim" in encoder
    )


# How the released config.json of a family is recognised.
SIGNS: tuple[tuple[str, Callable[[dict[str, Any]], bool]], ...] = (
    ("comit", _is_comit),
    ("titok", _is_titok),
    ("flextok", _is_flextok),
    ("alit", lambda config: config.get("system") == "alit"),
    ("selftok", _is_selftok),
    ("vqmodel", lambda config: config.get("_class_name") == "VQModel"),
)


def _family_of(directory: Path) -> str:
    config = read_config(directory)
    if isinstance(config.get("family"), str):
        return str(config["family"])
    for family, recognises in SIGNS:
        if recognises(config):
            return family
    families = sorted({entry.family for entry in tokenizers().values()})
    raise UsageError(
        f"{directory / 'config.json'}: cannot tell which tokenizer family this is (known: "
        f"{', '.join(families)}). Is it the right directory? Otherwise pass family=NAME."
    )


def entry_for(name: str, family: str | None = None) -> TokenizerEntry:
    """The registry entry behind a name, hub id or directory.

    Raises:
        MissingError: A path that does not exist.
        UsageError: Unknown name, or a directory that is no checkpoint.
    """
    directory = Path(name).expanduser()
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not directory.is_dir():
        raise MissingError(
            f"{name}: no such directory. A checkpoint is a directory with config.json and model.safetensors."
        )
    if family is None and directory.is_dir():
        family = _family_of(directory)
    if family is None and "/" in name and not looks_like_path:
        repository = name.split("/")[-1].lower()
        family = next((known for known, _ in SIGNS if known in repository), None)
    if family is not None:
        known = {entry.family: entry for entry in tokenizers().values()}
        if family not in known:
            raise UsageError(f"unknown tokenizer family {family!r}.{did_you_mean(family, known)}")
        return known[family]
    return find_tokenizer(name)


def load_tokenizer(
    name_or_path: str,
    *,
    weights: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    offline: bool = False,
    family: str | None = None,
    **options: Any,
) -> Tokenizer:
    """Load a tokenizer.

    Args:
        name_or_path: A name of ``comit-bench ls tokenizers`` (case does not matter), a hub id, or a
            directory with ``config.json`` and ``model.safetensors`` (or ``weights.safetensors``).
        weights: Directory to take the weights from, or ``random`` for an untrained network.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``; with random weights also ``meta``, where nothing is
            drawn or computed and arithmetic can be counted.
        dtype: ``float32`` or, on CUDA, ``bfloat16``.
        offline: Never ask the hub.
        family: Settles doubt about a directory or hub id.
        **options: Options of the family, e.g. ``posterior="sample"``.

    Raises:
        UsageError: Unknown name, option, device or a checkpoint that does not fit.
        MissingError: Weights that are not here and cannot be had.
        CorruptFileError: A file that cannot be read.
    """
    entry = entry_for(name_or_path, family)
    if entry.fitted and weights is None and not Path(name_or_path).is_dir():
        raise UsageError(
            f"{entry.name} is fitted on the images of a data set: `comit_bench.run` does that by itself; "
            "in Python use comit_bench.tokenizers.kmeans, or pass the directory of a fitted one."
        )
    place = resolve_device(device)
    loader = entry.loader()
    loaded: Tokenizer = loader(
        name_or_path,
        weights=weights,
        device=place,
        offline=offline,
        **({"dtype": resolve_dtype(dtype, place)} if dtype != "float32" else {}),
        **options,
    )
    return loaded
