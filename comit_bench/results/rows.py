"""Which record belongs to which row and column of a table, and what such a row is called."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from comit_bench.files import digest_json
from comit_bench.results.schema import Record

COLUMN_KEY = "column"  # of a protocol: words about it that the header always shows; follows from the rest
K = TypeVar("K", bound=Hashable)


def record_order(record: Record) -> tuple[Any, ...]:
    """Total order: newest last, contents decide between equals."""
    return (record.created, record.to_json())


def data_side(record: Record) -> dict[str, Any]:
    """Name, version and fingerprint of the data; where its recipe lies changes no number."""
    data = record.task.dataset
    return {"name": data.name, "version": data.version, "fingerprint": data.fingerprint}


def column_digest(record: Record) -> str:
    """What makes a column: task, version, data, the task's side of the protocol."""
    return digest_json([record.task.name, record.task.version, data_side(record), record.task_protocol])


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": "1"}``, digests shortened."""
    if isinstance(value, dict) and value:
        parts = [flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items()]
        return {key: text for part in parts for key, text in part.items()}
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    scheme, colon, rest = text.partition(":")
    return {prefix: rest[:8] if colon and scheme in ("sha256", "fitted") else text}


def tell_apart(
    sides: dict[K, dict[str, str]], first: Sequence[str], *, last: Sequence[str] = (), width: int = 28
) -> tuple[dict[K, str], list[str]]:
    """Find a short label for each of several mappings.

    Args:
        sides: The mappings, by key.
        first: Names to prefer when they differ.
        last: Names that are used only where no other tells enough.
        width: Longest label; longer ones become the key's digest.

    Returns:
        Labels, pairwise distinct unless there is only one; and all names that differ.
    """
    names = sorted({name for side in sides.values() for name in side})
    differing = [n for n in names if len({side.get(n) for side in sides.values()}) > 1]
    differing.sort(key=lambda n: (first.index(n) if n in first else len(first), n in last, n))
    used: list[str] = []
    told: set[tuple[str | None, ...]] = {()}
    for name in differing:
        now = {tuple(side.get(n) for n in (*used, name)) for side in sides.values()}
        if len(now) > len(told):
            used, told = [*used, name], now
    labels = {
        key: ", ".join(f"{n}={side[n]}" for n in used if side.get(n, "null") != "null")
        for key, side in sides.items()
    }
    for key, label in list(labels.items()):
        if len(label) > width or list(labels.values()).count(label) > 1:
            labels[key] = digest_json(sides[key])[7:15]
    return labels, differing


def task_side(record: Record) -> dict[str, str]:
    """The task's side of the protocol and the data, as words."""
    side = {key: value for key, value in record.task_protocol.items() if key != COLUMN_KEY}
    return flat({**side, "data": data_side(record)})


def row_key(record: Record) -> tuple[str, ...]:
    """What makes a row: tokenizer, origin, weights, revision, the tokenizer's side of the protocol."""
    tokenizer = record.tokenizer
    side = digest_json(row_side(record))
    # one that is fitted on each data set has weights of its own in every column, and still is one row
    weights = "fitted" if tokenizer.weights.startswith("fitted:") else tokenizer.weights
    return (tokenizer.name, record.origin, weights, tokenizer.revision or "", side)


def row_side(record: Record) -> dict[str, Any]:
    """The tokenizer's side of the protocol, without settings that only some tasks use, at their defaults.

    So that probes, which decode nothing, and reconstruction by the default decoder share a row.
    """
    side = dict(record.tokenizer_protocol)
    decode = side.get("decode")
    if isinstance(decode, dict) and decode.get("default") is True:
        del side["decode"]
    return side


def _told_side(record: Record) -> dict[str, Any]:
    """The same for labels: all settings of the decoder, under their bare names."""
    side = {key: value for key, value in record.tokenizer_protocol.items() if key != "decode"}
    decode = record.tokenizer_protocol.get("decode")
    settings = decode if isinstance(decode, dict) else {}
    return {**side, **{name: value for name, value in settings.items() if name != "default"}}


def newest_records(
    records: list[Record], row_of: Callable[[Record], tuple[str, ...]]
) -> tuple[list[Record], int]:
    """One record per row and group, the last one; and how many others gave way."""
    kept: dict[tuple[tuple[str, ...], str], Record] = {}
    older = 0
    for record in records:
        key = row_of(record), column_digest(record)
        older += key in kept and kept[key] != record
        kept[key] = record
    return sorted(kept.values(), key=record_order), older


def row_labels(rows: dict[tuple[str, ...], Record]) -> dict[tuple[str, ...], str]:
    """Names; where two rows would bear the same name and marks, what differs in brackets."""
    labels = {key: record.tokenizer.name for key, record in rows.items()}
    namesakes: dict[tuple[str, bool, bool], list[tuple[str, ...]]] = defaultdict(list)
    for key, record in rows.items():
        namesakes[record.tokenizer.name, record.tokenizer.trained, record.origin == "paper"].append(key)
    for keys in namesakes.values():
        if len(keys) > 1:
            sides = {
                key: flat(
                    {
                        **_told_side(rows[key]),
                        "weights": rows[key].tokenizer.weights,
                        "revision": rows[key].tokenizer.revision,
                        "record": rows[key].origin,
                    }
                )
                for key in keys
            }
            # digests say less than settings
            rest = ("configuration", "family", "version")
            told, _ = tell_apart(sides, ["weights", "policy", "record", "revision"], last=rest)
            # a policy's name speaks for itself
            shown = {key: told[key].removeprefix("policy=") for key in keys}
            labels.update({key: f"{labels[key]} ({shown[key]})" for key in keys if shown[key]})
    return labels
