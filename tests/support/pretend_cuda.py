"""A CUDA device for machines without one: tensors that say they are on ``cuda:0`` and compute on the CPU.

Inside :func:`pretend_cuda` a tensor that is moved to ``cuda`` becomes a :class:`PretendTensor`. Numbers are
those of the CPU; what is checked is what real CUDA refuses and a CPU never notices: operands on two devices,
an index on the wrong one, a generator of another device, NumPy on a CUDA tensor. Every wait of the host for
the device is written down (``Pretended.syncs``), as ``torch.cuda.set_sync_debug_mode`` would complain.

Autocast works as on CUDA. A backward pass does not, autograd wants a driver: :func:`_backward` gives every
weight that the graph reaches a gradient of ones. ``torch.compile`` is counted and left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
COPIES = (aten._to_copy, aten.copy_)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)
WAITING = (
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.bincount, aten.equal, aten.is_nonzero, aten.repeat_interleave,
)  # fmt: skip
MIXING = (aten.where, aten.masked_fill, aten.masked_fill_, aten.fill_, aten.fill)  # take a 0-dim CPU tensor


class PretendTensor(torch.Tensor):
    """Says ``cuda:0``; ``inner`` holds the numbers on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        with torch.inference_mode(False):  # a view of a weight must be an ordinary tensor
            made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=CUDA,
            )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:
        return f"PretendTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a pretended CUDA tensor outside of pretend_cuda()")


class _Generator(torch.Generator):
    """A CPU generator that remembers the device it was asked for."""

    place: torch.device

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.place


class _Python(TorchFunctionMode):
    """What has to be seen in Python already.

    Every draw must use a generator of the device on which it draws (C++ forgets which one was meant), and a
    subclass has no ``tolist``.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist and isinstance(args[0], PretendTensor):
            return args[0].cpu().tolist()
        generator = kwargs.get("generator")
        if generator is not None:
            first = args[0] if args and isinstance(args[0], Tensor) else None
            place = kwargs.get("device") or (torch.device("cpu") if first is None else first.device)
            if torch.device(place).type != generator.device.type:
                raise RuntimeError(f"{func}: a generator on {generator.device} cannot draw on {place}")
        return func(*args, **kwargs)


def _each(change: Callable[[Tensor], Any], value: Any) -> Any:
    """The same arguments with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_each(change, item) for item in value])
    return {key: _each(change, item) for key, item in value.items()} if isinstance(value, dict) else value


class Pretended(TorchDispatchMode):
    """The mode itself: runs every call on the CPU once its devices have been checked.

    Attributes:
        syncs: What made the host wait for the device, and our line that asked for it, in order.
        compiled: How many modules asked to be compiled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []
        self.compiled = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # made of other calls; these come one by one
                return func.decompose(*args, **kwargs)
        packet = func.overloadpacket
        tensors: list[Tensor] = []
        _each(tensors.append, (args, kwargs))
        ours = any(isinstance(x, PretendTensor) for x in tensors)
        cuda = self._target(packet, args, kwargs, ours)
        if packet in COPIES:
            self._copied(packet, args, kwargs, cuda)
        elif packet in INDEXING:
            self._indexed(packet, args)
        elif ours:
            self._same_device(func, tensors)
            if packet in WAITING:
                self._waits(str(packet))
        if packet is aten._pin_memory:
            return args[0]
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*_each(_inner, args), **_each(_inner, kwargs))
        if not cuda:
            return out
        written = _written(func, args, kwargs)
        return _each(PretendTensor, out) if written is None else written

    def _waits(self, what: str) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None and "/comit_bench/" not in frame.f_code.co_filename:
            frame = frame.f_back
        place = "" if frame is None else f" at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        self.syncs.append(what + place)

    def _target(self, packet: Any, args: Any, kwargs: Any, ours: bool) -> bool:
        """Whether results are on the pretended device."""
        device = kwargs.get("device")
        if device is not None:
            return bool(torch.device(device).type == "cuda")
        if packet is aten.copy_ or packet in INDEXING:
            return isinstance(args[0], PretendTensor)
        return ours

    def _copied(self, packet: Any, args: Any, kwargs: Any, cuda: bool) -> None:
        source = args[1] if packet is aten.copy_ else args[0]
        if isinstance(source, PretendTensor) == cuda:
            return
        at_once = kwargs.get("non_blocking") or (packet is aten.copy_ and args[2:] == (True,))
        if not cuda or not at_once:
            self._waits("cpu to cuda" if cuda else "cuda to cpu")

    def _indexed(self, packet: Any, args: Any) -> None:
        table, indices = args[0], [x for x in args[1] if x is not None]
        if not isinstance(table, PretendTensor):
            if any(isinstance(x, PretendTensor) for x in indices):
                raise RuntimeError(f"{packet}: indices on cuda for a tensor on the cpu")
            return
        if any(not isinstance(x, PretendTensor) for x in indices):
            self._waits(f"{packet} by an index on the cpu")
        elif any(x.dtype == torch.bool for x in indices):
            self._waits(f"{packet} by a mask")
        if len(args) > 2 and args[2].ndim and not isinstance(args[2], PretendTensor):
            raise RuntimeError(f"{packet}: values on the cpu for a tensor on cuda")

    def _same_device(self, func: Any, tensors: list[Tensor]) -> None:
        scalars = torch.Tag.pointwise in func.tags or func.overloadpacket in MIXING
        for x in tensors:
            if not isinstance(x, PretendTensor) and not (scalars and x.ndim == 0):
                devices = [f"{list(t.shape)} on {t.device.type}" for t in tensors]
                raise RuntimeError(f"{func}: expected all tensors on the same device, got {devices}")


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """The argument that an in-place call changes and returns; None for other calls."""
    returned = func._schema.returns
    if len(returned) != 1 or returned[0].alias_info is None or not returned[0].alias_info.is_write:
        return None
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return args[place] if place < len(args) else kwargs[argument.name]
    return None


def _inner(x: Tensor) -> Tensor:
    return x.inner if isinstance(x, PretendTensor) else x


def _backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
    """Gradients of ones, on the device of each weight."""
    seen: set[Any] = set()
    todo = [loss.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        if hasattr(node, "variable"):
            node.variable.grad = torch.ones_like(node.variable).detach()


@contextmanager
def pretend_cuda() -> Iterator[Pretended]:
    """A block in which ``cuda`` can be used; gives the :class:`Pretended` mode."""
    if not torch.cuda.is_available():
        torch._C._ensureCUDADeviceGuardSet()  # a guard that does nothing, as fake tensors have it
    mode = Pretended()

    def count(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        mode.compiled += 1

    patches: dict[str, Any] = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.is_bf16_supported": lambda *a, **k: True,
        "torch.cuda.get_device_name": lambda *a, **k: "pretended",
        "torch.cuda.get_device_capability": lambda *a, **k: (9, 0),
        "torch.cuda.get_device_properties": lambda *a, **k: SimpleNamespace(name="pretended", total_memory=0),
        "torch.cuda.max_memory_allocated": lambda *a, **k: 0,
        "torch.cuda.reset_peak_memory_stats": lambda *a, **k: None,
        "torch.cuda.empty_cache": lambda: None,
        "torch.cuda.synchronize": lambda *a, **k: None,
        "torch.cuda._lazy_init": lambda: None,
        "torch.Generator": _Generator,
        "torch.nn.Module.compile": count,
        "torch.Tensor.backward": _backward,
    }
    lift, replace = torch._C._set_only_lift_cpu_tensors, torch.__future__.set_swap_module_params_on_conversion
    with ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch(name, value))
        stack.callback(lift, torch._C._only_lift_cpu_tensors())
        lift(True)  # torch.tensor(..., device="cuda") comes by here
        stack.callback(replace, torch.__future__.get_swap_module_params_on_conversion())
        replace(True)  # module.to changes the class of parameters, not their identity
        stack.enter_context(_Python())
        stack.enter_context(mode)
        yield mode
