"""COMiT equals the original program on every recorded call of every case folder it is given.

Default: the vendored case, plus ``../shared/parity`` when it lies beside the checkout.
``COMIT_BENCH_PARITY=DIR[:DIR…]`` replaces both. A folder is a COMiT case when its config.json says so.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from comit_case import INPUTS, ComitCase

from comit_bench.files import sha256_file

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent


def roots() -> list[Path]:
    chosen = os.environ.get("COMIT_BENCH_PARITY")
    if chosen:
        return [Path(part) for part in chosen.split(os.pathsep)]
    return [HERE / "cases", *(p for p in [REPOSITORY.parent / "shared" / "parity"] if p.is_dir())]


def is_comit(folder: Path) -> bool:
    predictor = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("predictor")
    return isinstance(predictor, dict) and str(predictor.get("_target_", "")).endswith("RuledDiT")


def cases() -> list[Path]:
    folders = [config.parent for root in roots() for config in sorted(root.rglob("config.json"))]
    unique = {sha256_file(f / "io.safetensors"): f for f in folders if is_comit(f)}  # a copy runs once
    return list(unique.values())


CASES = {str(folder): ComitCase(folder) for folder in cases()}
CHECKS = [
    pytest.param(key, name, id=f"{Path(key).name}-{name}")
    for key, case in CASES.items()
    for name in case.checks()
]


@pytest.mark.parity
def test_there_are_cases() -> None:
    assert CASES, f"no COMiT parity case under {[str(r) for r in roots()]}"


@pytest.mark.parity
@pytest.mark.parametrize(("key", "name"), CHECKS)
def test_call(key: str, name: str) -> None:
    assert CASES[key].run(name)


@pytest.mark.parity
@pytest.mark.parametrize("key", list(CASES))
def test_every_recorded_tensor_is_compared(key: str) -> None:
    case = CASES[key]
    compared = {tensor for name in case.checks() for tensor in case.run(name)}
    assert set(case.io) - compared - INPUTS == set()
