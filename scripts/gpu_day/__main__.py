"""One part of a day with a GPU: ``python scripts/gpu_day PART --out DIR``. ``gpu_day.sh`` runs them all.

A part writes every result as soon as it has it. It looks at the clock itself and leaves out what
does not fit.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]  # the tests' parity cases and training step

from common import Day  # noqa: E402

PARTS = ("environment", "tests", "trainings", "ids", "speed", "training", "probe", "tasks")


def main(arguments: list[str] | None = None) -> int:
    """Run one part."""
    parser = argparse.ArgumentParser(prog="gpu_day")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(arguments)
    day = Day.begin(given.part, given.out, given.device, seconds=given.seconds, tiny=given.tiny)
    return int(import_module(f"part_{given.part}").run(day) or 0)


if __name__ == "__main__":
    raise SystemExit(main())
