"""Checkpoints: one directory each, whole or absent, without pickle.

``step-00001000/`` holds ``model.safetensors`` (all that is trained), ``ema.safetensors`` where weights
are averaged, ``optimizer.safetensors`` and ``state.json`` (counters and the configuration). Tensors are
always whole, however they were sharded, so the number of processes and the sharding may change. The number
of a checkpoint is the number of finished optimizer steps. Everything random is a function of the seed and
the step, so no generator state has to be kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError
from comit_bench.files import atomic_path, locked, remove_folder, require_folder, user_path
from comit_bench.files import sweep as sweep_killed
from comit_bench.recipes.reading import read_json
from comit_bench.tokenizers.checkpoints import read_tensors, write_tensors
from comit_bench.train.config import AnyRun
from comit_bench.train.ema import Ema
from comit_bench.train.optimizers import Together
from comit_bench.train.sharding import fill, gather, like

FORMAT = 1
STATE = "state.json"
_NAME = re.compile(r"step-(\d{8})")


@contextmanager
def only_training(directory: Path) -> Iterator[None]:
    """Make the folder of a run, and let nobody else train in it during the block."""
    require_folder(directory)
    with locked(directory / ".lock", "training there", wait=False) as ours:
        if not ours:
            raise BenchError(
                f"{directory}: another training is running in this folder. Wait for its end, or choose "
                "another name=… or output=… ."
            )
        yield


@dataclass
class Counters:
    """What a run remembers besides tensors.

    Attributes:
        step: Finished optimizer steps (skipped ones included).
        skipped: Steps left out because of a loss or gradient that was not finite.
        bad_run: How many of them the last steps were, in a row.
        best_step: Checkpoint with the best validation loss, and
        best_value: that loss.
        sums: Sums of the logged values since the last row, over
        counted: this many steps.
        seconds: Time spent so far.
    """

    step: int = 0
    skipped: int = 0
    bad_run: int = 0
    best_step: int | None = None
    best_value: float | None = None
    sums: list[float] = field(default_factory=list)
    counted: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class TrainState:
    """The tensors of a run: module (network and heads), averages, optimizer."""

    module: nn.Module
    ema: Ema | None
    optimizer: Together

    def weights(self) -> dict[str, Tensor]:
        """Tensors of the module without the frozen autoencoder."""
        return {k: v for k, v in self.module.state_dict().items() if not k.startswith("model.vae.")}

    def parameters(self) -> list[Tensor]:
        """What the optimizer changes, in its order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def moments(self) -> dict[str, Tensor]:
        """Optimizer state as ``<parameter number>.<name>``."""
        state = self.optimizer.state_dict()["state"]
        return {f"{i}.{key}": torch.as_tensor(v) for i, entry in state.items() for key, v in entry.items()}

    def files(self, *, keep: bool) -> dict[str, dict[str, Tensor]]:
        """Full tensors by file name. With sharded weights all processes must call this together.

        Args:
            keep: False on processes that only help to gather: they get empty entries.
        """
        parts = {"model": self.weights(), "optimizer": self.moments()}
        if self.ema is not None:
            parts["ema"] = self.ema.averages
        return {f"{name}.safetensors": gather(tensors, keep=keep) for name, tensors in parts.items()}


def folder(root: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lies."""
    return root / f"step-{step:08d}"


def found(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if _NAME.fullmatch(p.name) and (p / STATE).is_file())


def step_of(directory: Path) -> int:
    """The step in a checkpoint's name, 0 for another name."""
    match = _NAME.fullmatch(directory.name)
    return int(match[1]) if match else 0


def save_checkpoint(
    root: Path, tensors: dict[str, dict[str, Tensor]], counters: Counters, config: AnyRun, data: str
) -> Path:
    """Write the checkpoint of ``counters.step`` below ``root``; a reader sees all of it or nothing.

    ``tensors`` are those of :meth:`TrainState.files`; ``config`` and ``data``, a digest of the training
    images' ids, are compared when a run continues from here.

    Raises:
        BenchError: Disk full or not writable.
    """
    target = folder(root, counters.step)
    with atomic_path(target) as temporary:
        temporary.mkdir()
        for name, content_of_file in tensors.items():
            write_tensors(temporary / name, content_of_file)
        settings = config.model_dump(mode="json")
        content = {"format": FORMAT, "counters": asdict(counters), "config": settings, "data": data}
        (temporary / STATE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return target


def sweep(root: Path) -> None:
    """Finish or remove what a killed run left half-done (also one of an earlier version: ``.step-*``)."""
    sweep_killed(root)
    for leftover in root.glob(".step-*.part"):
        remove_folder(leftover)


def tidy(root: Path, *, keep_last: int, best: int | None) -> None:
    """Remove all but the last checkpoints and the best one."""
    for directory in found(root)[:-keep_last]:
        if step_of(directory) != best:
            remove_folder(directory)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            flat |= _flat(inner, f"{prefix}{key}.")
        else:
            flat[prefix + key] = inner
    return flat


def config_differences(saved: dict[str, Any], config: AnyRun) -> list[str]:
    """Keys that matter and differ, as ``key: saved -> now``.

    A key that is younger than the checkpoint counts as its default there: defaults of new keys are what
    was done before.
    """
    blank: Any = type(config).model_construct
    defaults = _flat(blank().model_dump(mode="json", warnings=False))
    old, new = {**defaults, **_flat(saved)}, _flat(config.model_dump(mode="json"))
    return [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted((old.keys() | new.keys()) - config.free)
        if old.get(key) != new.get(key)
    ]


def read_counters(directory: Path, config: AnyRun, data: str) -> Counters:
    """Counters of a checkpoint, after making sure that it belongs to this configuration."""
    path = directory / STATE
    if not path.is_file():
        raise MissingError(f"{directory}: no checkpoint here (no {STATE})")
    try:
        content = read_json(path)
        counters, saved = Counters(**content["counters"]), dict(content["config"])
        same_data = content["data"] == data
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(
            f"{path}: not the state of a checkpoint ({error!r}). Remove {directory}."
        ) from error
    differences = config_differences(saved, config)
    if not same_data:
        differences.append("the list of training images (data.source)")
    if differences:
        lines = "\n  ".join(differences)
        raise UsageError(
            f"{directory}: made with another configuration (saved -> now):\n  {lines}\n"
            "Use the same settings, or start anew with another name=… or output=… ."
        )
    return counters


@torch.no_grad()
def _fill(target: dict[str, Tensor], path: Path) -> None:
    tensors = read_tensors(path)
    if target.keys() != tensors.keys() or any(target[k].shape != tensors[k].shape for k in target):
        raise CorruptFileError(f"{path}: its tensors are not those of this model. Remove the checkpoint.")
    for name, value in target.items():
        fill(value, tensors[name])


def load_checkpoint(directory: Path, state: TrainState, config: AnyRun, data: str) -> Counters:
    """Put a checkpoint's tensors into ``state``.

    Raises:
        MissingError: Not a checkpoint. CorruptFileError: damaged. UsageError: another configuration.
    """
    counters = read_counters(directory, config, data)
    _fill(state.weights(), directory / "model.safetensors")
    if state.ema is not None:
        _fill(state.ema.averages, directory / "ema.safetensors")
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in read_tensors(directory / "optimizer.safetensors").items():
        number, _, name = key.partition(".")
        entries.setdefault(int(number), {})[name] = value
    for place, parameter in enumerate(state.parameters()):
        entry = entries.get(place, {})
        entries[place] = {k: like(v, parameter) if v.ndim else v for k, v in entry.items()}
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": entries, "param_groups": groups})
    return counters


def choose(root: Path, resume: str) -> Path | None:
    """The checkpoint to continue from, None for a fresh start.

    ``resume`` is ``auto`` (the latest below ``root``, if any), ``never``, or a checkpoint directory.
    """
    if (older := root.parent / "checkpoint").is_dir():
        raise UsageError(
            f"{older}: a checkpoint of an earlier version of comit_bench; this one cannot go on from it. "
            "Remove it to start anew, or choose another name=… or output=… ."
        )
    sweep_killed(root)
    here = found(root)
    if resume == "auto":
        return here[-1] if here else None
    if resume == "never":
        if here:
            raise UsageError(
                f"{root}: holds checkpoints up to step {step_of(here[-1])}. Continue with --resume auto, "
                "delete them, or choose another name=… or output=… ."
            )
        return None
    wanted = user_path(resume, "--resume")
    if not (wanted / STATE).is_file():
        raise MissingError(f"--resume {resume}: expected auto, never or a checkpoint directory with {STATE}")
    if here and step_of(here[-1]) > step_of(wanted):
        raise UsageError(
            f"--resume {resume}: {root} holds later checkpoints (step {step_of(here[-1])}). "
            "Delete them or choose another output=… ."
        )
    return wanted
