"""Packages that are installed for one test: modules and entry points in a folder on the path."""

from __future__ import annotations

import sys
from importlib import invalidate_caches
from pathlib import Path


def install(
    site: Path,
    modules: dict[str, str],
    points: dict[str, str],
    *,
    name: str = "theirs",
    version: str = "0.1",
    group: str = "comit_bench.tokenizers",
    groups: dict[str, dict[str, str]] | None = None,
) -> None:
    """Write modules and a distribution with entry points; what was there goes.

    Args:
        site: The folder; the test puts it on the path.
        modules: Path below ``site`` -> source.
        points: Name -> ``module:attribute``.
        name: Of the distribution.
        version: Of the distribution.
        group: Of ``points``.
        groups: Further groups -> their points.
    """
    for path, source in modules.items():
        file = site / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
        for cached in file.parent.glob("__pycache__/*"):
            cached.unlink()
        top = Path(path).parts[0].removesuffix(".py")
        for loaded in [module for module in sys.modules if module.split(".")[0] == top]:
            del sys.modules[loaded]
    for old in site.glob(f"{name}-*.dist-info"):
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for head, named in {group: points, **(groups or {})}.items():
        lines += [f"[{head}]", *(f"{point} = {target}" for point, target in named.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    invalidate_caches()
