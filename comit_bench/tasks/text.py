"""Text features of a task: each distinct string is encoded once, by a frozen encoder, and kept on disk.

Which encoder made them (``random-t5`` with its seed, ``minilm-table`` with the digest of its file, a hub id
with its commit, or a directory with the digest of its weights) is part of the protocol.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from comit_bench.errors import BenchError, CorruptFileError, MissingError, UsageError, did_you_mean
from comit_bench.files import atomic_path, digest_json, sha256_file, user_path
from comit_bench.nn.plain_files import some
from comit_bench.nn.sizes import DEPTH, HEADS, WIDTH
from comit_bench.nn.text import RANDOM_T5, mean_states, random_t5, word_ids, words_of
from comit_bench.probing.fit import one_thread
from comit_bench.recipes.kinds import TextSpec
from comit_bench.tokenizers.checkpoints import check_float_file, check_values, read_config
from comit_bench.tokenizers.config_node import Node
from comit_bench.tokenizers.hub import fetch

RANDOM = "random-t5"
TABLE = "minilm-table"  # vectors of all-MiniLM-L6-v2, made by scripts/drawings/sentences.py
TABLE_FILE = Path(__file__).parent / "minilm-table.safetensors"
FILES = ("config.json", "model.safetensors", "tokenizer.json")
FORMAT = 1
_BATCH = 32


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A text encoder that has been found, not loaded yet.

    Attributes:
        spec: From the recipe.
        folder: Its files; None for ``random-t5`` and ``minilm-table``.
        identity: What tells it from others, plain JSON; goes into the protocol.
    """

    spec: TextSpec
    folder: Path | None
    identity: dict[str, Any]

    def features(self, texts: Sequence[str], cache: Path | None) -> Tensor:
        """One vector per text, float32 [len(texts), D]; from the cache when the same were asked before.

        Args:
            texts: Any strings; equal ones are computed once.
            cache: The cache directory, or None.

        Raises:
            UsageError: A text without any word, or one that ``minilm-table`` does not hold.
            BenchError: The files hold no usable T5 encoder.
        """
        distinct = sorted(set(texts))
        if empty := [text for text in distinct if not words_of(text)]:
            raise UsageError(f"text {empty[0]!r} has no word that could be encoded")
        vectors = table_vectors(distinct) if self.spec.encoder == TABLE else self._cached(distinct, cache)
        place = {text: row for row, text in enumerate(distinct)}
        return vectors[torch.tensor([place[text] for text in texts], dtype=torch.int64)]

    def _cached(self, distinct: Sequence[str], cache: Path | None) -> Tensor:
        if cache is None:
            return self._encode(distinct)
        key = digest_json({"format": FORMAT, "encoder": self.identity, "texts": list(distinct)})
        path = cache / "text" / f"{key.removeprefix('sha256:')}.safetensors"
        if path.is_file():
            try:
                return load_file(path)["features"]
            except (SafetensorError, KeyError, OSError) as error:
                raise CorruptFileError(
                    f"{path}: damaged text features ({error}). Remove the file and run the command again."
                ) from error
        vectors = self._encode(distinct)
        with atomic_path(path) as temporary:
            save_file({"features": vectors}, temporary, {"encoder": json.dumps(self.identity)})
        return vectors

    def _encode(self, texts: Sequence[str]) -> Tensor:
        with one_thread():  # the same bits whatever the machine
            if self.folder is None:
                words = sorted({word for text in texts for word in words_of(text)})
                model = random_t5(words, seed=self.spec.seed)
                # one by one: padding would change last bits, and a vector must not depend on its company
                return torch.cat([mean_states(model, *word_ids([text], words)) for text in texts])
            return self._released(texts, self.folder)

    def _released(self, texts: Sequence[str], folder: Path) -> Tensor:
        from transformers import AutoTokenizer, T5EncoderModel

        check_t5(folder)
        try:
            pieces: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            loader: Any = T5EncoderModel
            model, told = loader.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except Exception as error:  # what it raises depends on the damage and on its version
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BenchError(
                f"{folder}: no T5 encoder that transformers can load ({reason}). It needs {', '.join(FILES)}."
            ) from error
        lacking = sorted(map(str, told.get("missing_keys", ())))
        if lacking:  # transformers would draw them at random
            raise CorruptFileError(f"{folder / FILES[1]}: lacks weights of the T5 encoder: {some(lacking)}")
        model = model.float()
        state = model.state_dict()
        check_values(state, state, folder / FILES[1])
        found = []
        for text in texts:
            made = pieces([text], return_tensors="pt")
            found.append(mean_states(model.eval(), made["input_ids"], made["attention_mask"].bool()))
        vectors = torch.cat(found)
        if not bool(vectors.isfinite().all()):
            raise BenchError(f"{folder}: what this text encoder computes is not finite (NaN or infinity)")
        return vectors


def table_vectors(texts: Sequence[str]) -> Tensor:
    """Vectors of some texts from the table that comes with the package: float32 [len(texts), 384].

    Raises:
        UsageError: A text is not in the table.
        CorruptFileError: The file of the table cannot be read.
    """
    try:
        with safe_open(TABLE_FILE, framework="pt") as file:
            place = {text: row for row, text in enumerate(json.loads(file.metadata()["texts"]))}
            vectors: Tensor = file.get_tensor("vectors").float()
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{TABLE_FILE}: damaged table of text vectors ({error}). It comes with the package: reinstall "
            "comit_bench."
        ) from error
    if unknown := [text for text in texts if text.lower() not in place]:
        raise UsageError(
            f"text {unknown[0]!r} has no vector in {TABLE}, which holds {len(place)} texts."
            f"{did_you_mean(unknown[0], place)} For other texts set text.encoder of the recipe to {RANDOM} "
            "or to a T5 encoder."
        )
    return vectors[[place[text.lower()] for text in texts]]


def check_t5(folder: Path) -> None:
    """Look at a T5's config and the types of its weights before transformers builds from them.

    Raises:
        MissingError: A file is not there.
        CorruptFileError: No JSON object, or weights that are no floating-point numbers.
        UsageError: A size of another type or out of range.
    """
    node = Node(read_config(folder), folder / FILES[0])
    for key, default, high in (
        ("d_model", 512, WIDTH),
        ("d_kv", 64, WIDTH),
        ("d_ff", 2048, WIDTH),
        ("num_layers", 6, DEPTH),
        ("num_heads", 8, HEADS),
        ("vocab_size", 32128, 1 << 24),
        ("relative_attention_num_buckets", 32, WIDTH),
        ("relative_attention_max_distance", 128, 1 << 20),
    ):
        node.whole(key, default, high=high)
    check_float_file(folder / FILES[1])


def find_text_encoder(spec: TextSpec, *, offline: bool) -> TextEncoder:
    """Find the text encoder of a recipe; a hub id is downloaded unless it is in the hub cache.

    Raises:
        MissingError: Not here and not to be had; says how to get it.
        UsageError: Neither a directory nor a hub id.
    """
    if spec.encoder == RANDOM:
        identity = {"name": RANDOM, "seed": spec.seed, "words": "whole", "size": dict(RANDOM_T5)}
        return TextEncoder(spec, None, identity)
    if spec.encoder == TABLE:
        if not TABLE_FILE.is_file():
            raise CorruptFileError(
                f"{TABLE_FILE}: missing. It comes with the package: reinstall comit_bench."
            )
        return TextEncoder(spec, None, {"name": TABLE, "table": sha256_file(TABLE_FILE)})
    directory = user_path(spec.encoder, "text.encoder")
    if spec.encoder.startswith((".", "/", "~")) or directory.is_dir():
        missing = [name for name in FILES if not (directory / name).is_file()]
        if missing:
            raise MissingError(
                f"text encoder {spec.encoder}: {', '.join(missing)} not there. Point text.encoder of the "
                f"recipe to a directory with {', '.join(FILES)}, or to a hub id."
            )
        return TextEncoder(spec, directory, {"name": directory.name, **_files_identity(directory)})

    hint = "or put a local directory into text.encoder of the recipe"
    folder = fetch(spec.encoder, FILES, offline=offline, hint=hint)
    return TextEncoder(spec, folder, {"name": spec.encoder, **_files_identity(folder)})


def _files_identity(folder: Path) -> dict[str, str]:
    """Digests of the weights, of the configuration they are used in, and of what cuts texts into pieces."""
    keys = ("configuration", "weights", "pieces")
    return {key: sha256_file(folder / name) for key, name in zip(keys, FILES, strict=True)}
