"""Weights spread over the processes (FSDP2), and how to get whole tensors back.

The whole training module is *one* unit: its weights are gathered once before a forward pass and its
gradients scattered once after the backward pass. Finer units, a block each, would gather inside the
network, once per call. But the number of calls is not the same everywhere: in the first message update
a process calls the network once for its whole images and once for its local crops, and leaves out what
it does not have. Processes would wait for each other's gatherings for ever. So what is saved is memory
for averages, moments and gradients between passes, not for the weights within a pass; activation
checkpointing saves more there.

The frozen autoencoder is not sharded. Arithmetic stays that of one process: float32 weights are
gathered, and an ambient autocast casts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from comit_bench.tokenizers.comit.model import Comit


def _is_sharded(tensor: Tensor) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def shard(module: nn.Module, vae_owner: Comit, device: torch.device) -> nn.Module:
    """Shard a module in place over all processes, except for ``vae_owner.vae``; names stay as they are."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    vae = vae_owner.vae
    vae_owner.vae = nn.Identity()  # out of sight while the parameters are collected
    try:
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
    finally:
        vae_owner.vae = vae
    return module


def sync_gradients(module: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass of a sharded module brings the gradients together."""
    sharded: Any = module
    sharded.set_requires_gradient_sync(wanted)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is. Shares memory."""
    if not _is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    part: Tensor = sharded.to_local()
    return part


def full(tensor: Tensor) -> Tensor:
    """The whole tensor. For sharded ones all processes must call this in the same order."""
    if not _is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    whole: Tensor = sharded.full_tensor()
    return whole


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor sharded as another one is; as it is if that one is whole."""
    if not _is_sharded(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = target
    whole = value.to(local(target).device)
    return distribute_tensor(whole, sharded.device_mesh, sharded.placements)


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    target.copy_(like(value, target))


def gather(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors by name; sharded ones on the CPU, one after the other so that memory lasts.

    Processes with ``keep=False`` only take part: they get nothing.
    """
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = full(tensor.detach())
        if keep:
            kept[name] = whole.cpu() if _is_sharded(tensor) else whole
    return kept


def whole_copy(model: Comit, weights: Mapping[str, Tensor]) -> Comit:
    """A network of its own with the predictor's ``weights``, which are whole; the VAE is shared."""
    with torch.device("meta"):
        copy = Comit(model.spec, nn.Identity())
    copy.vae = model.vae
    copy.predictor.load_state_dict(dict(weights), assign=True)
    return copy.requires_grad_(False)
