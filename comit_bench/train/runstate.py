"""State of a small run on disk: one directory with weights, moments and step, replaced as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from comit_bench.errors import BenchError, CorruptFileError, UsageError
from comit_bench.files import atomic_path, locked, require_folder, sweep
from comit_bench.nn.teachers import WEIGHTS
from comit_bench.recipes.reading import read_json
from comit_bench.tokenizers.checkpoints import read_tensors, write_tensors


@contextmanager
def only_training(directory: Path) -> Iterator[None]:
    """Make the folder of a run, and let nobody else train in it during the block.

    Raises:
        BenchError: Another training is running there, or it cannot be written.
    """
    require_folder(directory)
    with locked(directory / ".lock", "training there", wait=False) as ours:
        if not ours:
            raise BenchError(
                f"{directory}: another training is running in this folder. Wait for its end, or choose "
                "another name=… or output=… ."
            )
        yield


class Moments(Protocol):
    """What an optimizer must offer: torch's own do, and ``Together``."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class RunState:
    """Saves and loads a run whose batches depend on seed and step alone; continues bit for bit on a CPU.

    Args:
        kind: What is trained, for messages.
        directory: Of the run; the checkpoint is ``checkpoint`` in it.
        settings: Everything that can change the weights; a checkpoint of other settings is refused.
        module: Network.
        optimizer: Numbers its parameters in the order of its groups.
    """

    def __init__(
        self, kind: str, directory: Path, settings: dict[str, Any], module: nn.Module, optimizer: Moments
    ) -> None:
        self.kind, self.directory, self.settings = kind, directory, settings
        self.module, self.optimizer = module, optimizer
        known = {id(p): name for name, p in module.named_parameters()}
        self.names = [known[id(p)] for group in optimizer.param_groups for p in group["params"]]
        self.seconds = 0.0

    def save(self, step: int) -> None:
        """Replace the checkpoint, whole or not at all."""
        state = self.optimizer.state_dict()["state"]
        moments = {
            f"{self.names[i]}/{key}": torch.as_tensor(v) for i, s in state.items() for key, v in s.items()
        }
        with atomic_path(self.directory / "checkpoint") as temporary:
            temporary.mkdir(parents=True)
            write_tensors(temporary / WEIGHTS, self.module.state_dict())
            write_tensors(temporary / "optimizer.safetensors", moments)
            content = {"step": step, "seconds": self.seconds, "settings": self.settings}
            (temporary / "state.json").write_text(json.dumps(content), encoding="utf-8")

    def load(self) -> int:
        """Continue where the last checkpoint is; 0 without one.

        Raises:
            CorruptFileError: The checkpoint cannot be read.
            UsageError: It was made with other settings.
        """
        place = self.directory / "checkpoint"
        sweep(self.directory)
        if not place.is_dir():
            return 0
        try:
            content = read_json(place / "state.json")
            step, saved, self.seconds = content["step"], content["settings"], content["seconds"]
        except (BenchError, LookupError, TypeError) as error:
            article = "an" if self.kind[0] in "aeiou" else "a"
            raise CorruptFileError(f"{place}: no checkpoint of {article} {self.kind}. Remove it.") from error
        if saved != self.settings:
            raise UsageError(
                f"{place}: made with other settings. Use the same ones, or another name=… or output=… ."
            )
        self.module.load_state_dict(read_tensors(place / WEIGHTS))
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in read_tensors(place / "optimizer.safetensors").items():
            name, _, part = key.rpartition("/")
            entries.setdefault(self.names.index(name), {})[part] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        return int(step)
