"""Adam as the paper prints it, and Muon for the matrices of small networks.

Muon (Jordan et al., 2024) replaces the update of a matrix by its nearest orthogonal one. On the scenes
a nano network learns several times as much from a sample as with Adam (docstring of ``OptimConfig``);
embeddings, heads, modulations and biases stay with Adam. It comes with torch 2.9 and is not sharded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from comit_bench.errors import UsageError
from comit_bench.train.config import AnyRun


class Together:
    """Several optimizers that step as one; parameters are numbered through."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups; ``factor`` is a group's share of the scheduled learning rate."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def _sizes(self) -> list[int]:
        return [sum(len(group["params"]) for group in part.param_groups) for part in self.parts]

    def state_dict(self) -> dict[str, Any]:
        """Like torch's, the numbers of a part's parameters following those of the part before."""
        state: dict[int, Any] = {}
        groups: list[Any] = []
        first = 0
        for part, size in zip(self.parts, self._sizes(), strict=True):
            own = part.state_dict()
            state |= {first + number: entry for number, entry in own["state"].items()}
            groups.append(own["param_groups"])
            first += size
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        first = 0
        for part, size, groups in zip(self.parts, self._sizes(), saved["param_groups"], strict=True):
            entries = {n - first: e for n, e in saved["state"].items() if first <= n < first + size}
            part.load_state_dict({"state": entries, "param_groups": groups})
            first += size


def make_optimizer(module: nn.Module, config: AnyRun, device: torch.device) -> Together:
    """The optimizer of the trainable parameters of ``module``."""
    optim = config.optim
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if optim.name == "muon" and is_hidden_matrix(name, p)]
    chosen = {id(p) for p in matrices}
    adam = torch.optim.Adam(
        [p for _, p in named if id(p) not in chosen],
        lr=optim.learning_rate,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=device.type == "cuda",
    )
    if not matrices:
        return Together(adam)
    if not hasattr(torch.optim, "Muon"):
        raise UsageError(
            f"optim.name muon needs torch 2.9 or later, this is {torch.__version__}. Upgrade torch, or use "
            "optim.name=adam (which learns more slowly on the scenes)."
        )
    muon = torch.optim.Muon(
        matrices,
        lr=optim.muon_learning_rate,
        weight_decay=optim.weight_decay,
        momentum=optim.muon_momentum,
    )
    for group in muon.param_groups:
        group["factor"] = optim.muon_learning_rate / optim.learning_rate
    return Together(adam, muon)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon may have it: the matrices of attention and MLP inside the blocks."""
    inside = "blocks." in name or ".transformer." in name
    return parameter.ndim == 2 and inside and "adaLN" not in name
