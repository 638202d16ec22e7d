"""Fetching released files from the Hugging Face hub, with one clear error when that is impossible."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from comit_bench.errors import MissingError, UsageError
from comit_bench.nn.state_dicts import shards
from comit_bench.tokenizers.checkpoints import PICKLED, WEIGHT_FILES

_log = logging.getLogger(__name__)


def fetch(repository: str, names: Sequence[str], *, offline: bool, hint: str) -> Path:
    """Return a directory that holds ``names`` of a hub repository, downloading what is not cached.

    Args:
        repository: Hub id, e.g. ``cvg-unibe/comit-l``.
        names: Files needed.
        offline: Look into the cache only.
        hint: What else the user can do, ends the error.

    Raises:
        UsageError: Not a hub id.
        MissingError: Names the files that could not be had, where they come from and how to give them.
    """
    found = {name: cached(repository, name) for name in names}
    missing = [name for name, path in found.items() if path is None]
    reason = "--offline forbids a download"
    if missing and not offline:
        reason = ""
        for name in list(missing):
            path, reason = _download(repository, name)
            if path is None:
                break  # without a network the next one would fail the same way, after as many retries
            found[name] = path
            missing.remove(name)
    if missing:
        raise MissingError(
            f"{', '.join(missing)} of {repository} {'are' if len(missing) > 1 else 'is'} not on this "
            f"machine, and {reason}. They come from the Hugging Face hub repository {repository}: fetch "
            f"them where there is a network (hf download {repository} {' '.join(missing)}) and copy the "
            f"cache, {hint}."
        )
    first = found[names[0]]
    assert first is not None
    return first.parent


def fetch_checkpoint(
    repository: str,
    *,
    offline: bool,
    hint: str,
    weights: str = WEIGHT_FILES[0],
    allow_pickle: bool = False,
) -> Path:
    """Return a directory with ``config.json`` and the weights of a hub repository, in one file or in shards.

    Args:
        repository: Hub id.
        offline: Look into the cache only.
        hint: See :func:`fetch`.
        weights: Name of the file of weights.
        allow_pickle: Ask for the pickled file where there is nothing else.

    Raises:
        UsageError: Not a hub id.
        MissingError: See :func:`fetch`.
        CorruptFileError: An index of shards that cannot be one.
    """
    try:
        return fetch(repository, ("config.json", weights), offline=offline, hint=hint)
    except MissingError as error:
        first = error
    index = f"{weights}.index.json"
    try:
        folder = fetch(repository, ("config.json", index), offline=offline, hint=hint)
    except MissingError:
        if not allow_pickle:
            raise first from None
        _log.info("%s: no %s to be had, trying %s", repository, weights, PICKLED)
        return fetch(repository, ("config.json", PICKLED), offline=offline, hint=hint)
    fetch(repository, shards(folder / index, present=False), offline=offline, hint=hint)
    return folder


def cached(repository: str, name: str) -> Path | None:
    """A file of a repository in the hub's own cache, or None."""
    try:
        found = try_to_load_from_cache(repository, name)
    except HFValidationError as error:
        raise UsageError(f"{repository!r} is no hub id: {error}") from error
    return Path(found) if isinstance(found, str) else None


def _download(repository: str, name: str) -> tuple[Path | None, str]:
    """The downloaded file, or None and why not."""
    host = urlsplit(constants.ENDPOINT).hostname or ""
    if not getproxies():  # ask for the address first: the client's own retries take most of a minute
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            return None, f"the hub ({host}) cannot be reached"
    try:
        return Path(hf_hub_download(repository, name)), ""
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        return None, f"the download failed ({type(error).__name__}: {str(error).splitlines()[0]})"
