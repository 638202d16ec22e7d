"""What the jobs of one run share: opened data, loaded tokenizers, probe workers, the other processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from comit_bench.data.datasets import open_dataset
from comit_bench.data.images import iterate_images
from comit_bench.data.split import OpenData
from comit_bench.errors import UnsupportedOperation
from comit_bench.files import require_folder
from comit_bench.nn.ranks import Ranks, launched
from comit_bench.pipeline.jobs import Job, Reference, Settings, is_fitted, options_of
from comit_bench.probing.pool import ProbePool
from comit_bench.recipes.specs import DatasetSpec, Recipe
from comit_bench.tasks.base import find_task
from comit_bench.tokenizers.base import Tokenizer, looks_at_crops
from comit_bench.tokenizers.kmeans import KMeansPatchTokenizer, check_settings
from comit_bench.tokenizers.load import entry_for, load_tokenizer, resolve_device

Start = Callable[[str, int, str], Callable[[int], None]]  # what, how many, unit -> advance


def silent(what: str, total: int, unit: str) -> Callable[[int], None]:
    """Shows no progress."""
    return lambda done: None


@dataclass(slots=True)
class Reporter:
    """Hooks for progress; the defaults are silent."""

    start: Start = silent
    stop: Callable[[], None] = lambda: None
    check: Callable[[], None] = lambda: None  # between jobs; may raise KeyboardInterrupt


class Session:
    """Opens, loads and fits each thing once, however many jobs need it."""

    def __init__(self, settings: Settings, *, reporter: Reporter | None = None) -> None:
        self.settings = settings
        self.reporter = reporter or Reporter()
        self.ranks = Ranks.join()
        self.pool = ProbePool()  # its workers start with the first probe
        self.renewed: set[str] = set()  # token stores that this run has made anew
        self.profile: dict[str, float] = {}  # seconds by stage of tokenization, over all jobs
        self._data: dict[str, OpenData] = {}
        self._tokenizers: dict[str, Tokenizer] = {}

    def require_places(self) -> None:
        """Make sure, before any work, that results and cache can be written.

        Raises:
            BenchError: One of them cannot; says how to choose another.
        """

        def look() -> None:
            if self.ranks.first:
                require_folder(self.settings.output)
                require_folder(self.settings.cache_dir)

        self.ranks.together(look)

    def data(self, recipe: Recipe[DatasetSpec], *, contents: bool = True) -> OpenData:
        """Open, or first make, a data set.

        Args:
            recipe: Which.
            contents: False only lists its files, unless it is open already: enough for counts.
        """
        name = recipe.spec.name
        if name in self._data:
            return self._data[name]
        with self.ranks.in_turn():
            data = open_dataset(
                recipe,
                data_root=self.settings.data_root,
                cache=self.settings.cache_dir,
                progress=self.settings.progress and self.ranks.first,
                contents=contents,
            )
        if contents:
            self._data[name] = data
        return data

    @cached_property
    def device(self) -> torch.device:
        device = resolve_device(self.settings.device)
        if str(device) == "cuda" and self.ranks.world > 1:
            return resolve_device(f"cuda:{launched().local_rank}")
        return device

    def tokenizer(self, job: Job) -> Tokenizer | None:
        """Load a job's tokenizer, or fit it on the task's train split; None for a reference row."""
        if not isinstance(job.tokenizer, str):
            return None if isinstance(job.tokenizer, Reference) else job.tokenizer
        entry, options, fitted = entry_for(job.tokenizer), options_of(job, self.settings), is_fitted(job)
        key = f"{job.tokenizer}|{options}|{job.dataset.spec.name if fitted else ''}"
        if key not in self._tokenizers:
            if fitted:
                self._tokenizers[key] = _fit(job, options, self)
            else:
                self._tokenizers[key] = load_tokenizer(
                    job.tokenizer,
                    weights=self.settings.weights if entry.takes("weights") else None,
                    device=str(self.device) if self.ranks.world > 1 else self.settings.device,
                    dtype=self.settings.dtype if entry.family.takes_weights else "float32",
                    offline=self.settings.offline,
                    **options,
                )
        return self._tokenizers[key]

    def peek(self, job: Job) -> Tokenizer | None:
        """The tokenizer as far as it exists before data are opened: None for one that is fitted."""
        if not is_fitted(job):
            return self.tokenizer(job)
        check_settings(**options_of(job, self.settings))
        return None

    def settle_policies(self, jobs: Sequence[Job]) -> list[Job]:
        """One job instead of one per policy for plugins that turn out, once loaded, to see whole images."""
        settled, merged = [], set()
        for job in jobs:
            asked = isinstance(job.tokenizer, str) and job.policy is not None
            unknown = asked and entry_for(job.label).looks_at_crops() is None
            if unknown and not looks_at_crops(self.tokenizer(job)):
                if (job.label, job.task.spec.name) in merged:
                    continue
                merged.add((job.label, job.task.spec.name))
                job = replace(job, policy=None)
            settled.append(job)
        return settled


def why_not(job: Job, tokenizer: Tokenizer | None) -> str | None:
    """Why a tokenizer is left out of a task; None when it can be measured.

    Args:
        job: Which tokenizer on which task.
        tokenizer: The tokenizer, when it is loaded already.
    """
    spec, splits = job.task.spec, job.dataset.spec.splits
    if is_fitted(job) and spec.split.train not in splits:
        return (
            f"it is fitted on training images, and {job.dataset.spec.name} has no split "
            f"{spec.split.train!r} (it has {', '.join(splits)})"
        )
    if tokenizer is None:
        return None
    if tokenizer.info.stem and not spec.task_kind.probed:
        return f"its tokens are pixels, its network belongs to a probe, and {spec.kind} fits none"
    return find_task(spec).refuses(spec, tokenizer)


def refuse(job: Job, tokenizer: Tokenizer | None) -> None:
    """Say what a tokenizer cannot do before anything is tokenized."""
    reason = why_not(job, tokenizer)
    if reason is not None:
        raise UnsupportedOperation(f"{job.label} is left out of {job.task.spec.name}: {reason}")


def _fit(job: Job, options: Mapping[str, Any], session: Session) -> Tokenizer:
    refuse(job, None)
    settings, name = session.settings, job.task.spec.split.train
    data = session.data(job.dataset)
    split = data.splits[name]
    rows = settings.images_of(split)
    preprocessing = split.preprocessing(f"center_crop|resize({options.get('resolution', 32)},bilinear)")

    def images() -> Iterator[Tensor]:
        advance = session.reporter.start(f"fitting {job.label} on {data.name}", len(rows), "images")
        for batch in iterate_images(
            split.paths, preprocessing, batch_size=256, num_workers=settings.num_workers, indices=rows
        ):
            advance(len(batch.indices))
            good = [row for row, index in enumerate(batch.indices) if index not in batch.broken]
            yield batch.images[good]
        session.reporter.stop()

    key = {
        "data": data.fingerprints[name],
        "selection": settings.selection,
        "preprocessing": preprocessing,
    }
    with session.ranks.in_turn():
        return KMeansPatchTokenizer.fit_cached(
            images, key, settings.cache_dir / "fits", training_data=f"{data.name} {name}", **options
        )
