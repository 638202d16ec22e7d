"""``pytest -m gpu``: every outcome is written as soon as a test ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import Day

ROOT = Path(__file__).resolve().parents[2]
MARKERS = "gpu and not perf and not slow"


class Recorder:
    """A pytest plugin that writes outcomes."""

    def __init__(self, day: Day) -> None:
        self.day = day

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest for setup, call and teardown of every test."""
        if report.when == "call" or report.outcome != "passed":
            said = str(report.longrepr).strip().split("\n")[-1][:300] if report.longrepr else None
            self.day.write(
                test=report.nodeid,
                when=report.when,
                outcome=report.outcome,
                seconds=round(report.duration, 2),
                said=said,
            )


def run_tests(day: Day, markers: str, *paths: str) -> int:
    """Run the tests of some paths; 0 when all passed, or none was there to run."""
    import pytest

    chosen = [str(ROOT / path) for path in paths]
    options = ["-m", markers, "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    code = int(pytest.main([*options, *chosen], plugins=[Recorder(day)]))
    day.write(exit_code=code)
    return 0 if code in (0, 5) else 1


def run(day: Day) -> int:
    """All tests that need a GPU and are no measurements."""
    paths = ("tests/gpu/test_training.py",) if day.tiny else ("tests/gpu", "tests/parity/test_cases.py")
    return run_tests(day, MARKERS, *paths)
