"""From tokenizer x task to a record: open the data, tokenize, probe, write. ``run.py`` decides what to do.

Everything finished is on disk before the next thing starts: token shards as they fill, a record as soon
as its task ends. Running the same command again continues. What is measured, and how, is up to the
executor of the task's kind (``tasks/base.py``); data and tokens come from ``resources.py``.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from comit_bench.errors import BenchError, UnsupportedOperation, UsageError
from comit_bench.files import digest_json, locked, remove_folder
from comit_bench.pipeline.failures import unexpected
from comit_bench.pipeline.jobs import Job
from comit_bench.pipeline.record import (
    images_of,
    make_record,
    note_seconds,
    save_with_images,
    task_row,
    tokenizer_row,
)
from comit_bench.pipeline.resources import ENCODE_SEED, SMALL_FLOPS, Reporter, Resources
from comit_bench.recipes.specs import KINDS, check_fit
from comit_bench.tokenizers.registry import MAJORITY

if TYPE_CHECKING:
    from torch import Tensor

    from comit_bench.data.tokens.store import TokenStore
    from comit_bench.probing.fit import MessageSource
    from comit_bench.results.schema import Counts, Record, TaskRow, TokenizerRow
    from comit_bench.tasks.base import Inputs, Role
    from comit_bench.tasks.result import TaskResult
    from comit_bench.tokenizers.base import Tokenizer

__all__ = ["Bench", "Outcome", "Reporter", "do_jobs"]

_log = logging.getLogger(__name__)
MEMORY_ADVICE = (
    "Lower --batch-size, close other programs that use this device, take --dtype bfloat16 or more memory, or "
    "--device cpu. What was finished is kept: the same command continues."
)


class Elsewhere(Exception):
    """Another run is doing this job."""


class Bench(Resources):
    """Does jobs one after another."""

    def seeds(self, job: Job) -> list[int]:
        """Seeds 0 .. n-1; ``--seeds`` is about probes."""
        spec = job.task.spec
        return list(range((self.settings.seeds if KINDS[spec.kind].probed else None) or spec.seeds))

    def control(self, job: Job) -> str | None:
        """The control of a job; it means nothing where no probe is fitted."""
        return self.settings.control if KINDS[job.task.spec.kind].probed else None

    def roles(self, job: Job) -> dict[str, Role]:
        """For train, early_stop and report: the images that play this role, broken ones included.

        Where no probe is fitted there is only ``report``.

        Raises:
            UsageError: The data are of another kind than the task, or a split does not exist.
        """
        from comit_bench.data.splitting import holdout
        from comit_bench.tasks.base import Role

        check_fit(job.task, job.dataset)
        spec, data = job.task.spec, self.data(job.dataset)
        kind = KINDS[spec.kind]
        source, fraction = spec.split.early_stop.source, spec.split.early_stop.fraction
        kept = {n: np.array(self.rows(data.splits[n]), dtype=np.int64) for n in spec.split_names}
        if not kind.probed:
            every = kept[spec.split.report]
            return {"report": Role(data.splits[spec.split.report], every, np.arange(len(every)))}
        ids = [data.splits[source].ids[image] for image in kept[source]]
        held = holdout(ids, fraction, salt=f"{spec.name}/early-stop")
        train = np.arange(len(kept[spec.split.train]))
        if source == spec.split.train and fraction < 1:
            train = train[~held]
        rows = {
            "train": (spec.split.train, train),
            "early_stop": (source, np.flatnonzero(held)),
            "report": (spec.split.report, np.arange(len(kept[spec.split.report]))),
        }
        return {role: Role(data.splits[name], kept[name], chosen) for role, (name, chosen) in rows.items()}

    def inputs(self, job: Job) -> Inputs:
        """What the executor gets, without messages."""
        from comit_bench.tasks.base import Inputs

        on_cpu, probed = self.device.type == "cpu", KINDS[job.task.spec.kind].probed
        return Inputs(
            spec=job.task.spec,
            data=self.data(job.dataset),
            roles=self.roles(job),
            seeds=self.seeds(job),
            control=self.control(job),
            cache=self.settings.cache_dir,
            offline=self.settings.offline,
            device=self.device,
            pool=self.pool if on_cpu and probed else None,
            workers=None if on_cpu else 1,
            batch_size=self.settings.batch_size,
            num_workers=self.settings.num_workers,
            ranks=self.ranks,
        )

    def with_messages(
        self, job: Job, tokenizer: Tokenizer, inputs: Inputs
    ) -> tuple[Inputs, dict[str, TokenStore]]:
        """Tokenize what the task needs; broken images leave their roles."""
        from comit_bench.tasks.controls import controlled_messages

        names = list(dict.fromkeys(role.split.name for role in inputs.roles.values()))
        stores = {name: self.tokens(job, tokenizer, name) for name in names}
        sources = {name: message_source(store, tokenizer) for name, store in stores.items()}
        roles = {}
        for name, role in inputs.roles.items():
            split = role.split.name
            valid = stores[split].valid()[role.rows]
            messages = controlled_messages(sources[split], inputs.control, role.all_ids)
            roles[name] = replace(role, rows=role.rows[valid], messages=messages, store=stores[split])
        return replace(inputs, roles=roles, whole_roles=inputs.roles, tokenizer=tokenizer), stores

    def protocol(self, job: Job, tokenizer: Tokenizer | None, inputs: Inputs) -> dict[str, Any]:
        """Everything that can change the number, except the weights, which are the row's identity.

        The tokenizer's side also says which network they are the weights of, and which code computes it.
        """
        from comit_bench.data.images import upright
        from comit_bench.tasks.base import find_executor
        from comit_bench.tokenizers.identity import code_version

        spec, data = job.task.spec, inputs.data
        described = {
            "name": data.name,
            "version": data.version,
            "fingerprint": data.fingerprint,
            "classes": len(data.classes),
        }
        if data.notes:
            described["notes"] = dict(data.notes)
        protocol: dict[str, Any] = {
            "task": {"name": spec.name, "version": spec.version, "recipe": job.task.digest},
            "dataset": described,
            "seeds": inputs.seeds,
            **find_executor(spec).protocol(replace(inputs, tokenizer=tokenizer)),
        }
        if inputs.control is not None:
            protocol["control"] = inputs.control
        if self.settings.limit is not None:
            protocol["limit"] = self.settings.limit
        if tokenizer is not None:
            info = tokenizer.info
            protocol["tokenizer"] = {
                "family": info.family,
                "configuration": info.configuration,
                "version": code_version(tokenizer),
                "preprocessing": upright(info.preprocessing) if data.exif else info.preprocessing,
                "policy": self.policy(job, tokenizer),
                "options": dict(info.options),
                "encode_seed": ENCODE_SEED,
            }
            settings = getattr(tokenizer, "decode_options", None)
            if settings and KINDS[spec.kind].decodes:
                protocol["tokenizer"]["decode"] = dict(settings)
        return protocol

    def do(self, job: Job, following: Sequence[Job] = (), *, wait: bool = True) -> Record | None:
        """Do one job, or return the record that it left earlier; None in all processes but the first.

        A job that another run is just measuring is left to it, and its record is returned.

        Args:
            job: What to do.
            following: The next jobs; their data may be opened and their tokens made while this one's
                probes keep the workers busy.
            wait: False does not wait for another run.

        Raises:
            Elsewhere: Another run is measuring it, and ``wait`` is False. Its tokens are made by then.
            BenchError: The job cannot be done; other jobs are not affected.
        """
        started, encoded = time.perf_counter(), self.encoded
        tokenizer, inputs, protocol, found = self._begin(job)
        mended = found is not None and self._mended(job, tokenizer, inputs, found)
        if self.ranks.share(found is not None and not mended):
            return found
        probed = KINDS[job.task.spec.kind].probed
        if not probed and tokenizer is not None:
            self._refuse(job, tokenizer, inputs)
        if probed and tokenizer is not None and self.device.type == "cpu" and self.ranks.first:
            self.pool.start(len(inputs.seeds))  # the workers get ready while tokens are made
        stores: dict[str, TokenStore] = {}
        if tokenizer is not None:
            inputs, stores = self.with_messages(job, tokenizer, inputs)
        name = _work_name(job, tokenizer, protocol, self.device.type, inputs)
        work = self.settings.cache_dir / "unfinished" / name
        with self._alone(job, work.with_name(f".{work.name}.lock"), wait):
            row, task = tokenizer_row(tokenizer), task_row(job, inputs.data)
            again = self.ranks.together(lambda: self._find(row, task, protocol))
            if self.ranks.share(again is not None and again != found):  # by another run, meanwhile
                return again
            tokenized = time.perf_counter()
            result = self._result(job, inputs, tokenizer, work, following)
            if result is None:
                return None
            record = make_record(
                result,
                row=row,
                task=task,
                protocol=protocol,
                seeds=inputs.seeds,
                counts=_counts(inputs, stores, self.settings.limit),
                settings=self.settings,
                control=inputs.control,
                device=self.device,
                timings={"tokenize": tokenized - started, "probe": time.perf_counter() - tokenized},
                incomplete=inputs.data.shortcomings(_broken(inputs, stores)),
            )
            record = save_with_images(self.settings, record, result.per_image, replace=mended)
            remove_folder(work)
            if tokenizer is not None:
                sizes = {name: len(split) for name, split in inputs.data.splits.items()}
                note_seconds(
                    job,
                    self.settings,
                    seconds=time.perf_counter() - started,
                    images=images_of(job, sizes, self.settings),
                    encoded=self.encoded - encoded,
                )
            return record

    def _find(self, row: TokenizerRow, task: TaskRow, protocol: dict[str, Any]) -> Record | None:
        """A record that another run has left meanwhile and that is to be kept; the first process looks."""
        from comit_bench.results.records import find_record
        from comit_bench.results.schema import protocol_digest

        if not self.ranks.first or self.settings.overwrite == "always":
            return None
        return find_record(self.settings.records, row, task, protocol_digest(protocol))

    @contextmanager
    def _alone(self, job: Job, lock: Path, wait: bool) -> Iterator[None]:
        """No other run measures this job during the block, with the same cache."""
        what = f"measuring {job.label} on {job.task.spec.name}"
        with ExitStack() as stack:

            def enter() -> bool:
                return not self.ranks.first or stack.enter_context(locked(lock, what, wait=wait))

            if not self.ranks.share(self.ranks.together(enter)):
                raise Elsewhere(what)
            yield

    def _result(
        self,
        job: Job,
        inputs: Inputs,
        tokenizer: Tokenizer | None,
        work: Path,
        following: Sequence[Job],
    ) -> TaskResult | None:
        """Fit probes, or look at images; None in processes that have no part in it."""
        probed = KINDS[job.task.spec.kind].probed
        if probed and not self.ranks.first:
            return None
        if self.settings.overwrite == "always" and self.ranks.first:
            remove_folder(work)
        fitted_apart = probed and tokenizer is not None and len(inputs.seeds) > 1  # in worker processes
        beside = self._make_ready_beside(following) if fitted_apart else None
        result = self._measure(job, replace(inputs, work=None if probed else work), tokenizer)
        if beside is not None:
            beside.join()
        return result

    def _refuse(self, job: Job, tokenizer: Tokenizer, inputs: Inputs) -> None:
        """Say what a tokenizer cannot do, and what is wrong with the data, before anything is tokenized.

        Raises:
            UnsupportedOperation: As the executor says.
            BenchError: The data cannot be measured.
        """
        from comit_bench.tasks.base import ExaminesData, find_looking_executor

        self.refuse(job, tokenizer)
        executor = find_looking_executor(job.task.spec)
        if isinstance(executor, ExaminesData):
            examined = replace(inputs, tokenizer=tokenizer)
            self.ranks.together(lambda: executor.examine(examined) if self.ranks.first else None)

    def _make_ready_beside(self, following: Sequence[Job]) -> threading.Thread | None:
        """Open data and make tokens of the next jobs in a thread: fits leave a core idle now and then.

        Only where it costs nobody: one process, on a CPU, small networks. What goes wrong is left to be met
        again when it is the job's turn.
        """
        if not following or self.ranks.world > 1 or self.device.type != "cpu":
            return None

        def work() -> None:
            with suppress(Exception):
                for job in following:
                    self._make_ready(job)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def _make_ready(self, job: Job) -> None:
        self.data(job.dataset, quiet=True)
        if job.label == MAJORITY:
            return
        tokenizer = self.tokenizer(job, quiet=True)
        flops: Any = getattr(tokenizer, "encode_flops", None)
        if flops is not None and flops(job.policy) >= SMALL_FLOPS:
            return
        roles = self.inputs(job).roles.values()
        for name in dict.fromkeys(role.split.name for role in roles):
            self.tokens(job, tokenizer, name, quiet=True)

    def _begin(self, job: Job) -> tuple[Tokenizer | None, Inputs, dict[str, Any], Record | None]:
        """Everything before tokens: tokenizer, data, protocol, and the record if there is one."""
        from comit_bench.results.records import find_record
        from comit_bench.results.schema import protocol_digest

        together = self.ranks.together
        inputs = together(lambda: self.inputs(job))
        tokenizer = together(lambda: None if job.label == MAJORITY else self.tokenizer(job))

        def look_up() -> tuple[dict[str, Any], Record | None]:
            with self.ranks.in_turn():
                protocol = self.protocol(job, tokenizer, inputs)
            row, task = tokenizer_row(tokenizer), task_row(job, inputs.data)
            found = find_record(self.settings.records, row, task, protocol_digest(protocol))
            if found is not None and self.settings.overwrite == "never":
                raise UsageError(
                    f"{job.label} on {job.task.spec.name} has a record already, and --overwrite never stops "
                    "there. Use only-missing to keep it and go on, or always to replace it."
                )
            return protocol, found

        protocol, found = together(look_up)
        if found is None or self.settings.overwrite == "always":
            return tokenizer, inputs, protocol, None
        _log.info("%s on %s: the record exists and is kept", job.label, job.task.spec.name)
        return tokenizer, inputs, protocol, found

    def _mended(self, job: Job, tokenizer: Tokenizer | None, inputs: Inputs, found: Record) -> bool:
        """Whether images that were broken when a record was made can be read now.

        Only the first process looks. Without the messages of that time nobody can say: the record is kept.
        """
        from comit_bench.pipeline.tokenize import shards_to_do

        if tokenizer is None or found.counts is None or not found.counts.broken or not self.ranks.first:
            return False
        broken = 0
        for split in {role.split.name: role.split for role in inputs.roles.values()}.values():
            rows = self.rows(split)
            store, _ = self.store(job, tokenizer, split, rows)
            if store.missing_shards():
                return False
            if shards_to_do(store, split, rows, split.preprocessing(tokenizer.info.preprocessing)):
                broken = -1
                break
            broken += len(store.broken())
        if broken == found.counts.broken:
            return False
        _log.warning(
            "%s on %s: images that could not be read can be read now; it is measured again",
            *(job.label, job.task.spec.name),
        )
        return True

    def _measure(self, job: Job, inputs: Inputs, tokenizer: Tokenizer | None) -> TaskResult | None:
        from comit_bench.tasks.base import find_executor, find_probe_executor

        executor = find_executor(job.task.spec)
        if tokenizer is None:
            return find_probe_executor(job.task.spec).majority(inputs)
        if not KINDS[job.task.spec.kind].probed:
            return self._look(job, inputs, tokenizer)
        most = job.task.spec.probe.max_epochs
        advance = self.reporter.start(
            f"{job.label}: probing {job.task.spec.name}", len(inputs.seeds) * most, "epochs"
        )
        seen: dict[int, int] = {}

        def progress(state: Any) -> None:
            epochs = most if state.finished else state.log.epoch
            advance(epochs - seen.get(state.seed, 0))
            seen[state.seed] = epochs

        try:
            return executor.run(replace(inputs, progress=progress))
        finally:
            self.reporter.stop()

    def _look(self, job: Job, inputs: Inputs, tokenizer: Tokenizer) -> TaskResult | None:
        from comit_bench.tasks.base import find_looking_executor

        def start(what: str, total: int, unit: str) -> Callable[[int], None]:
            self.reporter.stop()
            return self.reporter.start(f"{job.label}: {what} {job.task.spec.name}", total, unit)

        try:
            with self._threads(job, tokenizer):
                return find_looking_executor(job.task.spec).run(replace(inputs, start=start))
        finally:
            self.reporter.stop()


def _work_name(
    job: Job, tokenizer: Tokenizer | None, protocol: dict[str, Any], device: str, inputs: Inputs
) -> str:
    """A folder for unfinished work: another one for other weights, data, settings, images or devices."""
    from comit_bench.results.schema import plain_json

    weights = tokenizer_row(tokenizer).weights
    rows = {n: hashlib.sha256(role.rows.tobytes()).hexdigest() for n, role in inputs.roles.items()}
    return digest_json([job.label, weights, job.task.spec.name, plain_json(protocol), device, rows])[7:31]


def message_source(store: TokenStore, tokenizer: Tokenizer) -> MessageSource:
    """Messages that stay in their memory-mapped store until they are asked for.

    Probes hold the codes of a split in memory when they fit (``probing/fit.py``) and else read them batch
    by batch; the numbers are the same.
    """
    import torch

    from comit_bench.probing.fit import MessageSource
    from comit_bench.tokenizers.contract import check_looked_up, check_values

    if store.layout.vocab_size is None:
        return MessageSource(
            read=lambda rows: torch.from_numpy(store.codes(rows.numpy())), count=store.layout.count
        )

    def read(rows: Tensor) -> Tensor:
        ids = torch.from_numpy(store.ids(rows.numpy()))
        return check_looked_up(tokenizer, tokenizer.codes_from_ids(ids), ids)

    if store.layout.count:
        check_values(tokenizer, "codes", read(torch.zeros(1, dtype=torch.int64)))
    return MessageSource(read=read, count=store.layout.count)


def _counts(inputs: Inputs, stores: dict[str, TokenStore], limit: int | None) -> Counts:
    from comit_bench.results.schema import Counts
    from comit_bench.tasks.base import ROLES

    broken = _broken(inputs, stores)
    expected, seen = inputs.data.counted(broken)
    return Counts(
        **{name: len(inputs.roles[name]) if name in inputs.roles else 0 for name in ROLES},
        broken=sum(broken.values()),
        expected=expected,
        seen={name: number if limit is None else min(number, limit) for name, number in seen.items()},
    )


def _broken(inputs: Inputs, stores: dict[str, TokenStore]) -> dict[str, int]:
    """Split -> images that cannot be read, for every split that is used; a majority row reads none."""
    names = {role.split.name for role in inputs.roles.values()}
    return {name: len(stores[name].broken()) if name in stores else 0 for name in sorted(names)}


@dataclass(slots=True)
class Outcome:
    """Records that were made or found, what failed, and what a tokenizer cannot do."""

    records: list[Record] = field(default_factory=list)
    failures: list[tuple[Job, BenchError]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def fail(self, job: Job, error: BenchError) -> None:
        """Note a failure; it is told in full at the end."""
        self.failures.append((job, error))
        _log.warning("%s on %s failed; the other jobs go on", job.label, job.task.spec.name)


def _next_with_tokens(jobs: Sequence[Job]) -> Sequence[Job]:
    """The next jobs up to the first that reads messages."""
    count = next((n for n, job in enumerate(jobs, start=1) if job.label != MAJORITY), len(jobs))
    return jobs[:count]


def do_jobs(jobs: Sequence[Job], bench: Bench) -> Outcome:
    """Do all jobs and close the bench; a job that fails does not stop the others.

    What another run is measuring is left for last: it is either done by then, or waited for.
    """
    outcome = Outcome()
    records: dict[int, Record] = {}
    later: list[int] = []

    def do(number: int, *, wait: bool) -> None:
        job = jobs[number]
        bench.reporter.check()
        try:
            record = bench.do(job, () if wait else _next_with_tokens(jobs[number + 1 :]), wait=wait)
            if record is not None:
                records[number] = record
        except Elsewhere:
            later.append(number)
        except UnsupportedOperation as error:
            outcome.refused.append(str(error))
        except BenchError as error:
            outcome.fail(job, error)
        except Exception as error:  # a plugin's, a library's, the device's: the others are not affected
            doing = f"{job.label} on {job.task.spec.name}"
            outcome.fail(job, unexpected(error, doing, bench.settings.output, if_memory=MEMORY_ADVICE))
            bench.free_memory()

    try:
        for number in range(len(jobs)):
            do(number, wait=False)
        for number in later:
            do(number, wait=True)
    finally:
        bench.close()
    outcome.records = [records[number] for number in sorted(records)]
    return outcome
