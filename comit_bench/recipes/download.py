"""Downloading one large file over plain HTTP: resumable, checked for its length, whole or absent.

What has arrived lies beside the target as ``NAME.part``, with the server's version of the file in
``NAME.part.json``; the next attempt asks for the rest, and only if that version is unchanged.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from comit_bench.errors import BenchError, CorruptFileError, MissingError
from comit_bench.files import check_url, explain_write_error, refuse_special, require_folder, write_atomic
from comit_bench.recipes.reading import read_json

AGENT = "comit_bench"  # a browser's name would be sent a web page by some servers
BLOCK = 1 << 20
TIMEOUT = 60.0
ATTEMPTS = 4  # without a byte in between
PAUSE = 2.0

Advance = Callable[[int, int | None], None]


class _Checking(HTTPRedirectHandler):
    """Redirections obey :func:`check_url` as well."""

    def __init__(self, checked: bool) -> None:
        self.checked = checked

    def redirect_request(self, *args: Any) -> Any:
        check_url(args[-1], checked=self.checked)
        return super().redirect_request(*args)


def _open(url: str, headers: Mapping[str, str], checked: bool) -> Any:
    check_url(url, checked=checked)
    return build_opener(_Checking(checked)).open(Request(url, headers=dict(headers)), timeout=TIMEOUT)


class _Broken(Exception):
    """The connection ended early; what came is kept."""


def download(
    url: str,
    target: Path,
    *,
    advance: Advance | None = None,
    pause: float = PAUSE,
    checked: bool = False,
    size: int | None = None,
) -> None:
    """Fetch ``url`` into ``target``; an unfinished earlier attempt is continued.

    Args:
        url: An https link, or one that :func:`comit_bench.files.check_url` lets through.
        target: Replaced when everything has arrived, never before.
        advance: Called with the bytes so far and the total, if the server tells it.
        pause: Seconds between two attempts.
        checked: Whether the content is compared with a known checksum afterwards.
        size: Bytes that the file must have, if that is known.

    Raises:
        UsageError: Another kind of address, also one that the server points to.
        MissingError: The server cannot be reached, refuses the file, or offers one of another size.
        CorruptFileError: More was sent than announced.
        BenchError: The disk is full, or the server sent a web page instead of a file.
    """
    refuse_special(target)
    require_folder(target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    part, note = target.with_name(f"{target.name}.part"), target.with_name(f"{target.name}.part.json")
    failures = 0
    while True:
        before = part.stat().st_size if part.is_file() else 0
        try:
            _attempt(url, part, note, advance, checked, size)
            break
        except BenchError:
            raise
        except (_Broken, URLError, HTTPException, TimeoutError, ConnectionError) as error:
            if isinstance(error, HTTPError) and error.code < 500:
                raise MissingError(f"{url}: the server answers {error.code} {error.reason}") from error
            now = part.stat().st_size if part.is_file() else 0
            failures = 0 if now > before else failures + 1
            if failures >= ATTEMPTS or not _worth_a_retry(error):
                reason = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
                kept = f" {now:,} bytes are kept; the same command continues from there." if now else ""
                raise MissingError(f"{url}: the download failed ({reason}).{kept}") from error
            time.sleep(pause)
        except OSError as error:
            raise explain_write_error(error, part) from error
    part.replace(target)
    note.unlink(missing_ok=True)


def _worth_a_retry(error: Exception) -> bool:
    """An unknown host or a refused connection will not mend itself within seconds."""
    reason = getattr(error, "reason", None)
    return not (
        isinstance(error, URLError) and not isinstance(error, HTTPError) and isinstance(reason, OSError)
    )


def _read_note(note: Path) -> dict[str, Any]:
    try:
        content = read_json(note)
    except BenchError:
        return {}
    return content if isinstance(content, dict) else {}


def _attempt(
    url: str, part: Path, note: Path, advance: Advance | None, checked: bool, expected: int | None
) -> None:
    """One request. Returns when the part file is complete."""
    for path in (part, note):
        refuse_special(path)
    known = _read_note(note)
    have = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
    version = known.get("version") if known.get("url") == url else None
    if have and version:
        headers |= {"Range": f"bytes={have}-", "If-Range": str(version)}
    try:
        response = _open(url, headers, checked)
    except HTTPError as error:
        if error.code != 416:  # nothing is left to send: either complete, or another file by now
            raise
        if known.get("total") == have:
            return
        part.unlink()
        raise _Broken("the unfinished part does not belong to this file") from error
    with response:
        if response.headers.get_content_type() == "text/html":
            raise BenchError(f"{url}: the server sent a web page, not a file. Open the link in a browser.")
        start = have if response.status == 206 and _starts_at(response.headers, have) else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        if expected is not None and total not in (None, expected):
            raise MissingError(f"{url}: the server offers {total:,} bytes, expected {expected:,}")
        most = total if expected is None else expected
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        strong = version if version and not version.startswith("W/") else None
        write_atomic(note, json.dumps({"url": url, "version": strong, "total": total}))
        with part.open("r+b" if start else "wb") as stream:
            stream.seek(start)
            stream.truncate()
            while block := _read(response):
                if most is not None and stream.tell() + len(block) > most:
                    raise CorruptFileError(f"{url}: more than {most:,} bytes were sent. Start again.")
                stream.write(block)
                if advance is not None:
                    advance(stream.tell(), total)
            size = stream.tell()
    if total is not None and size != total:
        raise _Broken(f"{size:,} of {total:,} bytes came")


def _starts_at(headers: Mapping[str, str], offset: int) -> bool:
    return (headers.get("Content-Range") or "").strip().startswith(f"bytes {offset}-")


def _read(response: Any) -> bytes:
    try:
        return bytes(response.read(BLOCK))
    except (HTTPException, OSError) as error:
        raise _Broken(str(error) or type(error).__name__) from error
