"""``load_tokenizer``: the one way from a name, hub id or directory to a tokenizer."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from comit_bench.errors import MissingError, UsageError, did_you_mean, shown
from comit_bench.tokenizers.base import DTYPES, Tokenizer
from comit_bench.tokenizers.checkpoints import checkpoint_path, read_config
from comit_bench.tokenizers.contract import check_tokenizer
from comit_bench.tokenizers.family import Family, Preset
from comit_bench.tokenizers.identity import plugin_version
from comit_bench.tokenizers.options import LOADER, taken_by
from comit_bench.tokenizers.registry import FAMILIES, TokenizerEntry, code, find_tokenizer, tokenizers

_log = logging.getLogger(__name__)
CODE = re.compile(r"(.+\.py|[A-Za-z_][\w.]*):([A-Za-z_][\w.]*)", re.ASCII)  # where a loader is found


def resolve_device(name: str = "auto") -> torch.device:
    """``auto`` is CUDA when there is one, else the CPU. A CUDA device is tried before it is handed out.

    Raises:
        UsageError: Not ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; or a CUDA device that is not there or does
            not work.
    """
    match = re.fullmatch(r"auto|cpu|cuda(?::(0|[1-9][0-9]{0,3}))?", str(name))
    if match is None:
        raise UsageError(
            f"--device {shown(name)}: supported are auto, cpu, cuda and cuda:N (N = 0, 1, …), in lower case"
        )
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda" if name == "auto" else name)
    problem = cuda_problem(device)
    if problem is not None:
        raise UsageError(
            f"--device {name}: {problem}. Use --device cpu{'' if name == 'auto' else ' or auto'}."
        )
    return device


def cuda_problem(device: torch.device) -> str | None:
    """Why a CUDA device cannot be used; None when it can."""
    if all(getattr(torch.version, built, None) is None for built in ("cuda", "hip")):
        return "this machine has no usable CUDA device: its torch was built without CUDA"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {shown(visible)})"
        return f"this machine has no usable CUDA device{hidden}"
    if int(device.index or 0) >= count:
        return (
            f"there {'is only' if count == 1 else 'are only'} cuda:0{f' to cuda:{count - 1}' * (count > 1)}"
        )
    try:
        torch.ones(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError) as error:  # a driver that does not fit, a device in use by others
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"this CUDA device does not work ({reason})"
    return None


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


def _of_directory(directory: Path) -> TokenizerEntry:
    config = read_config(directory)
    known = _families()
    for family in known.values():
        if (preset := family.recognises(config)) is not None:
            return TokenizerEntry(preset, family)
    if isinstance(stated := config.get("family"), str):
        raise _unknown_family(stated, known)
    raise UsageError(
        f"{directory / 'config.json'}: cannot tell which tokenizer family this is (known: "
        f"{', '.join(sorted(known))}). Is it the right directory? Otherwise pass family=NAME."
    )


def _of_code(place: str, attribute: str) -> TokenizerEntry:
    """What ``module:attribute`` or ``file.py:attribute`` names; nothing of it is imported yet."""
    if not place.endswith(".py"):
        return code(f"{place}:{attribute}", f"{place}:{attribute}", "code", "code")
    file = Path(place).expanduser()
    if not file.is_file():
        raise MissingError(f"{place}: no such file")
    return code(f"{file.stem}:{attribute}", f"{file.resolve()}:{attribute}", "code", str(file))


def _families() -> dict[str, Family]:
    return {entry.family.name: entry.family for entry in tokenizers().values()}


def _unknown_family(name: str, known: Iterable[str]) -> UsageError:
    return UsageError(f"unknown tokenizer family {name!r}.{did_you_mean(name, known)}")


def entry_for(name: str, family: str | None = None) -> TokenizerEntry:
    """The registry entry behind a name, hub id, directory or piece of code.

    Raises:
        MissingError: A path that does not exist.
        UsageError: Unknown name, or a directory that is no checkpoint.
    """
    if named := CODE.fullmatch(name):
        return _of_code(*named.groups())
    directory = checkpoint_path(name)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if directory.is_file() and (looks_like_path or directory.suffix):
        if directory.suffix == ".py":
            raise UsageError(f"{name}: say what in this file makes the tokenizer: {name}:ATTRIBUTE")
        raise UsageError(
            f"{name}: this is a file. A checkpoint is a directory with config.json and model.safetensors; "
            "one file of weights goes with the name of its network: --tokenizer NAME --weights FILE."
        )
    if looks_like_path and not directory.is_dir():
        raise MissingError(
            f"{name}: no such directory. A checkpoint is a directory with config.json and model.safetensors."
        )
    if family is not None:
        known = _families()
        if family not in known:
            raise _unknown_family(family, known)
        found = known[family]
        return TokenizerEntry(found.preset(name) or Preset(name=family), found)
    if directory.is_dir():
        if name.lower() in tokenizers():
            raise UsageError(
                f"{name} is the name of a tokenizer and of a folder here: write ./{name} for the folder, or "
                "go elsewhere for the tokenizer"
            )
        return _of_directory(directory)
    if "/" in name:
        for found in FAMILIES:
            preset = found.preset(name)
            if preset is not None or found.name in name.split("/")[-1].lower():
                return TokenizerEntry(preset or Preset(name=found.name), found)
    return find_tokenizer(name)


def load_tokenizer(
    name_or_path: str,
    *,
    weights: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    offline: bool = False,
    seed: int = 0,
    family: str | None = None,
    **options: Any,
) -> Tokenizer:
    """Load a tokenizer.

    Args:
        name_or_path: A name of ``comit-bench ls tokenizers`` (case does not matter), a hub id, a directory
            with ``config.json`` and ``model.safetensors`` (or ``weights.safetensors``), or a
            :class:`~comit_bench.tokenizers.base.Loader` as ``module:attribute`` or ``file.py:attribute``.
        weights: Directory to take the weights from, or ``random`` for an untrained network.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``; with random weights also ``meta``, where nothing is
            drawn or computed and arithmetic can be counted.
        dtype: ``float32`` or, on CUDA, ``bfloat16``.
        offline: Never ask the hub.
        seed: Of random weights.
        family: Settles doubt about a directory or hub id.
        **options: Options of the family, e.g. ``posterior="sample"``; texts are read as the loader's
            annotations say.

    Raises:
        UsageError: Unknown name, option, value or device, a checkpoint that does not fit, or a plugin whose
            loader returns no tokenizer.
        MissingError: Weights that are not here and cannot be had.
        CorruptFileError: A file that cannot be read.
    """
    entry = entry_for(name_or_path, family)
    if entry.family.fitted and weights is None and not checkpoint_path(name_or_path).is_dir():
        raise UsageError(
            f"{entry.name} is fitted on the images of a data set: `comit_bench.run` does that by itself; "
            "in Python use comit_bench.tokenizers.kmeans, or pass the directory of a fitted one."
        )
    counted = device == "meta" and weights == "random"
    place = torch.device("meta") if counted else resolve_device(device)
    loader, settings = entry.loader(), entry.typed(options)
    context = {
        "weights": weights,
        "device": place,
        "offline": offline,
        "seed": seed,
        "dtype": resolve_dtype(dtype, place),
    }
    name = entry.name if entry.family.origin == "code" else name_or_path
    loaded: Tokenizer = loader(name, **_named(entry, context), **settings)
    check_tokenizer(loaded, f"tokenizer {entry.name} ({entry.family.loader})")
    if entry.family.origin != "builtin":
        _complete(loaded, entry, settings, context)
    return loaded


def _named(entry: TokenizerEntry, context: Mapping[str, Any]) -> dict[str, Any]:
    """What a loader gets beside its options: what it names, and what older ones take as ``**options``."""
    names, anything = taken_by(entry.loader())
    given = {key: value for key, value in context.items() if key in names}
    if anything:
        given |= {key: context[key] for key in ("weights", "device", "offline")}
    if context["dtype"] != torch.float32 and "dtype" not in given:
        if not anything:
            _log.warning("%s knows no dtype: it computes in float32 as ever", entry.name)
        else:
            given["dtype"] = context["dtype"]
    if context["weights"] is not None and "weights" not in given:
        raise UsageError(f"{entry.name} takes no weights: leave --weights {context['weights']} out")
    return given


def _complete(
    loaded: Tokenizer, entry: TokenizerEntry, options: Mapping[str, Any], context: Mapping[str, Any]
) -> None:
    """Put into a plugin's ``info`` what it leaves out: options as they were set, and the version of its code.

    Raises:
        UsageError: Its ``info`` cannot be set.
    """
    loader = entry.loader()
    defaults = {
        name: parameter.default
        for name, parameter in list(signature(loader).parameters.items())[1:]
        if name not in (*LOADER, *options) and isinstance(parameter.default, bool | int | float | str)
    }
    told = {name: str(value) for name, value in {**defaults, **options}.items()}
    if context["dtype"] != torch.float32:
        told["dtype"] = str(context["dtype"]).removeprefix("torch.")
    if context["seed"]:
        told["seed"] = str(context["seed"])
    info = loaded.info
    version = plugin_version(loaded, loader, entry.family.origin)
    wanted = replace(info, options={**told, **info.options}, version=version)
    if wanted == info:
        return
    try:
        loaded.info = wanted  # type: ignore[misc]
    except AttributeError as error:
        raise UsageError(
            f"tokenizer {entry.name} ({entry.family.loader}): its info cannot be completed with options and "
            "version. Make it a plain attribute, or state info.options and info.version."
        ) from error
