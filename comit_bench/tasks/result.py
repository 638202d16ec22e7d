"""What a task hands back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from comit_bench.results.outcomes import Outcomes
from comit_bench.results.schema import Metric


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """All metrics of one task, and how the fits went.

    Attributes:
        metrics: Name -> number; the main metric is among them.
        extra: JSON-ready remarks on how it went, e.g. best epochs and seconds.
        details: JSON-ready break-downs that the record keeps and no table prints.
        outcomes: What every image contributed to the metrics that are means over images; None where
            there is no such metric.
        unconverged: Seeds whose best epoch was the last one allowed.
    """

    metrics: dict[str, Metric]
    extra: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    outcomes: Outcomes | None = None
    unconverged: tuple[int, ...] = ()
