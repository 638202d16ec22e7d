"""Every tokenizer equals its original program on every recorded tensor of every case folder.

Default: the vendored cases, plus ``../shared/parity`` when it lies beside the checkout.
``COMIT_BENCH_PARITY=DIR[:DIR…]`` replaces both; below a directory the layout is ``<family>/<case>``.
Drivers stand in ``tests/support/<family>_case.py``; a folder nobody can drive fails.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from parity import NEEDED, ParityCase, driver, families, family_of, find_cases, fingerprint, open_case
from pretend_cuda import pretend_cuda

HERE = Path(__file__).parent
VENDORED = HERE / "cases"
SHARED = HERE.parent.parent.parent / "shared" / "parity"
BUDGET = 8_000_000  # bytes of all vendored cases together
pytestmark = pytest.mark.parity


def roots() -> list[Path]:
    chosen = os.environ.get("COMIT_BENCH_PARITY")
    if chosen:
        return [Path(part) for part in chosen.split(os.pathsep)]
    return [VENDORED, *([SHARED] if SHARED.is_dir() else [])]


def cases(where: list[Path]) -> dict[str, Path]:
    """Label -> folder; a copy of a case runs once, another case of the same name gets a number."""
    folders = [folder for root in where for folder in find_cases(root)]
    found: dict[str, Path] = {}
    for folder in {fingerprint(folder): folder for folder in reversed(folders)}.values():
        label = f"{family_of(folder)}-{folder.name}"
        taken = sum(other == label or other.startswith(f"{label}#") for other in found)
        found[f"{label}#{taken + 1}" if taken else label] = folder
    return found


FOLDERS = cases(roots())
OPENED: dict[str, ParityCase] = {}
BROKEN: dict[str, str] = {}
CHECKS: list[tuple[str, str]] = []
for label, folder in FOLDERS.items():
    try:
        OPENED[label] = open_case(folder)
        CHECKS += [(label, name) for name in OPENED[label].checks()]
    except Exception as error:  # told by test_case_can_be_run, so that the other cases still run
        BROKEN[label] = f"{folder}: {type(error).__name__}: {error}"


def test_there_are_cases() -> None:
    assert FOLDERS, f"no parity case under {[str(r) for r in roots()]}"


@pytest.mark.parametrize("label", FOLDERS)
def test_case_can_be_run(label: str) -> None:
    assert label not in BROKEN, BROKEN[label]
    assert OPENED[label].checks()


@pytest.mark.parametrize(("label", "name"), CHECKS, ids=[f"{label}-{name}" for label, name in CHECKS])
def test_call(label: str, name: str) -> None:
    assert OPENED[label].run(name)


@pytest.mark.parametrize("label", [label for label in OPENED if label not in BROKEN])
def test_every_recorded_tensor_is_compared(label: str) -> None:
    assert OPENED[label].left_over() == set()


def every_check(folder: Path) -> None:
    """All checks of a case on CUDA; what is compared is what is compared on the CPU."""
    case = open_case(folder, "cuda")
    for name in case.checks():
        assert case.run(name)
    assert case.left_over() == set()
    for name, (got, want) in case.ids().items():
        assert got.is_cuda and torch.equal(got.cpu(), want.cpu()), name


@pytest.mark.gpu
@pytest.mark.parametrize("label", FOLDERS)
def test_case_on_cuda(label: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    every_check(FOLDERS[label])


@pytest.mark.parametrize("folder", find_cases(VENDORED), ids=lambda folder: folder.name)
def test_case_on_a_pretended_cuda(folder: Path) -> None:
    """So that nothing but arithmetic is left to find out on a real one."""
    with pretend_cuda():
        every_check(folder)


def test_every_family_has_a_vendored_case_within_the_budget() -> None:
    assert {family_of(folder) for folder in find_cases(VENDORED)} == families()
    assert sum(path.stat().st_size for path in VENDORED.rglob("*") if path.is_file()) <= BUDGET


def test_unknown_families_and_broken_cases_are_errors(tmp_path: Path) -> None:
    (tmp_path / "nonesuch" / "case").mkdir(parents=True)
    (tmp_path / "comit" / "empty").mkdir(parents=True)
    found = find_cases(tmp_path)
    assert [folder.name for folder in found] == ["empty", "case"]
    with pytest.raises(FileNotFoundError, match=r"io\.safetensors"):
        open_case(found[0])
    with pytest.raises(LookupError, match="nonesuch"):
        open_case(found[1])
    with pytest.raises(FileNotFoundError, match="no such directory"):
        find_cases(tmp_path / "gone")


def test_copies_run_once_and_namesakes_all_run(tmp_path: Path) -> None:
    for root, content in (("a", "1"), ("b", "1"), ("c", "2")):
        folder = tmp_path / root / "comit" / "case"
        folder.mkdir(parents=True)
        for name in NEEDED:
            (folder / name).write_text(content)
    found = cases([tmp_path / root for root in "abc"])
    assert set(found) == {"comit-case", "comit-case#2"}
    assert {folder.parts[-3] for folder in found.values()} == {"a", "c"}


def test_a_tensor_nobody_compares_is_left_over(tmp_path: Path) -> None:
    class Lazy(ParityCase):
        def checks(self):  # type: ignore[no-untyped-def]
            return {"half": lambda: ["a"]}

    case = Lazy(tmp_path)
    case.__dict__["io"] = {"images": None, "a": None, "b": None}
    assert case.left_over() == {"b"}


@pytest.mark.parametrize("family", sorted(families()))
def test_drivers_import(family: str) -> None:
    assert issubclass(driver(family), ParityCase)
