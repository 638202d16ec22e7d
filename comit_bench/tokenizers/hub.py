"""Fetching released files from the Hugging Face hub, with one clear error when that is impossible."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from comit_bench.errors import MissingError


def fetch(repository: str, names: Sequence[str], *, offline: bool, hint: str) -> Path:
    """Return a directory that holds ``names`` of a hub repository, downloading what is not cached.

    Args:
        repository: Hub id, e.g. ``cvg-unibe/comit-l``.
        names: Files needed.
        offline: Look into the cache only.
        hint: What else the user can do, ends the error.

    Raises:
        MissingError: Names the files that could not be had, where they come from and how to give them.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    paths, missing, reasons = [], [], set()
    for name in names:
        try:
            paths.append(Path(hf_hub_download(repository, name, local_files_only=offline)))
        except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
            missing.append(name)
            reasons.add(type(error).__name__)
    if missing:
        raise MissingError(
            f"{', '.join(missing)} of {repository} {'are' if len(missing) > 1 else 'is'} not on this machine"
            f"{' and --offline forbids a download' if offline else ' and could not be downloaded'} "
            f"({', '.join(sorted(reasons))}). They come from the Hugging Face hub repository {repository}: "
            f"fetch them where there is a network (hf download {repository} "
            f"{' '.join(missing)}) and copy the cache, {hint}."
        )
    return paths[0].parent
