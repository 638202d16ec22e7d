"""What jobs share and what they need one after the other: data, tokenizers, tokens.

Everything finished is on disk before the next thing starts: token shards as they fill.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comit_bench.errors import BenchError, UnsupportedOperation
from comit_bench.files import require_folder
from comit_bench.nn.ranks import Ranks, launched
from comit_bench.pipeline.jobs import Job, Settings, options_for
from comit_bench.recipes.specs import KINDS, DatasetSpec, Recipe
from comit_bench.tokenizers.registry import MAJORITY

if TYPE_CHECKING:
    import torch

    from comit_bench.data.split import OpenData
    from comit_bench.data.split import Split as DataSplit
    from comit_bench.data.tokens.store import TokenStore
    from comit_bench.probing.pool import ProbePool
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


class Resources:
    """Data, tokenizers and tokens, each opened, loaded or made once however many jobs need it."""

    def __init__(self, settings: Settings, *, reporter: Reporter | None = None) -> None:
        self.settings = settings
        self.reporter = reporter or Reporter()
        self.ranks = Ranks.join()
        self._data: dict[str, OpenData] = {}
        self._tokenizers: dict[str, Tokenizer] = {}
        self._anew: set[str] = set()  # stores that this run makes anew
        self.encoded = 0  # images of the jobs so far; those made beside a job do not count
        self.profile: dict[str, float] = {}  # seconds by stage of tokenization, over all jobs

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

    # ------------------------------------------------------------- resources

    def data(self, recipe: Recipe[DatasetSpec], *, quiet: bool = False) -> OpenData:
        """Open (or first make) a data set once, with or without a progress bar."""
        if recipe.spec.name not in self._data:
            from comit_bench.data.datasets import open_dataset

            with self.ranks.in_turn():
                self._data[recipe.spec.name] = open_dataset(
                    recipe,
                    data_root=self.settings.data_root,
                    cache=self.settings.cache_dir,
                    progress=self.settings.progress and self.ranks.first and not quiet,
                )
        return self._data[recipe.spec.name]

    def look(self, recipe: Recipe[DatasetSpec]) -> OpenData:
        """A data set as :meth:`data` opens it, but its files are only listed: enough for counts."""
        if recipe.spec.name in self._data:
            return self._data[recipe.spec.name]
        from comit_bench.data.datasets import open_dataset

        with self.ranks.in_turn():
            return open_dataset(
                recipe,
                data_root=self.settings.data_root,
                cache=self.settings.cache_dir,
                progress=self.settings.progress and self.ranks.first,
                contents=False,
            )

    @cached_property
    def device(self) -> torch.device:
        from comit_bench.tokenizers.load import resolve_device

        device = resolve_device(self.settings.device)
        if str(device) == "cuda" and self.ranks.world > 1:
            return resolve_device(f"cuda:{launched().local_rank}")
        return device

    @cached_property
    def pool(self) -> ProbePool:
        """Probe workers, started when the first probe is fitted."""
        from comit_bench.probing.pool import ProbePool

        return ProbePool()

    def free_memory(self) -> None:
        """Give back what an unfinished job holds on the device, for the next one."""
        if "device" in self.__dict__ and self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()

    def close(self) -> None:
        """End worker processes."""
        if "pool" in self.__dict__:
            self.pool.close()

    def tokenizer(self, job: Job, *, quiet: bool = False) -> Tokenizer:
        """Load a tokenizer, or fit it on the task's train split; once per job group.

        Args:
            job: Whose.
            quiet: No progress bar.
        """
        if not isinstance(job.tokenizer, str):
            return job.tokenizer
        from comit_bench.tokenizers.load import entry_for, load_tokenizer

        entry, options, fitted = entry_for(job.tokenizer), self._options(job), self._fitted(job)
        key = f"{job.tokenizer}|{options}|{job.dataset.spec.name if fitted else ''}"
        if key not in self._tokenizers:
            if fitted:
                self._tokenizers[key] = self._fit(job, options, quiet=quiet)
            else:
                self._tokenizers[key] = load_tokenizer(
                    job.tokenizer,
                    weights=self.settings.weights if entry.takes("weights") else None,
                    device=str(self.device) if self.ranks.world > 1 else self.settings.device,
                    dtype=self.settings.dtype if entry.takes_weights else "float32",
                    offline=self.settings.offline,
                    **options,
                )
        return self._tokenizers[key]

    def _options(self, job: Job) -> dict[str, Any]:
        """The options of a job's tokenizer, which is given by name."""
        from comit_bench.tokenizers.load import entry_for

        entry = entry_for(str(job.tokenizer))
        options: dict[str, Any] = dict(entry.paper_options) if job.task.spec.suite == "paper" else {}
        return options | entry.typed(options_for(entry, self.settings.options))

    def peek(self, job: Job) -> Tokenizer | None:
        """The tokenizer as far as it exists before data are opened: None for one that is fitted."""
        if not self._fitted(job):
            return self.tokenizer(job)
        from comit_bench.tokenizers.kmeans import check_settings

        check_settings(**self._options(job))
        return None

    def why_not(self, job: Job, tokenizer: Tokenizer | None) -> str | None:
        """Why a tokenizer is left out of a task; None when it can be measured.

        Args:
            job: Which tokenizer on which task.
            tokenizer: The tokenizer, when it is loaded already.
        """
        from comit_bench.tasks.base import find_looking_executor

        spec, splits = job.task.spec, job.dataset.spec.splits
        if self._fitted(job) and spec.split.train not in splits:
            return (
                f"it is fitted on training images, and {job.dataset.spec.name} has no split "
                f"{spec.split.train!r} (it has {', '.join(splits)})"
            )
        if tokenizer is not None and not KINDS[spec.kind].probed:
            return find_looking_executor(spec).refuses(spec, tokenizer)
        return None

    def refuse(self, job: Job, tokenizer: Tokenizer | None) -> None:
        """Say what a tokenizer cannot do before anything is tokenized.

        Raises:
            UnsupportedOperation: As :meth:`why_not` says.
        """
        reason = self.why_not(job, tokenizer)
        if reason is not None:
            raise UnsupportedOperation(f"{job.label} is left out of {job.task.spec.name}: {reason}")

    @staticmethod
    def _fitted(job: Job) -> bool:
        """Whether the tokenizer is fitted on the task's data."""
        from comit_bench.tokenizers.load import entry_for

        if not isinstance(job.tokenizer, str) or job.tokenizer == MAJORITY:
            return False
        return entry_for(job.tokenizer).fitted and not Path(job.tokenizer).is_dir()

    def _fit(self, job: Job, options: Mapping[str, Any], *, quiet: bool) -> Tokenizer:
        from comit_bench.data.images import iterate_images
        from comit_bench.tokenizers.kmeans import KMeansPatchTokenizer

        self.refuse(job, None)
        data, name = self.data(job.dataset), job.task.spec.split.train
        split = data.splits[name]
        rows = self.rows(split)
        resolution = options.get("resolution", 32)
        preprocessing = split.preprocessing(f"center_crop|resize({resolution},bilinear)")

        def images() -> Any:
            reporter = Reporter() if quiet else self.reporter
            advance = reporter.start(f"fitting {job.label} on {data.name}", len(rows), "images")
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
            reporter.stop()

        key = {
            "data": data.split_fingerprint(name),
            "selection": self.selection,
            "preprocessing": preprocessing,
        }
        with self.ranks.in_turn():
            return KMeansPatchTokenizer.fit_cached(
                images, key, self.settings.cache_dir / "fits", training_data=f"{data.name} {name}", **options
            )

    # ---------------------------------------------------------------- tokens

    @property
    def selection(self) -> str:
        """Which images of a split are used, for keys."""
        return "all" if self.settings.limit is None else f"limit-by-name:{self.settings.limit}"

    def rows(self, split: DataSplit) -> list[int]:
        """The images used: all, or the ``limit`` first in the order of a hash of their names.

        The name is the id without folders: variants of one scene, in folders of their own, stay together.
        """
        if self.settings.limit is None or self.settings.limit >= len(split):
            return list(range(len(split)))
        from comit_bench.seeding import seed_for

        order = sorted(
            range(len(split)), key=lambda index: seed_for(0, "limit/" + split.ids[index].rpartition("/")[2])
        )
        return sorted(order[: self.settings.limit])

    def policy(self, job: Job, tokenizer: Tokenizer) -> str | None:
        """The cropping policy a tokenizer runs under, in canonical form; None if it has none."""
        from comit_bench.tokenizers.base import looks_at_crops

        if not looks_at_crops(tokenizer):
            if job.policy is not None:
                _log.info("%s looks at whole images: --policy is ignored for it", tokenizer.info.name)
            return None
        return str(tokenizer.policy(job.policy))

    def settle_policies(self, jobs: Sequence[Job]) -> list[Job]:
        """One job instead of one per policy for plugins that turn out, once loaded, to see whole images."""
        from comit_bench.tokenizers.base import looks_at_crops
        from comit_bench.tokenizers.load import entry_for

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

    def tokens(self, job: Job, tokenizer: Tokenizer, split_name: str, *, quiet: bool = False) -> TokenStore:
        """The complete token store of one split; all processes make their part of what is missing.

        With ``overwrite="always"`` nothing of an earlier run is used: a store is made anew, once per run.

        Args:
            job: Whose data and policy.
            tokenizer: What encodes.
            split_name: The split.
            quiet: Neither a progress bar nor a word about broken images.
        """
        from comit_bench.pipeline.tokenize import shards_to_do, tokenize_split

        data = self.data(job.dataset)
        split, rows = data.splits[split_name], self.rows(data.splits[split_name])

        def begin() -> tuple[TokenStore, dict[str, Any]]:
            store, key = self.store(job, tokenizer, split, rows)
            if self.settings.overwrite == "always" and store.digest not in self._anew:
                self._anew.add(store.digest)
                store.renew()
            return store, key

        store, key = self.ranks.together(begin)
        recipe = split.preprocessing(tokenizer.info.preprocessing)
        missing = self.ranks.share(shards_to_do(store, split, rows, recipe) if self.ranks.first else [])
        mine = missing[self.ranks.rank :: self.ranks.world]
        total = sum(len(store.shard_range(shard)) for shard in mine)
        reporter = Reporter() if quiet else self.reporter
        advance = reporter.start(f"{job.label}: {data.name}/{split_name}", total, "images")

        def work() -> None:
            with self._threads(job, tokenizer):
                tokenize_split(
                    tokenizer,
                    split,
                    store,
                    key=key,
                    rows=rows,
                    shards=mine,
                    batch_size=self.settings.batch_size,
                    num_workers=self.settings.num_workers,
                    advance=advance,
                    profile=None if quiet else self.profile,
                )

        try:
            self.ranks.together(work)
        finally:
            reporter.stop()
        if not quiet:
            self.encoded += total
            self._check_broken(job, store, split_name)
        return store

    def store(
        self, job: Job, tokenizer: Tokenizer, split: DataSplit, rows: Sequence[int]
    ) -> tuple[TokenStore, dict[str, Any]]:
        """The token store of some images of a split, as far as it is there, and its key."""
        from comit_bench.pipeline.tokenize import list_digest, open_store, store_key

        key = store_key(
            tokenizer,
            policy=self.policy(job, tokenizer),
            fingerprint=list_digest(split),
            seed=ENCODE_SEED,
            selection=self.selection,
            exif=split.exif,
        )
        store = open_store(
            tokenizer,
            self.settings.cache_dir,
            key,
            count=len(rows),
            data=f"{job.dataset.spec.name}/{split.name}",
            split=split,
            rows=rows,
        )
        return store, key

    def _threads(self, job: Job, tokenizer: Tokenizer) -> AbstractContextManager[None]:
        """One thread for small networks on the CPU.

        Their products are too small to share: the threads wait for each other, for milliseconds a
        product as soon as anything else runs on the machine. Tokens are the same bits either way.
        """
        from comit_bench.probing.fit import one_thread

        estimate = getattr(tokenizer, "encode_flops", None)
        small = estimate is None or estimate(job.policy) < SMALL_FLOPS
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
