"""Images in Hugging Face ``datasets``: a saved set, a local copy of files, or an id on the hub.

A source is one of these, tried in this order:

- a directory that ``save_to_disk`` wrote: its Arrow files are mapped where they lie;
- any other local directory (Parquet, Arrow, class folders with ``metadata.csv`` or without, tar shards: what
  ``load_dataset`` understands), for example a hub repository that ``hf download`` copied. The library turns
  Parquet into Arrow once, in its own cache (``HF_DATASETS_CACHE``), which takes the space of the data again:
  rows of Arrow can be read in any order, rows of Parquet only in groups;
- a hub id such as ``ILSVRC/imagenet-1k``, downloaded into the same cache.

No code that comes with a data set is run. Images are handed out as they were encoded, never as arrays.

The id of an image, by which everything random is keyed: the value of a column that is named; else the file
name that the set stores for it (relative to the source, if it lies below), when all have one and they
differ; else ``<split>/<row number>``. Images are sorted by id, so neither files nor shards decide the order.
``save_to_disk`` keeps only the last part of file names: a column of whole names is worth having there.
"""

from __future__ import annotations

import errno
import inspect
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from comit_bench.data.digests import file_digests, part_digests, state_of_files
from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError, did_you_mean
from comit_bench.files import inside, open_plain, user_path

EXTRA = 'pip install "comit-bench[hf]"'
SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves
ONLY = ""  # name of the split of a set that has none
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)  # a name alone may be a reader of the library

_log = logging.getLogger(__name__)


def require_datasets() -> None:
    """Make sure that the library is installed (a folder called ``datasets`` can be imported as well)."""
    try:
        version("datasets")
    except PackageNotFoundError as error:
        raise MissingError(f"Hugging Face data sets need the library datasets: {EXTRA}") from error


@contextmanager
def _explained(source: str, *, hub: bool) -> Iterator[None]:
    """Turn the library's errors into ours."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except BenchError:
        raise
    except ConnectionError as error:
        raise MissingError(
            f"{source}: not in the cache of datasets, and the hub cannot be reached ({_first_line(error)}). "
            f"Where there is a network: hf download {source} --repo-type dataset --local-dir DIR; copy DIR "
            "here and name it as the source. HF_HUB_OFFLINE=1 asks the cache alone, without waiting."
        ) from error
    except FileNotFoundError as error:  # also the library's own, for repositories
        access = (
            " A gated repository needs its terms accepted on the hub and `hf auth login`." if hub else
            " Expected a directory of save_to_disk, or one with Parquet, Arrow or image files."
        )  # fmt: skip
        raise MissingError(f"{source}: {_first_line(error)}.{access}") from error
    except DatasetsError as error:
        raise CorruptFileError(
            f"{source}: cannot be read ({_first_line(error.__cause__ or error)})"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BenchError(
                f"{source}: the disk is full. The library datasets keeps its copy in HF_DATASETS_CACHE; "
                "set that to another disk."
            ) from error
        raise BenchError(f"{source}: cannot read: {_first_line(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        if type(error).__module__.startswith("pyarrow"):
            raise CorruptFileError(f"{source}: damaged Arrow or Parquet ({_first_line(error)})") from error
        text = " ".join(str(error).split())[:500].rstrip(".")
        raise UsageError(f"{source}: {text}. Subsets are chosen with subset=NAME.") from error
    except RuntimeError as error:  # refuses data sets that bring a program
        raise UsageError(f"{source}: {_first_line(error)}. Only files of data are read.") from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")[:300]


def open_splits(source: str, *, subset: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """Open a set and return its splits by name (:data:`ONLY` for a saved set without splits).

    Args:
        source: Directory or hub id.
        subset: The library's configuration name, for repositories with several.
        revision: Commit, tag or branch on the hub.

    Raises:
        MissingError: The library, the directory, or the hub repository is not here.
        UsageError: Neither a directory nor a hub id; an unknown or missing subset; a setting that the
            source cannot have.
        CorruptFileError: Files that cannot be read.
        BenchError: Disk full or not readable.
    """
    require_datasets()
    from datasets.load import load_dataset, load_from_disk

    path = user_path(source, "source")
    local = path.exists()
    if not local and (_HUB_ID.fullmatch(source) is None or path.is_absolute()):
        raise MissingError(f"{source}: no such directory, and this is no hub id (OWNER/NAME)")
    if local and revision is not None:
        raise UsageError(f"revision {revision}: {source} is a directory; revisions exist only on the hub")
    if local and not path.is_dir():
        raise UsageError(f"{source}: is a file. Give the directory that holds it.")
    with _explained(source, hub=not local):
        if local and any((path / name).is_file() for name in SAVED):
            if subset is not None:
                raise UsageError(f"subset {subset}: {source} was saved with save_to_disk, without subsets")
            loaded: Any = load_from_disk(str(path))
        else:
            options: dict[str, Any] = {"revision": revision} if revision is not None else {}
            if "trust_remote_code" in inspect.signature(load_dataset).parameters:  # before 4.0
                options["trust_remote_code"] = False
            _log.info("opening %s with datasets %s", source, version("datasets"))
            loaded = load_dataset(str(path.absolute()) if local else source, subset, **options)
    return dict(loaded) if isinstance(loaded, Mapping) else {str(loaded.split or ONLY): loaded}


def _holds_images(feature: Any) -> int:
    """2 for a column of images, 1 for one of plain bytes (or bytes and path), else 0."""
    from datasets.features import Image, Value

    if isinstance(feature, Image):
        return 2
    if isinstance(feature, dict):
        feature = feature.get("bytes")
    return int(isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"))


def find_image_column(features: Mapping[str, Any], wanted: str | None, source: str) -> str:
    """The column that holds the images: the one asked for, the only image column, or the only bytes."""
    kinds = {name: _holds_images(feature) for name, feature in features.items()}
    if wanted is not None:
        if wanted not in kinds:
            raise UsageError(f"image_key: {source} has no column {wanted!r}.{did_you_mean(wanted, kinds)}")
        if not kinds[wanted]:
            raise UsageError(
                f"image_key: column {wanted!r} of {source} holds no images but {features[wanted]}"
            )
        return wanted
    for kind in (2, 1):
        names = [name for name, found in kinds.items() if found == kind]
        if len(names) == 1:
            return names[0]
        if names:
            raise UsageError(
                f"{source} has several columns of images ({', '.join(names)}): choose one with image_key=NAME"
            )
    raise UsageError(f"{source} has no column of images; its columns: {', '.join(kinds) or 'none'}")


class HfImages:
    """The images of one split as bytes, sorted by id, and where ids are row numbers the column ``label``.

    Args:
        dataset: A ``datasets.Dataset``.
        source: Where it came from, for messages and ids.
        split: Its name.
        image_key: Column of images; None: found.
        id_key: Column of ids; None: see the module's docstring.

    Raises:
        UsageError: A column that is not there or cannot be used, ids that occur twice, no rows.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        source: str,
        split: str,
        image_key: str | None = None,
        id_key: str | None = None,
    ) -> None:
        from datasets.features import Image

        self.name = f"{source} ({split})" if split else source
        self.root = user_path(source, "source").absolute()
        if len(dataset) == 0:
            raise UsageError(f"{self.name}: no rows")
        self.column = find_image_column(dataset.features, image_key, self.name)
        numbers = [f"{split or 'row'}/{row:08d}" for row in range(len(dataset))]
        ids = self._ids_from(dataset, id_key) if id_key is not None else self._ids_of(dataset, numbers)
        rows = dataset.select_columns([self.column])
        if isinstance(dataset.features[self.column], Image):
            rows = rows.cast_column(self.column, Image(decode=False))
        self._rows = rows
        order = sorted(range(len(ids)), key=ids.__getitem__)
        self.ids = tuple(ids[i] for i in order)
        self._order = np.array(order, dtype=np.int64)
        self.labels: list[int] | None = None
        if ids == numbers and "label" in dataset.column_names:
            labels = dataset.select_columns(["label"])[:]["label"]
            self.labels = [labels[i] for i in order]

    def _ids_from(self, dataset: Any, key: str) -> list[str]:
        names = dataset.column_names
        if key not in names:
            raise UsageError(f"id_key: {self.name} has no column {key!r}.{did_you_mean(key, names)}")
        values = dataset.select_columns([key])[:][key] if key != self.column else [None]
        if not all(isinstance(value, str | int) and value != "" for value in values):
            raise UsageError(f"id_key: column {key!r} of {self.name} holds more than texts and numbers")
        ids = [str(value) for value in values]
        seen: set[str] = set()
        for name in ids:
            if name in seen:
                raise UsageError(f"id_key: column {key!r} of {self.name} has {name!r} twice; ids must differ")
            seen.add(name)
        return ids

    def _ids_of(self, dataset: Any, numbers: list[str]) -> list[str]:
        """File names where the set stores them, else row numbers."""
        try:  # only the names are read from the mapped files, not the images
            chunks = dataset.with_format("arrow").data.column(self.column).chunks
            paths = [path for chunk in chunks for path in chunk.field("path").to_pylist()]
        except (AttributeError, KeyError, TypeError):  # plain bytes, or no names
            return numbers
        names = [self._below(path) for path in paths]
        usable = all(names) and len(names) == len(set(names)) == len(numbers)
        return [str(name) for name in names] if usable else numbers

    def _below(self, path: str | None) -> str | None:
        """A stored name without this machine's part of it."""
        if path is None or "://" in path or "::" in path:
            return None
        if not Path(path).is_absolute():
            return path.removeprefix("./")
        for root in (self.root, self.root.resolve()):
            if path.startswith(prefix := root.as_posix().rstrip("/") + "/"):
                return path.removeprefix(prefix)
        return None

    def where(self, index: int) -> str:
        """Set, row and id, for messages."""
        return f"{self.name}, row {int(self._order[index])}: {self.ids[index]}"

    def read(self, index: int) -> bytes:
        """The encoded image."""
        try:
            value = self._rows[int(self._order[index])][self.column]
            if isinstance(value, Mapping):
                content, path = value.get("bytes"), value.get("path")
                if content is None and path:
                    with open_plain(self._file(str(path))) as stream:
                        content = stream.read()
            else:
                content = value
        except FileNotFoundError as error:
            raise MissingError(f"{self.where(index)}: no such file: {error.filename}") from error
        except OSError as error:
            raise BenchError(f"{self.where(index)}: cannot read: {error.strerror or error}") from error
        except BenchError:
            raise
        except Exception as error:  # whatever the library says about a damaged row
            raise CorruptFileError(f"{self.where(index)}: the row cannot be read ({error})") from error
        if content is None:
            raise CorruptFileError(f"{self.where(index)}: the row holds no image")
        return bytes(content)

    def digests(self, index: Sequence[int], *, cache: Path, title: str, progress: bool) -> list[bytes]:
        """sha256 of some images, read once as long as the files of the set stay as they are."""
        order = [int(self._order[i]) for i in index]
        more: dict[str, Any] = {"cache": cache, "title": title, "progress": progress}
        names = self._named_files()
        if names is not None:
            return file_digests(self.root, [os.path.relpath(names[i], self.root) for i in order], **more)
        files = [Path(entry["filename"]) for entry in self._rows.cache_files]
        state = state_of_files(files) if files else None  # a set that lives in memory is read every time
        parts = [f"{self.column}/{i}" for i in order]
        return part_digests(self.name, state, parts, lambda part: self._held(index[part]), threads=1, **more)

    def _held(self, index: int) -> bytes:
        """The encoded image; nothing where the row holds none."""
        try:
            return self.read(index)
        except CorruptFileError:
            return b""

    def _named_files(self) -> list[str] | None:
        """The files of all rows when the set only names them; None when it holds images itself."""
        try:
            chunks = self._rows.with_format("arrow").data.column(self.column).chunks
            if any(chunk.field("bytes").null_count < len(chunk) for chunk in chunks):
                return None
            paths = [path for chunk in chunks for path in chunk.field("path").to_pylist()]
        except (AttributeError, KeyError, TypeError):  # plain bytes
            return None
        return None if not all(paths) else [str(self._file(path)) for path in paths]

    def _file(self, path: str) -> Path:
        if "://" in path or "::" in path:
            raise BenchError(f"{self.name}: images inside {path} cannot be read. Unpack the archive.")
        if not Path(path).is_absolute():
            what = f"{self.name}: a row names a file"
            return inside(self.root, path, what=what, kind=BenchError, links=True, windows=False)
        import datasets

        config: Any = getattr(datasets, "config")  # noqa: B009 (a module that its type hints do not name)
        places = [self.root, self.root.resolve(), Path(config.HF_CACHE_HOME), Path(config.HF_DATASETS_CACHE)]
        plain = Path(os.path.normpath(path))
        if plain.exists() and not any(plain.is_relative_to(place) for place in places):
            raise BenchError(
                f"{self.name}: a row names {path}, a file outside of this set. Copy the images below it, or "
                "save the set with its images in it."
            )
        return Path(path)
