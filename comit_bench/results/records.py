"""The record store: one JSON file per tokenizer x task x protocol, written once, never edited.

What a record holds is in :mod:`comit_bench.results.schema`; its names can be imported from here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from comit_bench.errors import BenchError, CorruptFileError, UsageError, did_you_mean, shown
from comit_bench.files import digest_json, write_atomic
from comit_bench.recipes.reading import parse_json, read_text
from comit_bench.recipes.specs import recipe_root
from comit_bench.results.schema import (
    SCHEMA_VERSION,
    Counts,
    DatasetRow,
    Environment,
    Metric,
    Record,
    TaskRow,
    TokenizerRow,
    protocol_digest,
)

__all__ = [
    "SCHEMA_VERSION",
    "Counts",
    "DatasetRow",
    "Environment",
    "Metric",
    "Record",
    "TaskRow",
    "TokenizerRow",
    "find_record",
    "load_record",
    "load_records",
    "protocol_digest",
    "published_records",
    "record_location",
    "record_path",
    "save_record",
    "tokenizer_slug",
    "validate_record_file",
]

_log = logging.getLogger(__name__)


def _slug(name: str) -> str:
    """A file name for any name; a short digest keeps apart what would become equal."""
    slug = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip(".-")[:64]
    return slug if slug == name else f"{slug or 'unnamed'}-{digest_json(name)[7:15]}"


def tokenizer_slug(tokenizer: TokenizerRow) -> str:
    """Folder of a tokenizer's records: its name and, when it has any, its weights in short."""
    if tokenizer.weights == "none" and tokenizer.revision is None:
        return _slug(tokenizer.name)
    scheme, _, rest = tokenizer.weights.partition(":")
    short = _slug(rest[:12]) if scheme in ("sha256", "fitted") else _slug(f"{scheme}-{rest}".strip("-"))
    revision = f"-r{_slug(tokenizer.revision[:12])}" if tokenizer.revision else ""
    return f"{_slug(tokenizer.name)}@{short}{revision}"


def record_location(root: Path, tokenizer: TokenizerRow, task: TaskRow, digest: str) -> Path:
    """Where the record of this tokenizer x task x protocol digest lies, or would lie."""
    short = digest.removeprefix("sha256:")[:12]
    return root / tokenizer_slug(tokenizer) / f"{_slug(task.name)}-v{task.version}-{short}.json"


def record_path(root: Path, record: Record) -> Path:
    """Where a record lies: ``<root>/<tokenizer>/<task>-v<version>-<protocol>.json``."""
    return record_location(root, record.tokenizer, record.task, record.protocol_digest)


def _identity(tokenizer: TokenizerRow, task: TaskRow, digest: str) -> tuple[object, ...]:
    return (tokenizer.name, tokenizer.weights, tokenizer.revision, task.name, task.version, digest)


def _identity_of(record: Record) -> tuple[object, ...]:
    return _identity(record.tokenizer, record.task, record.protocol_digest)


def save_record(root: Path, record: Record, *, overwrite: bool = False) -> Path:
    """Write a record, whole or not at all.

    Returns:
        Path of the file.

    Raises:
        UsageError: There is one already and ``overwrite`` is False.
        BenchError: The file holds a different protocol (their digests begin alike), or the disk is
            full or not writable.
    """
    path = record_path(root, record)
    text = record.to_json()
    _parse(text, path)  # what cannot be read back must not be written
    if path.exists():
        if not overwrite:
            raise UsageError(
                f"{path}: this tokenizer, task and protocol already have a record, and records are "
                "never edited. Replace it on purpose with overwrite=True (--overwrite always)."
            )
        _refuse_other_identity(path, record)
    write_atomic(path, text)
    return path


def _refuse_other_identity(path: Path, record: Record) -> None:
    try:
        present = load_record(path)
    except BenchError as error:
        _log.warning("replacing an unreadable record: %s", error)
        return
    if _identity_of(present) != _identity_of(record):
        raise BenchError(
            f"{path}: holds another result ({present.tokenizer.name} x {present.task.name}, protocol "
            f"{present.protocol_digest}) than the one to write ({record.tokenizer.name} x "
            f"{record.task.name}, protocol {record.protocol_digest}). Choose another --output DIR."
        )


def load_record(path: Path) -> Record:
    """Read and validate one record.

    Raises:
        MissingError: No such file.
        UsageError: Written by a newer version; says to upgrade.
        CorruptFileError: Names the file and every key that is wrong, with the nearest known key.
    """
    return _parse(read_text(path), path)


_MEND = "Delete the file and run the same command again with --resume to measure it anew."


def _parse(text: str, path: Path) -> Record:
    try:
        raw = parse_json(text, path)
    except CorruptFileError as error:
        raise CorruptFileError(f"{error}. {_MEND}") from error
    if not isinstance(raw, dict):
        raise CorruptFileError(f"{path}: not a record: expected a JSON object, found {type(raw).__name__}")
    schema = raw.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise CorruptFileError(
            f"{path}: not a record: key 'schema' must be 1 to {SCHEMA_VERSION}, got {schema!r}"
        )
    if schema > SCHEMA_VERSION:
        raise UsageError(
            f"{path}: schema {schema} was written by a newer comit_bench; this one reads up to "
            f"{SCHEMA_VERSION}. Upgrade: pip install -U comit_bench"
        )
    try:
        return Record.model_validate_json(text, strict=True)
    except ValidationError as failure:
        lines = [f"  {_explain(dict(error))}" for error in failure.errors()]
        raise CorruptFileError(f"{path}: not a valid record\n" + "\n".join(lines) + f"\n{_MEND}") from failure


def _explain(error: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "(record)"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key.{_nearest_key(error['loc'])}"
    if error["type"] == "missing":
        return f"{where}: required key is missing"
    if isinstance(error["input"], dict | list) or not error["loc"]:
        return f"{where}: {error['msg']}"
    return f"{where} = {shown(error['input'])}: {error['msg']}"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg))), None)


def _nearest_key(location: tuple[int | str, ...]) -> str:
    model: type[BaseModel] = Record
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        model = (_model_in(field.annotation) if field else None) or model
    return did_you_mean(str(location[-1]), (f.alias or name for name, f in model.model_fields.items()))


def load_records(root: Path, *, strict: bool = False) -> list[Record]:
    """Read every record under a directory, in order of their paths.

    A broken file never hides the others: it is reported as a warning and left out.

    Args:
        root: Directory searched at any depth; one that does not exist holds no records.
        strict: Raise instead, after all files were read.
    """
    records, problems = [], []
    for path in sorted(root.rglob("*.json")):
        if path.name.startswith(".") or not path.is_file():
            continue
        try:
            records.append(load_record(path))
        except BenchError as error:
            problems.append(str(error))
            if not strict:
                _log.warning("left out: %s", error)
    if strict and problems:
        raise CorruptFileError("\n".join(problems))
    return records


def published_records(records: Sequence[Record], *, suite: str | None = None) -> list[Record]:
    """The published numbers that ship with the package, as far as they belong beside some records.

    Args:
        records: What was measured; published numbers of other tasks are left out.
        suite: All published numbers of this suite, whatever was measured.
    """
    tasks = {record.task.name for record in records}
    found = load_records(recipe_root("results") / "paper")
    return [r for r in found if r.task.name in tasks or (suite is not None and r.task.suite == suite)]


def find_record(root: Path, tokenizer: TokenizerRow, task: TaskRow, digest: str) -> Record | None:
    """The record of this tokenizer x task x protocol, or None.

    Raises:
        CorruptFileError: Its file exists but is no valid record.
    """
    path = record_location(root, tokenizer, task, digest)
    if not path.exists():
        return None
    record = load_record(path)
    return record if _identity_of(record) == _identity(tokenizer, task, digest) else None


def validate_record_file(path: Path) -> Record:
    """Load one file and warn when it does not lie where runs look for it.

    Raises:
        MissingError: No such file.
        UsageError: Written by a newer version.
        CorruptFileError: Not a valid record; names every key that is wrong.
    """
    record = load_record(path)
    expected = record_path(Path(), record)
    actual = Path(path.resolve().parent.name) / path.name
    if actual != expected:
        _log.warning("%s: a run looks for this record at %s below its records directory", path, expected)
    return record
