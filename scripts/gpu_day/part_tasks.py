"""Every kind of task from images to a record on the GPU: the slow tests marked ``gpu``."""

from __future__ import annotations

from common import Day
from part_tests import run_tests


def run(day: Day) -> int:
    """Last, because whatever is wrong here shows in smaller tests first."""
    return run_tests(day, "gpu and slow and not perf", "tests/gpu/test_probes.py")
