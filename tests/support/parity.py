"""What the parity cases of all families share: finding them, choosing their driver, comparing tensors.

A case is a folder ``<family>/<case>`` with ``config.json``, ``weights.safetensors``, ``io.safetensors``
and a README. Its driver is the class ``Case`` of ``tests/support/<family>_case.py``, a subclass of
:class:`ParityCase`; nothing else has to be registered. A folder of a family without a driver, or one
that lacks a file, is an error and never skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from comit_bench.files import sha256_file
from comit_bench.nn.precision import exact_products
from comit_bench.nn.state_dicts import compare, fill
from comit_bench.tokenizers.checkpoints import read_tensors

CUDA_SLACK = 5.0  # float32 sums run in another order there; ids must be equal all the same
slack: ContextVar[float] = ContextVar("slack", default=1.0)
NEEDED = ("config.json", "io.safetensors", "weights.safetensors")
SUPPORT = Path(__file__).parent


def expect(name: str, got: Tensor | None, want: Tensor, *, tolerance: float | None = None) -> str:
    """Compare and return the name. Integers and tolerance None compare exactly."""
    assert got is not None, f"{name}: nothing was computed"
    got, want = got.cpu(), want.cpu()
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)} instead of {list(want.shape)}"
    if tolerance is None or not want.is_floating_point():
        wrong = int((got.to(want.dtype) != want).sum())
        assert wrong == 0, f"{name}: {wrong} of {want.numel()} values differ"
    else:
        tolerance *= slack.get()
        worst = (got.double() - want.double()).abs().max().item()
        assert worst <= tolerance, f"{name}: largest difference {worst:.2e}, allowed {tolerance:.0e}"
    return name


def fill_exactly(model: nn.Module, tensors: dict[str, Tensor], *, but: str = "\0") -> None:
    """Load tensors of a case, which may be NaN; no key but those that begin with ``but`` may be missing."""
    compare(model.state_dict(), tensors, Path("the case"), what="the network", optional=(but,))
    fill(model, tensors)


@dataclass
class ParityCase:
    """A case folder and what has been compared so far.

    A driver says what is given (``inputs``) and what is computed (``checks``). Every tensor of the
    case's ``io`` that is neither an input nor named by a check makes the run fail.
    """

    folder: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    compared: dict[str, list[str]] = field(default_factory=dict)

    @cached_property
    def io(self) -> dict[str, Tensor]:
        tensors = read_tensors(self.folder / "io.safetensors")
        return {name: value.to(self.device) for name, value in tensors.items()}

    @cached_property
    def model(self) -> Any:
        """The network of the case, without gradients, where the case runs."""
        return self.load().to(self.device).requires_grad_(False).eval()

    def load(self) -> nn.Module:
        """The network of the case, on the CPU."""
        raise NotImplementedError

    def inputs(self) -> set[str]:
        """Names of the tensors that are fed in and need no comparison."""
        return {"images"}

    def checks(self) -> dict[str, Callable[[], list[str]]]:
        """Named checks; each returns the names of the tensors that it compared."""
        raise NotImplementedError

    def ids(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Ids that the encoder sends now and those recorded, int64 of one shape, by name."""
        raise NotImplementedError

    def run(self, name: str) -> list[str]:
        """Run one check once, as an adapter does (no gradients, no TF32), and remember what it compared."""
        if name not in self.compared:
            token = slack.set(CUDA_SLACK if self.device.type == "cuda" else 1.0)
            try:
                with torch.no_grad(), exact_products(self.device):
                    self.compared[name] = self.checks()[name]()
            finally:
                slack.reset(token)
        return self.compared[name]

    def left_over(self) -> set[str]:
        """Tensors that no check compares, after running all of them."""
        seen = {tensor for name in self.checks() for tensor in self.run(name)}
        return set(self.io) - seen - self.inputs()


def families() -> set[str]:
    """Families that have a driver."""
    return {path.stem.removesuffix("_case") for path in SUPPORT.glob("*_case.py")}


def driver(family: str) -> type[ParityCase]:
    """The driver class of a family.

    Raises:
        LookupError: There is none.
    """
    if family not in families():
        raise LookupError(
            f"no driver for parity cases of {family!r}: expected the class Case in "
            f"tests/support/{family}_case.py (there are drivers for {', '.join(sorted(families()))})"
        )
    case: type[ParityCase] = import_module(f"{family}_case").Case
    return case


def find_cases(root: Path) -> list[Path]:
    """Case folders under a root: ``root/<family>/<case>``, deeper or, for one family, ``root/<case>``.

    Every folder ``<family>/<case>`` counts, whatever it holds, so that a broken one is noticed.

    Raises:
        FileNotFoundError: The root is no directory.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such directory of parity cases")
    root = root.resolve()
    marked = {path.parent for name in NEEDED for path in root.rglob(name)}
    outer = {f for f in marked if not any(parent in marked for parent in f.parents)}  # not case/vae/
    second = {path for path in root.glob("*/*") if path.is_dir() and not hidden(path, root)}
    bare = {f for f in second if not any(f == o or f in o.parents or o in f.parents for o in outer)}
    return sorted(outer | bare)


def hidden(path: Path, root: Path) -> bool:
    """Whether a path has a component such as ``.git`` or ``__pycache__`` below the root."""
    return any(part.startswith((".", "__")) for part in path.relative_to(root).parts)


def family_of(folder: Path) -> str:
    """``…/titok/legacy_vq_k8`` -> ``titok``."""
    return folder.resolve().parent.name


def open_case(folder: Path, device: str | torch.device = "cpu") -> ParityCase:
    """The driver of a case folder.

    Args:
        folder: The case.
        device: Where everything is computed.

    Raises:
        LookupError: Unknown family.
        FileNotFoundError: A file of the case is missing.
    """
    case = driver(family_of(folder))(folder, torch.device(device))
    absent = [name for name in NEEDED if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{folder}: a parity case without {', '.join(absent)}")
    return case


def fingerprint(folder: Path) -> str:
    """Equal for copies of one case (or the path itself when it is broken)."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != "README.md")
    if not all((folder / name).is_file() for name in NEEDED):
        return str(folder)
    joined = "".join(f"{p.name}:{sha256_file(p)};" for p in files)
    return sha256(f"{family_of(folder)};{joined}".encode()).hexdigest()
