"""The embedded benchmark's images, made at first use: things on photographs, decided by a seed.

:func:`generate` writes one set in an official layout (``formats``), :func:`verify` reads it
again. The painting itself is in ``digits`` and ``painting``.

Every file appears whole or not at all. A chunk of images is finished once its list in ``.scenes/``
exists; an interrupted run repeats unfinished chunks only. ``scenes.json`` comes last. The content
digest covers decoded pixels and parsed labels, so encoder versions and file dates do not matter.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from tqdm import tqdm

from comit_bench.data.digests import file_digests
from comit_bench.data.scenes.formats import FORMAT, Pixels, contact_sheet, label_files, paint_files, painter
from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError
from comit_bench.files import (
    atomic_path,
    digest_json,
    explain_write_error,
    locked,
    remove_folder,
    sha256_file,
    write_atomic,
)
from comit_bench.recipes.reading import read_json
from comit_bench.recipes.specs import GeneratorSpec

__all__ = ["CHUNK", "MANIFEST", "contact_sheet", "generate", "verify"]

CHUNK = 500  # images
MANIFEST = "scenes.json"
LISTS = ".scenes"
_log = logging.getLogger(__name__)


def _png(pixels: Pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def _pixel_digest(pixels: Pixels) -> str:
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def _content_digest(pixels: dict[str, str], labels: dict[str, Any]) -> str:
    """One digest over decoded pixels and parsed labels; encodings and file order do not matter."""
    return digest_json(pixels | {path: digest_json(content) for path, content in labels.items()})


def _settings(spec: GeneratorSpec) -> dict[str, Any]:
    return {"format": FORMAT, **spec.model_dump(mode="json")}


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except MissingError as error:
        raise MissingError(f"{path}: missing. Generate the scenes again to restore it.") from error
    except CorruptFileError as error:
        raise CorruptFileError(f"{error}. Delete the file and generate the scenes again.") from error


def _check(spec: GeneratorSpec) -> None:
    """Refuse what cannot be painted, or not into files."""
    if spec.layout == "mixture" and spec.name == "drawings":
        raise UsageError("generator.layout = 'mixture': it has no files, it is painted in memory to train on")
    painter(spec).check_spec(spec)


def _check_place(spec: GeneratorSpec, directory: Path) -> None:
    """Refuse a directory that holds something else."""
    started = directory / LISTS / "spec.json"
    if not started.is_file():
        if directory.is_dir() and any(p.name != LISTS for p in directory.iterdir()):
            raise UsageError(
                f"{directory}: holds files that are not embedded scenes. Choose another folder, or empty it."
            )
        return
    held, wanted = _read_json(started), _settings(spec)
    if not isinstance(held, dict):
        raise CorruptFileError(f"{started}: not the settings of scenes. Delete the folder {directory}.")
    if held != wanted:
        differ = [f"{k} {held.get(k)!r}, wanted {wanted[k]!r}" for k in wanted if held.get(k) != wanted[k]]
        raise UsageError(
            f"{directory}: holds scenes made with other settings ({'; '.join(differ)}). "
            "Delete that folder to make them anew, or choose another."
        )


def _manifest(directory: Path) -> tuple[GeneratorSpec, str, dict[str, str]]:
    """Settings, content digest and sha256 of the label files of a finished directory."""
    path = directory / MANIFEST
    if not path.is_file():
        raise MissingError(f"{path}: missing, so these are no finished scenes. Generate them first.")
    content = _read_json(path)
    try:
        settings = {k: v for k, v in content["settings"].items() if k != "format"}
        spec = GeneratorSpec.model_validate(settings)
        return spec, str(content["digest"]), {str(k): str(v) for k, v in content["labels"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptFileError(
            f"{path}: not a manifest of scenes. Delete the file and generate the scenes again."
        ) from error


def _plan(spec: GeneratorSpec) -> list[tuple[str, int, int]]:
    counts: tuple[tuple[str, int], ...] = (("train", spec.train), ("val", spec.val))
    return [(s, a, min(a + CHUNK, n)) for s, n in counts for a in range(0, n, CHUNK)]


def _finished(directory: Path, listing: Path) -> dict[str, Any] | None:
    """The list of a finished chunk, None when it has to be painted (again).

    Files are compared by content, which is read once (``comit_bench.data.digests``).
    """
    try:
        content = read_json(listing)
        names = list(content["files"])
        found = file_digests(directory, names, cache=directory / LISTS)
        for name, digest in zip(names, found, strict=True):
            _, wanted = content["files"][name]
            if digest.hex() != wanted:
                if isinstance(wanted, str):  # earlier versions noted sizes
                    _log.warning("%s: is not what was painted; it is painted again", directory / name)
                return None
    except (OSError, BenchError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return cast(dict[str, Any], content)


def _write_image(path: Path, data: bytes) -> None:
    """Whole or not at all. Leaner than ``write_atomic``: a lock keeps others away from the folder."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise explain_write_error(error, path) from error


def _write_chunk(
    spec: GeneratorSpec, split: str, start: int, stop: int, directory: Path, bar: Any
) -> dict[str, Any]:
    """Paint and write one chunk, its list last."""
    content: dict[str, Any] = {"files": {}, "records": []}
    folders: set[Path] = set()
    with atomic_path(directory / LISTS / f"{split}-{start:06d}.json") as listing:
        for files, record in paint_files(spec, split, start, stop):
            for name, pixels in files.items():
                path, data = directory / name, _png(pixels)
                if path.parent not in folders:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    folders.add(path.parent)
                _write_image(path, data)
                content["files"][name] = [_pixel_digest(pixels), hashlib.sha256(data).hexdigest()]
            if record:
                content["records"].append(record)
            bar.update()
        listing.write_text(json.dumps(content), encoding="utf-8")
    return content


def _collect(
    spec: GeneratorSpec, directory: Path, progress: bool
) -> tuple[dict[str, str], dict[str, list[dict[str, Any]]]]:
    """Pixel digests and label records of all chunks, painting those that are not finished."""
    pixels: dict[str, str] = {}
    records: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    with tqdm(
        total=spec.train + spec.val, desc=f"scenes {spec.layout}", unit="img", disable=not progress
    ) as bar:
        for split, start, stop in _plan(spec):
            chunk = _finished(directory, directory / LISTS / f"{split}-{start:06d}.json")
            if chunk is None:
                chunk = _write_chunk(spec, split, start, stop, directory, bar)
            else:
                bar.update(stop - start)
            pixels |= {path: entry[0] for path, entry in chunk["files"].items()}
            records[split] += chunk["records"]
    return pixels, records


def _finished_digest(spec: GeneratorSpec, directory: Path) -> str | None:
    """The digest when every listed file holds what was written, else None: something is to be done."""
    _check_place(spec, directory)
    try:
        _, digest, labels = _manifest(directory)
    except (MissingError, CorruptFileError):
        return None
    chunks = [_finished(directory, directory / LISTS / f"{s}-{a:06d}.json") for s, a, _ in _plan(spec)]
    held = {path: sha256_file(directory / path) for path in labels if (directory / path).is_file()}
    return digest if None not in chunks and held == labels else None


def generate(spec: GeneratorSpec, directory: Path, *, progress: bool = True) -> str:
    """Write the set that ``spec`` describes into ``directory`` and return its content digest.

    A finished directory is returned at once after a look at its files; what is missing, cut short or
    changed is painted again. An interrupted run continues. Several processes may call this at the
    same time: one works, the others wait.

    Raises:
        UsageError: The directory holds other scenes or other files (nothing is touched then), or the
            settings cannot be painted.
        BenchError: Disk full or not writable.
    """
    _check(spec)
    done = _finished_digest(spec, directory)
    if done is not None:
        return done
    with locked(directory.parent / f".{directory.name}.lock", f"painting {directory.name}"):
        done = _finished_digest(spec, directory)
        return done if done is not None else _generate(spec, directory, progress)


def _generate(spec: GeneratorSpec, directory: Path, progress: bool) -> str:
    for leftover in sorted(directory.rglob(".*.part")):  # of a killed run: nobody else is at work here
        if leftover.is_dir():
            remove_folder(leftover)
        else:
            leftover.unlink(missing_ok=True)
    write_atomic(directory / LISTS / "spec.json", json.dumps(_settings(spec)))
    pixels, records = _collect(spec, directory, progress)
    labels = label_files(spec, records)
    held = {}
    for path, content in labels.items():
        text = json.dumps(content, separators=(",", ":"))
        write_atomic(directory / path, text)
        held[path] = sha256_file(directory / path)
    digest = _content_digest(pixels, labels)
    counts = {"train": spec.train, "val": spec.val, "files": len(pixels) + len(labels)}
    summary = {"digest": digest, "settings": _settings(spec), "counts": counts, "labels": held}
    write_atomic(directory / MANIFEST, json.dumps(summary, indent=2) + "\n")
    return digest


def _decode(path: Path) -> Pixels:
    try:
        with Image.open(path) as image:
            return np.asarray(image, dtype=np.uint8)
    except FileNotFoundError as error:
        raise MissingError(f"{path}: missing. Generate the scenes again to restore it.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise CorruptFileError(
            f"{path}: not a readable image ({error}). Delete the file and generate the scenes again."
        ) from error


def verify(directory: Path) -> str:
    """Read every image and label file again and return the content digest.

    Raises:
        MissingError: No finished scenes here, or a file was deleted (named).
        CorruptFileError: A file's content differs from what was painted (named).
    """
    spec, expected, _ = _manifest(directory)
    pixels: dict[str, str] = {}
    for split, start, _ in _plan(spec):
        listing = _read_json(directory / LISTS / f"{split}-{start:06d}.json")
        for path, (digest, _) in listing["files"].items():
            pixels[path] = _pixel_digest(_decode(directory / path))
            if pixels[path] != digest:
                raise CorruptFileError(
                    f"{directory / path}: its pixels are not those that were painted. "
                    "Delete the file and generate the scenes again."
                )
    labels = {path: _read_json(directory / path) for path in label_files(spec, {"train": [], "val": []})}
    digest = _content_digest(pixels, labels)
    if digest != expected:
        names = ", ".join(labels) or MANIFEST
        raise CorruptFileError(
            f"{directory}: content digest {digest}, but {MANIFEST} says {expected}. All images are "
            f"as painted, so look at {names}. Delete the changed file and generate the scenes again."
        )
    return digest
