"""Checkpoints: find the files, check every name, shape, type and value, then load.

safetensors, unless somebody names one pickle, which is then read as plain tensors and nothing else. One
rule for all families: ``comit-bench weights fetch | convert NAME`` may read the released pickle of that
name, for the command itself names it; a pickle that is to be loaded as a tokenizer must be allowed with
``--option allow_pickle=true`` (:func:`require_allowed`).
What a file is and what of it is taken, ``comit_bench.nn.state_dicts`` decides for all networks.
A checkpoint that does not fit is refused with a list of what is missing, unexpected or of another shape,
before anything is copied.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError, shown
from comit_bench.files import atomic_path, digest_json, sha256_file, write_atomic
from comit_bench.nn import state_dicts
from comit_bench.nn.plain_files import read_json, some

WEIGHT_FILES = ("model.safetensors", "weights.safetensors")
PICKLED = "pytorch_model.bin"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
VAE_LANDMARKS = ("encoder.conv_in", "decoder.conv_in", "encoder.mid_block", "decoder.mid_block")
ATTENTION_NAMES = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
Settings = Sequence[tuple[str, str]]
Spec = TypeVar("Spec")
Network = TypeVar("Network", bound=nn.Module)
_log = logging.getLogger(__name__)


# What is wrong with a file, ``nn`` says in errors of the command line.
is_pickle = state_dicts.is_pickle
read_tensors = state_dicts.read_safetensors
read_metadata = state_dicts.read_metadata
read_torch = state_dicts.read_torch
check_values = state_dicts.check_types


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint directory.

    Raises:
        MissingError: No such file.
        CorruptFileError: Not a JSON object; read strictly.
    """
    path = directory / "config.json"
    if not path.exists() and not path.is_symlink():
        raise MissingError(
            f"{path}: not found. A checkpoint directory holds config.json and {WEIGHT_FILES[0]}."
        )
    return read_json(path)


def checkpoint_path(text: str) -> Path:
    """A path as somebody typed it; the hub cache's folder of a repository stands for its main snapshot."""
    try:
        path = Path(text).expanduser()
        path.is_dir()
    except (OSError, RuntimeError) as error:  # too long, not allowed, or the home of nobody
        raise UsageError(f"{shown(text)}: cannot be used as a path ({error})") from error
    if not (path / "snapshots").is_dir() or not path.resolve().name.startswith("models--"):
        return path
    there = sorted(folder for folder in (path / "snapshots").iterdir() if folder.is_dir())
    main = path / "refs" / "main"
    if main.is_file() and (found := path / "snapshots" / main.read_text(errors="replace").strip()) in there:
        return found
    if not there:
        raise MissingError(f"{path}: the hub cache of a repository without a snapshot. Download it again.")
    if len(there) > 1:
        names = ", ".join(f"snapshots/{folder.name}" for folder in there)
        raise UsageError(f"{path}: holds several revisions: give one of {names}")
    return there[0]


def checkpoint_name(directory: Path) -> tuple[str, str | None]:
    """Name and revision of a checkpoint directory: ``("O/N", REV)`` for ``models--O--N/snapshots/REV``.

    Any other directory is called as it is called, and has no revision.
    """
    path = directory.resolve()
    if len(path.parts) > 3 and path.parent.name == "snapshots":
        repository = re.fullmatch(r"models--(.+)", path.parent.parent.name)
        if repository:
            return repository[1].replace("--", "/"), path.name
    return path.name, None


def described(name: str, local: Path, presets: Container[str]) -> tuple[str, str | None]:
    """What a loaded checkpoint is called in tables, and its revision.

    Args:
        name: As the user named the tokenizer: a preset, a hub id or a directory.
        local: Directory or file that was loaded.
        presets: Known names, in lower case.
    """
    own, revision = checkpoint_name(local) if local.is_dir() else (local.name, None)
    label = own if checkpoint_path(name).is_dir() else name
    return name.lower() if name.lower() in presets else label, revision


def single_file_spec(name: str, path: Path, presets: Mapping[str, Spec]) -> Spec:
    """Sizes of a single file of weights: those of the preset that was named with it."""
    if name.lower() not in presets:
        raise UsageError(
            f"--weights {path}: a single file says nothing about sizes. Name the preset it belongs to "
            f"(--tokenizer {' or '.join(presets)}), or give a directory with config.json."
        )
    return presets[name.lower()]


def weight_file(directory: Path, names: Sequence[str] = WEIGHT_FILES) -> Path:
    """The weights of a checkpoint directory: one file, the index of a sharded one, else a pickle.

    Args:
        directory: Of the checkpoint.
        names: Accepted names, the preferred ones first.
    """
    if not directory.is_dir():
        raise MissingError(f"{directory}: no such directory")
    stems = [name.removesuffix(".safetensors") for name in names]
    accepted = [*names, *(stem + state_dicts.INDEX for stem in stems), PICKLED]
    for number, name in enumerate(accepted):
        path = directory / name
        if path.is_file() or path.is_symlink():
            others = [other for other in accepted[number + 1 : -1] if (directory / other).exists()]
            if others:
                _log.warning("%s: %s is read, not %s", directory, name, ", ".join(others))
            return path
        if path.is_dir():
            raise CorruptFileError(f"{path}: this is a directory, where a file of weights is expected")
    others = [p.name for p in sorted(directory.iterdir()) if p.suffix in (".safetensors", *PICKLES)]
    there = f"; there is {', '.join(others[:4])}: rename it, or pass --weights FILE" if others else ""
    neither = "neither " if len(names) > 1 else ""
    raise MissingError(
        f"{directory}: found {neither}{' nor '.join(names) if neither else f'no {names[0]}'}{there}"
    )


def weights_digest(path: Path) -> str:
    """``sha256:<hex>`` of a file of weights; of an index, of all its shards.

    Raises:
        MissingError: A shard is not there.
        CorruptFileError: The index is damaged.
    """
    if not path.name.endswith(".index.json"):
        return sha256_file(path)
    names = state_dicts.shards(path)
    return digest_json({"shards": {name: sha256_file(path.parent / name) for name in names}})


def require_allowed(path: Path, allow: bool) -> None:
    """The one place where a pickle that is loaded as a tokenizer is let through."""
    if not allow:
        raise UsageError(
            f"{path}: a pickled checkpoint. It is read as tensors only, but even that must be asked for: "
            "add --option allow_pickle=true, or convert it to safetensors (`comit-bench weights convert NAME "
            "FILE` for released files)."
        )


def read_weights(
    path: Path, landmarks: Sequence[str], *, allow_pickle: bool = False, average: bool = True
) -> dict[str, Tensor]:
    """The tensors of one network out of a file as people store it.

    Args:
        path: safetensors, an index of shards, or a torch file.
        landmarks: Beginnings of keys that tell the network; see ``state_dicts.select``.
        allow_pickle: Whether the user has allowed a torch file.
        average: Which of a network and its average is taken when a file holds both; it is logged.

    Raises:
        MissingError: The file or one of its shards is not there.
        UsageError: A pickle that was not allowed.
        CorruptFileError: Damaged, of another kind, or without this network.
    """
    if state_dicts.is_pickle(path):
        require_allowed(path, allow_pickle)
    tensors, nested = state_dicts.read(path)
    return state_dicts.select(tensors, landmarks, path, nested=nested, average=average)


def select_weights(
    content: object, landmarks: Sequence[str], path: Path, *, average: bool = True
) -> dict[str, Tensor]:
    """The same out of what a torch file held.

    Raises:
        CorruptFileError: It does not hold this network.
    """
    tensors, nested = state_dicts.flatten(content, path)
    return state_dicts.select(tensors, landmarks, path, nested=nested, average=average)


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
    with atomic_path(path) as temporary:
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
            temporary,
            metadata={"format": "pt"},
        )


def as_stored(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights in the type that they are exported in; whole numbers stay what they are."""
    stored = {k: v.detach().to(dtype if v.is_floating_point() else v.dtype) for k, v in tensors.items()}
    large = [key for key, value in stored.items() if not bool(value.isfinite().all())]
    if large:
        kind = state_dicts.name_of(dtype)
        raise BenchError(
            f"{', '.join(large[:4])}: not finite as {kind}. Export as float32, or look at the run."
        )
    return stored


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write ``model.safetensors``, then ``config.json``; the directory is made if absent.

    Raises:
        BenchError: A weight is not finite, or too large for ``dtype``.
    """
    write_tensors(directory / WEIGHT_FILES[0], as_stored(tensors, dtype))
    write_atomic(directory / "config.json", json.dumps(config, indent=1) + "\n")


def read_floats(path: Path, landmarks: Sequence[str], *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """:func:`read_weights` of a network without whole numbers: every tensor is checked, under its own file.

    Raises:
        MissingError: See :func:`read_weights`.
        CorruptFileError: Also tensors of another type, NaN or infinity; names them.
    """
    tensors = read_weights(path, landmarks, allow_pickle=allow_pickle)
    check_values(dict.fromkeys(tensors, torch.empty(0)), tensors, path)
    return tensors


def check_float_file(path: Path) -> None:
    """Refuse a safetensors file that holds anything but floating-point numbers, by its header alone.

    Raises:
        MissingError: No such file.
        CorruptFileError: Damaged, or tensors of another type.
    """
    types = state_dicts.stored_types(path)
    wrong = [f"{key} is {kind}" for key, kind in types.items() if kind not in ("F64", "F32", "F16", "BF16")]
    if wrong:
        raise CorruptFileError(
            f"{path}: {some(wrong)}; expected floating-point numbers. Download or export it again."
        )


def read_vae(path: Path) -> dict[str, Tensor]:
    """A diffusers ``AutoencoderKL`` under today's key names; errors are those of :func:`read_floats`."""
    return modern_attention(read_floats(path, VAE_LANDMARKS))


def on_meta(network: Callable[[Spec], Network], spec: Spec) -> Network:
    """A network whose weights are still to be loaded or drawn."""
    with torch.device("meta"):
        return network(spec)


def load_network(
    module: Network,
    tensors: Mapping[str, Tensor],
    source: Path,
    *,
    optional: tuple[str, ...] = (),
    settings: Settings = (),
) -> Network:
    """Load ``tensors`` into ``module`` (which may be on the meta device), floats as float32.

    Args:
        module: Network whose state dict names the expected keys.
        tensors: The checkpoint.
        source: File named in the error.
        optional: Prefixes of keys that may be absent (they must be initialised already).
        settings: Pattern of keys -> what in ``config.json`` decides about them, for the message.

    Returns:
        The module, evaluating.

    Raises:
        UsageError: Lists missing keys, unexpected keys and shapes that differ.
        CorruptFileError: Tensors of another type, NaN or infinity; names them.
    """
    expected = module.state_dict()
    what = f"{type(module).__name__} as config.json describes it"
    state_dicts.compare(expected, tensors, source, what=what, optional=optional, settings=settings)
    state_dicts.check_types(expected, tensors, source)
    state_dicts.fill(module, tensors)
    return module.eval()
