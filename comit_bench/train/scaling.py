"""How training calls the blocks: recomputed in the backward pass, compiled, or both.

Both leave the modules as they are, so names in checkpoints, averages and exports do not change.
Validation and export always run the plain blocks.

Compiled is a function of a block, not the network: the blocks share one graph per kind of call. Only
the number of images is dynamic in it. The rows of the groups must not be: some of the three groups
into which a block cuts its rows are empty in some calls; an empty group whose size is a symbol is probably
what Inductor could not bound (``ValueRangeError``). With plain numbers it drops out of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from comit_bench.nn.teachers import DinoTeacher, EfficientNetTeacher, ScenesTeacher
from comit_bench.nn.vae import KLVae
from comit_bench.tokenizers.comit.fast import BlockRunner, BlockState, run_block
from comit_bench.tokenizers.comit.model import Block, Comit

# Kinds of calls: whole image, local crop, decoding; first, middle, last block; with gradient and without.
VARIANTS = 64


def compiled(backend: str = "inductor") -> BlockRunner:
    """:func:`run_block` compiled, for any number of images; the backend ``aot_eager`` needs no compiler."""
    dynamo: Any = torch._dynamo
    limit = "recompile_limit" if hasattr(dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(dynamo.config, limit, max(getattr(dynamo.config, limit), VARIANTS))
    call: Callable[..., Tensor] = torch.compile(run_block, dynamic=False, backend=backend)

    def run(
        block: Block, u: Tensor, state: BlockState, image: int, read: slice, bias: Tensor | None
    ) -> Tensor:
        for tensor, axis in ((u, 0), (state.image, 1), (state.message, 1)):
            if tensor.shape[axis] > 1:
                dynamo.maybe_mark_dynamic(tensor, axis)
        return call(block, u, state, image, read, bias)

    return run


def recomputed(run: BlockRunner) -> BlockRunner:
    """Keep only the input of a block; the rest is computed again in the backward pass."""

    def again(
        block: Block, u: Tensor, state: BlockState, image: int, read: slice, bias: Tensor | None
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return run(block, u, state, image, read, bias)
        out: Tensor = checkpoint(
            run, block, u, state, image, read, bias, use_reentrant=False, preserve_rng_state=False
        )
        return out

    return again


def block_runner(*, compile: bool, recompute: bool, backend: str = "inductor") -> BlockRunner | None:
    """How to call the blocks; None is the plain way."""
    run: BlockRunner = compiled(backend) if compile else run_block
    if recompute:
        return recomputed(run)
    return run if compile else None


def compile_frozen(model: Comit, teacher: object, backend: Any = "inductor") -> None:
    """Compile what is never trained: the encoder of an SD-VAE and the teacher's network. Names stay.

    Other autoencoders are one product and gain nothing.
    """
    if isinstance(model.vae, KLVae):
        model.vae.vae.encoder.compile(backend=backend)
    if isinstance(teacher, (ScenesTeacher, EfficientNetTeacher)):
        teacher.network.compile(backend=backend)
    elif isinstance(teacher, DinoTeacher):
        forward: Any = torch.compile(teacher.network.forward_features, backend=backend)
        teacher.network.forward_features = forward
