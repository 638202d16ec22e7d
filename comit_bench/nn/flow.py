"""Rectified-flow sampling on a fixed grid and adaptive projected guidance.

t = 0 is noise, t = 1 is data. Unusual: guidance weight 0 means "off" (conditional, one network call),
1 equals off exactly, and the running average of the guidance direction has a *negative* momentum.

Shape legend: ``B`` batch, ``C h w`` latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Velocity = Callable[[float, Tensor], Tensor | None]
SOLVERS = ("euler", "midpoint")


def time_grid(steps: int) -> Tensor:
    """float32 [steps + 1] from 0 to 1."""
    if steps < 1:
        raise ValueError(f"the number of solver steps must be at least 1, got {steps}")
    return torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float32)


def evaluation_times(steps: int, solver: str = "euler") -> tuple[float, ...]:
    """Times at which :func:`integrate` asks for a velocity, in order; float32-exact."""
    grid = time_grid(steps)
    if solver != "midpoint":
        return tuple(grid[:-1].tolist())
    middles = grid[:-1] + 0.5 * grid.diff()
    return tuple(torch.stack([grid[:-1], middles], dim=1).flatten().tolist())


def reached(time: float, wanted: float) -> bool:
    """Whether an evaluation at ``time`` answers a request for ``wanted``; float32 misses 0.7 by 1e-8."""
    return wanted <= time + 1e-6


def integrate(velocity: Velocity, noise: Tensor, *, steps: int, solver: str = "euler") -> Tensor:
    """Integrate dy/dt = velocity(t, y) from ``noise`` at t = 0 to t = 1.

    Args:
        velocity: Called with a float32-exact time and y [B, C, h, w]. None ends the integration: the
            latent reached so far is returned.
        noise: y at t = 0.
        steps: Grid intervals.
        solver: ``euler`` (one evaluation per interval) or ``midpoint`` (two).
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}: expected one of {', '.join(SOLVERS)}")
    grid = time_grid(steps)
    widths = grid.diff()
    y = noise
    for start, width in zip(grid[:-1], widths, strict=True):
        slope = velocity(start.item(), y)
        if slope is not None and solver == "midpoint":
            half = 0.5 * width
            slope = velocity((start + half).item(), y + slope * half.item())
        if slope is None:
            return y
        y = y + width.item() * slope
    return y


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """Settings of adaptive projected guidance (Sadat et al., 2024).

    Attributes:
        weight: w; 0 and 1 switch guidance off.
        momentum: beta of the running average of the guidance direction.
        threshold: Largest norm of the direction, per sample.
        eta: Share of the component parallel to the conditional velocity that is kept.
    """

    weight: float = 7.5
    momentum: float = -0.5
    threshold: float = 2.5
    eta: float = 0.0

    @property
    def active(self) -> bool:
        return self.weight not in (0.0, 1.0)


class ProjectedGuidance:
    """Guidance with its running average; make a new one for every sampling run."""

    def __init__(self, settings: Guidance) -> None:
        self.settings = settings
        self.average: Tensor | None = None

    def __call__(self, conditional: Tensor, unconditional: Tensor, *, weight: float | None = None) -> Tensor:
        """Combine two velocities [B, C, h, w] into the guided one.

        ``weight`` replaces the settings' for this call (a weight that changes with time).
        """
        s = self.settings
        direction = conditional - unconditional
        if s.weight > 0:
            if self.average is not None:
                direction = direction + s.momentum * self.average
            self.average = direction
        dims = tuple(range(1, direction.ndim))
        norm = direction.norm(p=2, dim=dims, keepdim=True)
        direction = direction * torch.clamp(s.threshold / norm, max=1.0)
        wide = direction.double()
        unit = F.normalize(conditional.double().flatten(1), dim=1, eps=1e-12).view_as(wide)
        parallel = (wide * unit).sum(dim=dims, keepdim=True) * unit
        update = (wide - parallel) + s.eta * parallel
        strength = (s.weight if weight is None else weight) - 1.0
        return conditional + strength * update.to(conditional.dtype)
