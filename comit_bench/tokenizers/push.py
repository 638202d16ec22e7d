"""Uploading a checkpoint folder to the Hugging Face hub; nothing leaves this machine before it loads.

What goes up: ``config.json``, ``model.safetensors``, the model card ``README.md`` and pictures. Anything
else in the folder stays here.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from comit_bench.errors import BenchError, MissingError, UsageError
from comit_bench.tokenizers.load import load_tokenizer

NEEDED = ("config.json", "model.safetensors")
CARD = "README.md"
PICTURES = (".png", ".svg", ".jpg")
_NAME = re.compile(r"\w(?:[\w.-]{0,94}\w)?", flags=re.ASCII)
# Modules whose errors mean the network; the hub's client changed its HTTP library more than once.
_CLIENTS = ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub")
_UNREACHED = ("Connect", "Timeout", "Network", "Offline", "Protocol", "Read", "Write", "Close")


@dataclass(frozen=True, slots=True)
class Upload:
    """What would go, or went, where.

    Attributes:
        folder: The checkpoint.
        repository: ``USER/NAME``.
        files: Names in the folder, sorted.
        size: Bytes of all of them.
        summary: What the loader says about the checkpoint.
        url: Of the repository on the hub; None before the upload.
    """

    folder: Path
    repository: str
    files: tuple[str, ...]
    size: int
    summary: str
    url: str | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {self.summary}",
            *(f"  {name}" for name in self.files),
            f"  {len(self.files)} files, {self.size / 1e6:.1f} MB -> {self.url or self.repository}",
        ]
        return "\n".join(lines)


def check_repository(name: str, where: str = "--repo") -> str:
    """A repository name of the form ``USER/NAME``, returned as it is."""
    parts = name.split("/")
    good = len(parts) == 2 and all(_NAME.fullmatch(part) for part in parts)
    if not good or "--" in name or ".." in name or name.endswith(".git") or len(name) > 96:
        raise UsageError(
            f"{where} {name!r}: expected USER/NAME, letters, digits, '-', '_' and '.', e.g. me/comit-nano"
        )
    return name


def prepare(folder: Path, repository: str) -> Upload:
    """Check a folder and list what would be uploaded; asks no network.

    Raises:
        UsageError: Not ``USER/NAME``; no checkpoint; or one whose weights have a name that the hub's
            readers do not look for.
        MissingError: No such folder, or files that are missing.
        CorruptFileError: A file that cannot be read.
    """
    check_repository(repository)
    folder = folder.expanduser()
    if not folder.is_dir():
        raise MissingError(f"{folder}: no such folder. Give one with {' and '.join(NEEDED)}.")
    path = folder.resolve()
    info = load_tokenizer(str(path), device="cpu", offline=True).info
    lacking = [name for name in NEEDED if not (path / name).is_file()]
    if lacking:
        raise UsageError(
            f"{folder}: loads here, but has no {' and '.join(lacking)}, the name that is asked for on the "
            "hub. Rename the file."
        )
    names = [name for name in (*NEEDED, CARD) if (path / name).is_file()]
    names += [p.name for p in path.iterdir() if p.is_file() and p.suffix.lower() in PICTURES]
    size = sum((path / name).stat().st_size for name in names)
    vocabulary = "continuous" if info.vocab_size is None else f"{info.vocab_size:,}"
    trained = "" if info.trained else ", UNTRAINED"
    card = "" if CARD in names else f"; there is no {CARD}, so the page on the hub will be empty"
    summary = f"{info.family}, {info.message_length} tokens, vocabulary {vocabulary}{trained}{card}"
    return Upload(path, repository, tuple(sorted(names)), size, summary)


def push(upload: Upload, *, private: bool = False, api: Any = None) -> Upload:
    """Make the repository if it is not there and upload the files in one commit.

    Args:
        upload: From :func:`prepare`.
        private: Make a new repository private; otherwise it is what the owner's default says. One that exists
            stays as it is.
        api: A ``huggingface_hub.HfApi``; None makes one with the stored token.

    Returns:
        The same with the address.

    Raises:
        UsageError: No token on this machine.
        BenchError: Offline, refused, or a connection that broke; the folder stays as it is.
    """
    if api is None:
        api = _client()
    try:
        made = api.create_repo(upload.repository, private=private or None, exist_ok=True, repo_type="model")
        api.upload_folder(
            repo_id=upload.repository,
            folder_path=str(upload.folder),
            allow_patterns=list(upload.files),
            commit_message=f"Upload {upload.folder.name} with comit_bench",
        )
    except Exception as error:  # the client's errors depend on its version and its own dependencies
        if not isinstance(error, OSError) and not type(error).__module__.startswith(_CLIENTS):
            raise
        raise BenchError(_explain(error, upload)) from error
    return Upload(upload.folder, upload.repository, upload.files, upload.size, upload.summary, url=str(made))


def retry_command(folder: Path, repository: str, *, private: bool) -> str:
    """The command that uploads a folder once more."""
    options = ["--private"] if private else []
    return shlex.join(["comit-bench", "push", str(folder), "--repo", repository, *options])


def has_token() -> bool:
    """Whether the hub's client would find a token (environment, or a login on this machine)."""
    return huggingface_hub.get_token() is not None


def _client() -> Any:
    if not has_token():
        raise UsageError(
            "no token for the Hugging Face hub on this machine: run `hf auth login` (or set HF_TOKEN) with a "
            "token that may write"
        )
    return huggingface_hub.HfApi(library_name="comit_bench")


def _explain(error: Exception, upload: Upload) -> str:
    """One message: what failed and why."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if status in (401, 403):
        why = (
            f"the hub refused ({status}): the token is not valid or may not write to "
            f"{upload.repository.split('/')[0]}. See `hf auth whoami`"
        )
    elif status is not None:
        why = f"the hub answered {status}: {reason}"
    elif isinstance(error, OSError) or any(word in type(error).__name__ for word in _UNREACHED):
        why = f"the hub cannot be reached ({type(error).__name__}: {reason})"
    else:
        why = f"{type(error).__name__}: {reason}"
    return f"upload to {upload.repository} failed: {why}. The same command tries again"
