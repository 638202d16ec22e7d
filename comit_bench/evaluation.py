"""From tokenizer x task to a record: open the data, tokenize, probe, write. ``run.py`` decides what to do.

Everything finished is on disk before the next thing starts: token shards as they fill, a record as soon
as its task ends. Running the same command again continues.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from comit_bench.errors import BenchError, UsageError
from comit_bench.jobs import Job, Settings
from comit_bench.recipes import DatasetSpec, Recipe
from comit_bench.registry import MAJORITY

if TYPE_CHECKING:
    import torch

    from comit_bench.data.datasets import ClassificationData
    from comit_bench.data.datasets import Split as DataSplit
    from comit_bench.data.store import TokenStore
    from comit_bench.results.schema import Record, TaskRow, TokenizerRow
    from comit_bench.tasks.pool import ProbePool
    from comit_bench.tasks.result import TaskResult
    from comit_bench.tokenizers.base import Tokenizer

SMALL_FLOPS = 2e9  # per image
ENCODE_SEED = 0  # of the per-image generators; part of the protocol
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Reporter:
    """Hooks for progress; the defaults are silent."""

    start: Callable[[str, int, str], Callable[[int], None]] = lambda what, total, unit: lambda done: None
    stop: Callable[[], None] = lambda: None
    check: Callable[[], None] = lambda: None  # between jobs; may raise KeyboardInterrupt


@dataclass(frozen=True, slots=True)
class Messages:
    """Tokens of the splits a task needs, with labels of the rows whose image could be read."""

    stores: Mapping[str, TokenStore]
    labels: Mapping[str, torch.Tensor]
    rows: Mapping[str, torch.Tensor]  # role -> rows of the store of that role's split
    splits: Mapping[str, str]  # role -> its split


class Bench:
    """Does jobs one after another and keeps what several of them share: data, tokenizers, workers."""

    def __init__(self, settings: Settings, *, reporter: Reporter | None = None) -> None:
        self.settings = settings
        self.reporter = reporter or Reporter()
        self._data: dict[str, ClassificationData] = {}
        self._tokenizers: dict[str, Tokenizer] = {}

    # ------------------------------------------------------------- resources

    def data(self, recipe: Recipe[DatasetSpec]) -> ClassificationData:
        """Open (or first make) a data set once."""
        if recipe.spec.name not in self._data:
            from comit_bench.data.datasets import open_dataset

            self._data[recipe.spec.name] = open_dataset(
                recipe,
                data_root=self.settings.data_root,
                cache=self.settings.cache_dir,
                progress=self.settings.progress,
            )
        return self._data[recipe.spec.name]

    @cached_property
    def device(self) -> torch.device:
        from comit_bench.tokenizers.loading import resolve_device

        return resolve_device(self.settings.device)

    @cached_property
    def pool(self) -> ProbePool:
        """Probe workers, started when the first probe is fitted."""
        from comit_bench.tasks.pool import ProbePool

        return ProbePool()

    def close(self) -> None:
        """End worker processes."""
        if "pool" in self.__dict__:
            self.pool.close()

    def tokenizer(self, job: Job) -> Tokenizer:
        """Load a tokenizer, or fit it on the task's train split; once per job group."""
        if not isinstance(job.tokenizer, str):
            return job.tokenizer
        from comit_bench.tokenizers.loading import entry_for, load_tokenizer

        entry = entry_for(job.tokenizer)
        options: dict[str, Any] = dict(entry.paper_options) if job.task.spec.suite == "paper" else {}
        fitted = entry.fitted and not Path(job.tokenizer).is_dir()
        key = f"{job.tokenizer}|{options}|{job.dataset.spec.name if fitted else ''}"
        if key not in self._tokenizers:
            if fitted:
                self._tokenizers[key] = self._fit(job, options)
            else:
                self._tokenizers[key] = load_tokenizer(
                    job.tokenizer,
                    weights=self.settings.weights if entry.takes_weights else None,
                    device=self.settings.device,
                    dtype=self.settings.dtype if entry.takes_weights else "float32",
                    offline=self.settings.offline,
                    **({**options, **self.settings.options} if entry.takes_weights else options),
                )
        return self._tokenizers[key]

    def peek(self, job: Job) -> Tokenizer | None:
        """The tokenizer as far as it exists before data are opened: None for one that is fitted."""
        from comit_bench.tokenizers.loading import entry_for

        if isinstance(job.tokenizer, str):
            fitted = entry_for(job.tokenizer).fitted and not Path(job.tokenizer).is_dir()
            return None if fitted else self.tokenizer(job)
        return job.tokenizer

    def _fit(self, job: Job, options: Mapping[str, Any]) -> Tokenizer:
        from comit_bench.data.images import iterate_images
        from comit_bench.tokenizers.kmeans import KMeansPatchTokenizer

        data, name = self.data(job.dataset), job.task.spec.split.train
        split = data.splits[name]
        rows = self._rows(split)
        resolution = options.get("resolution", 32)
        preprocessing = f"center_crop|resize({resolution},bilinear)"

        def images() -> Any:
            advance = self.reporter.start(f"fitting {job.label} on {data.name}", len(rows), "images")
            for batch in iterate_images(
                split.paths,
                preprocessing,
                batch_size=256,
                num_workers=self.settings.num_workers,
                indices=rows,
            ):
                advance(len(batch.indices))
                good = [row for row, index in enumerate(batch.indices) if index not in batch.broken]
                yield batch.images[good]
            self.reporter.stop()

        key = {
            "data": data.split_fingerprint(name),
            "selection": self._selection,
            "preprocessing": preprocessing,
        }
        return KMeansPatchTokenizer.fit_cached(
            images, key, self.settings.cache_dir / "fits", training_data=f"{data.name} {name}", **options
        )

    # ---------------------------------------------------------------- tokens

    @property
    def _selection(self) -> str:
        return "all" if self.settings.limit is None else f"limit:{self.settings.limit}"

    def _rows(self, split: DataSplit) -> list[int]:
        """The images used: all, or the ``limit`` first in the order of a hash of their ids."""
        if self.settings.limit is None or self.settings.limit >= len(split):
            return list(range(len(split)))
        from comit_bench.seeding import seed_for

        order = sorted(range(len(split)), key=lambda index: seed_for(0, "limit/" + split.ids[index]))
        return sorted(order[: self.settings.limit])

    def policy(self, tokenizer: Tokenizer) -> str | None:
        """The cropping policy a tokenizer runs under, in canonical form; None if it has none."""
        parse = getattr(tokenizer, "policy", None)
        if parse is None:
            if self.settings.policy is not None:
                _log.info("%s looks at whole images: --policy is ignored for it", tokenizer.info.name)
            return None
        return str(parse(self.settings.policy))

    def tokens(self, job: Job, tokenizer: Tokenizer, split_name: str) -> TokenStore:
        """The complete token store of one split."""
        from comit_bench.tasks.tokenizing import store_key, tokenize_split

        data = self.data(job.dataset)
        split = data.splits[split_name]
        rows = self._rows(split)
        key = store_key(
            tokenizer,
            policy=self.policy(tokenizer),
            fingerprint=data.split_fingerprint(split_name),
            seed=ENCODE_SEED,
            selection=self._selection,
        )
        advance = self.reporter.start(f"{job.label}: {data.name}/{split_name}", len(rows), "images")
        try:
            with self._threads(tokenizer):
                store = tokenize_split(
                    tokenizer,
                    split,
                    cache=self.settings.cache_dir,
                    key=key,
                    rows=rows,
                    batch_size=self.settings.batch_size,
                    num_workers=self.settings.num_workers,
                    advance=advance,
                )
        finally:
            self.reporter.stop()
        self._check_broken(job, store, split_name)
        return store

    def _threads(self, tokenizer: Tokenizer) -> AbstractContextManager[None]:
        """One thread for small networks on the CPU.

        Their products are too small to share: the threads wait for each other, for milliseconds a
        product as soon as anything else runs on the machine. Tokens are the same bits either way.
        """
        from comit_bench.tasks.fit import one_thread

        estimate = getattr(tokenizer, "encode_flops", None)
        small = estimate is None or estimate(self.settings.policy) < SMALL_FLOPS
        return one_thread() if small and self.device.type == "cpu" else nullcontext()

    def _check_broken(self, job: Job, store: TokenStore, split_name: str) -> None:
        broken = store.broken()
        if not broken:
            return
        share, limit = len(broken) / store.count, job.dataset.spec.max_broken
        first = "; ".join(list(broken.values())[:3])
        place = f"{job.dataset.spec.name}/{split_name}"
        text = f"{len(broken)} of {store.count} images of {place} cannot be read: {first}"
        if share > limit:
            raise BenchError(
                f"{text}. That is more than the {limit:.1%} the dataset recipe allows (max_broken): replace "
                "the files and run again; tokens of the others are kept."
            )
        _log.warning("%s. They are left out and counted in the record.", text)

    # --------------------------------------------------------------- records

    def roles(self, job: Job) -> dict[str, tuple[str, np.ndarray[Any, np.dtype[np.int64]]]]:
        """For train, early_stop and report: the split and the store rows that play this role."""
        from comit_bench.data.datasets import holdout

        spec, data = job.task.spec.split, self.data(job.dataset)
        ids = {
            name: [data.splits[name].ids[i] for i in self._rows(data.splits[name])] for name in data.splits
        }
        for name in (spec.train, spec.report, spec.early_stop.source):
            if name not in ids:
                raise UsageError(
                    f"{job.task.path}: split {name!r} does not exist in {data.name} (it has {', '.join(ids)})"
                )
        source, fraction = spec.early_stop.source, spec.early_stop.fraction
        held = holdout(ids[source], fraction, salt=f"{job.task.spec.name}/early-stop")
        train = np.arange(len(ids[spec.train]))
        if source == spec.train and fraction < 1:
            train = train[~held]
        report = np.arange(len(ids[spec.report]))
        return {
            "train": (spec.train, train),
            "early_stop": (source, np.flatnonzero(held)),
            "report": (spec.report, report),
        }

    def messages(self, job: Job, tokenizer: Tokenizer | None) -> Messages:
        """Tokenize what the task needs and line it up with its labels, without broken images."""
        import torch

        roles, data = self.roles(job), self.data(job.dataset)
        names = list(dict.fromkeys(name for name, _ in roles.values()))
        stores = {} if tokenizer is None else {name: self.tokens(job, tokenizer, name) for name in names}
        rows, labels = {}, {}
        for role, (name, chosen) in roles.items():
            good = chosen if name not in stores else chosen[stores[name].valid()[chosen]]
            rows[role] = torch.from_numpy(np.ascontiguousarray(good))
        for name in names:
            split = data.splits[name]
            labels[name] = torch.from_numpy(split.labels[np.asarray(self._rows(split), dtype=np.int64)])
        return Messages(stores, labels, rows, {role: name for role, (name, _) in roles.items()})

    def task_protocol(self, job: Job) -> dict[str, Any]:
        """The task's side of the protocol."""
        spec, data = job.task.spec, self.data(job.dataset)
        protocol: dict[str, Any] = {
            "task": {"name": spec.name, "version": spec.version, "recipe": job.task.digest},
            "dataset": {
                "name": data.name,
                "version": data.version,
                "fingerprint": data.fingerprint,
                "classes": len(data.classes),
            },
            "seeds": self.seeds(job),
        }
        if self.settings.control is not None:
            protocol["control"] = self.settings.control
        if self.settings.limit is not None:
            protocol["limit"] = self.settings.limit
        return protocol

    def protocol(self, job: Job, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Everything that can change the number, except the weights, which are the row's identity."""
        protocol = self.task_protocol(job)
        if tokenizer is not None:
            info = tokenizer.info
            protocol["tokenizer"] = {
                "preprocessing": info.preprocessing,
                "policy": self.policy(tokenizer),
                "options": dict(info.options),
                "encode_seed": ENCODE_SEED,
            }
        return protocol

    def seeds(self, job: Job) -> list[int]:
        """Probe seeds 0 .. n-1."""
        return list(range(self.settings.seeds or job.task.spec.seeds))

    def do(self, job: Job) -> Record:
        """Do one job, or return the record that it left earlier.

        Raises:
            BenchError: The job cannot be done; other jobs are not affected.
        """
        from comit_bench.results.records import find_record, save_record
        from comit_bench.results.schema import protocol_digest

        started = time.perf_counter()
        tokenizer = None if job.label == MAJORITY else self.tokenizer(job)
        protocol = self.protocol(job, tokenizer)
        row, task = self._tokenizer_row(tokenizer), self._task_row(job)
        found = find_record(self.settings.records, row, task, protocol_digest(protocol))
        if found is not None and self.settings.overwrite == "only-missing":
            _log.info("%s on %s: the record exists and is kept", job.label, job.task.spec.name)
            return found
        if found is not None and self.settings.overwrite == "never":
            raise UsageError(
                f"{job.label} on {job.task.spec.name} has a record already, and --overwrite never stops "
                "there. Use only-missing to keep it and go on, or always to replace it."
            )
        if tokenizer is not None and self.device.type == "cpu":
            self.pool.start(len(self.seeds(job)))  # the workers get ready while tokens are made
        messages = self.messages(job, tokenizer)
        tokenized = time.perf_counter()
        result = self._majority(job, messages) if tokenizer is None else self._probe(job, tokenizer, messages)
        timings = {"tokenize": tokenized - started, "probe": time.perf_counter() - tokenized}
        record = self._record(job, row, task, protocol, messages, result, timings)
        save_record(self.settings.records, record, overwrite=self.settings.overwrite == "always")
        return record

    def _majority(self, job: Job, messages: Messages) -> TaskResult:
        from comit_bench.tasks.classification import majority_metrics
        from comit_bench.tasks.result import TaskResult, over_seeds

        split = job.task.spec.split
        once = majority_metrics(
            messages.labels[split.train][messages.rows["train"]],
            messages.labels[split.report][messages.rows["report"]],
            self.data(job.dataset).classes,
            job.task.spec.attributes,
        )
        count = len(self.seeds(job))  # the same value for every seed: nothing is random about it
        metrics = {name: over_seeds([m.value] * count, m.n, chance=m.chance) for name, m in once.items()}
        return TaskResult(metrics=metrics)

    def _probe(self, job: Job, tokenizer: Tokenizer, messages: Messages) -> TaskResult:
        import torch

        from comit_bench.tasks.classification import run_classification
        from comit_bench.tasks.fit import MessageSource, Split

        sources = {}
        for name, store in messages.stores.items():
            whole = store.load_all()
            if whole.ids is not None:
                sources[name] = MessageSource(
                    ids=torch.from_numpy(whole.ids.astype(np.int64)), lookup=tokenizer.codes_from_ids
                )
            else:
                sources[name] = MessageSource(codes=torch.from_numpy(np.ascontiguousarray(whole.codes)))
        splits = {
            role: Split(sources[name], messages.labels[name], messages.rows[role])
            for role, name in messages.splits.items()
        }
        seeds, spec = self.seeds(job), job.task.spec
        total = len(seeds) * spec.probe.max_epochs
        advance = self.reporter.start(f"{job.label}: probing {spec.name}", total, "epochs")
        seen: dict[int, int] = {}

        def progress(state: Any) -> None:
            epochs = spec.probe.max_epochs if state.finished else state.log.epoch
            advance(epochs - seen.get(state.seed, 0))
            seen[state.seed] = epochs

        on_cpu = self.device.type == "cpu"
        try:
            return run_classification(
                spec,
                self.data(job.dataset).classes,
                train=splits["train"],
                early_stop=splits["early_stop"],
                report=splits["report"],
                seeds=seeds,
                control="permute-labels" if self.settings.control else None,
                device=self.device,
                pool=self.pool if on_cpu else None,
                workers=None if on_cpu else 1,
                progress=progress,
            )
        finally:
            self.reporter.stop()

    def _tokenizer_row(self, tokenizer: Tokenizer | None) -> TokenizerRow:
        from comit_bench.results.schema import TokenizerRow

        if tokenizer is not None:
            return TokenizerRow.from_info(tokenizer.info)
        return TokenizerRow(
            name=MAJORITY,
            family=MAJORITY,
            kind="reference",
            weights="none",
            training_data="labels of the train split",
            code_licence="Apache-2.0",
        )

    def _task_row(self, job: Job) -> TaskRow:
        from comit_bench.results.schema import DatasetRow, TaskRow

        spec, data = job.task.spec, self.data(job.dataset)
        return TaskRow(
            name=spec.name,
            version=spec.version,
            title=spec.title,
            kind=spec.kind,
            suite=spec.suite,
            recipe=job.task.digest,
            origin=job.task.origin,
            dataset=DatasetRow(name=data.name, version=data.version, fingerprint=data.fingerprint),
        )

    def _record(
        self,
        job: Job,
        row: TokenizerRow,
        task: TaskRow,
        protocol: dict[str, Any],
        messages: Messages,
        result: TaskResult,
        timings: dict[str, float],
    ) -> Record:
        from comit_bench.results.schema import Counts, Environment, Metric, Record, protocol_digest

        metrics = {
            name: Metric.from_seeds(m.per_seed, n=m.n, chance=m.chance, higher_is_better=m.higher_is_better)
            for name, m in result.metrics.items()
        }
        counts = Counts(
            train=len(messages.rows["train"]),
            early_stop=len(messages.rows["early_stop"]),
            report=len(messages.rows["report"]),
            broken=sum(len(store.broken()) for store in messages.stores.values()),
        )
        notes = [
            f"{key}: {value}" for key, value in result.extra.items() if key in ("best_epoch", "epochs_run")
        ]
        if not row.trained:
            notes.append("untrained: random weights, drawn so wide that messages differ at all")
        return Record(
            tokenizer=row,
            task=task,
            metrics=metrics,
            protocol=protocol,
            protocol_digest=protocol_digest(protocol),
            seeds=tuple(self.seeds(job)),
            control=self.settings.control,
            complete=self.settings.limit is None,
            limit=self.settings.limit,
            counts=counts,
            environment=Environment.collect(device=device_name(self.device), dtype=self.settings.dtype),
            timings=timings,
            notes=tuple(notes),
        )


def device_name(device: torch.device) -> str:
    """A device in words, for records."""
    if device.type == "cuda":
        import torch

        return str(torch.cuda.get_device_name(device))
    import platform

    return f"cpu ({platform.machine()})"


@dataclass(slots=True)
class Outcome:
    """Records that were made or found, and what failed."""

    records: list[Record] = field(default_factory=list)
    failures: list[tuple[Job, BenchError]] = field(default_factory=list)


def do_jobs(jobs: Sequence[Job], bench: Bench) -> Outcome:
    """Do all jobs and close the bench; a job that fails does not stop the others."""
    outcome = Outcome()
    try:
        for job in jobs:
            bench.reporter.check()
            try:
                outcome.records.append(bench.do(job))
            except BenchError as error:
                outcome.failures.append((job, error))
                _log.error("%s on %s failed: %s", job.label, job.task.spec.name, error)
    finally:
        bench.close()
    return outcome
