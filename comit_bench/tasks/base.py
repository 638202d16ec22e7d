"""What a kind of task has to be able to do, and what it gets for it.

A kind is one line in ``comit_bench.recipes.specs.KINDS`` and one subclass of :class:`Task`.
``pipeline/evaluate.py`` opens data and makes tokens; a task turns them into numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comit_bench.errors import UnsupportedOperation, UsageError, did_you_mean
from comit_bench.nn.ranks import Ranks
from comit_bench.probing.fit import FitResult, FitTask, MessageSource, Precision, ProgressCallback
from comit_bench.probing.pool import ProbePool, fit_seeds
from comit_bench.recipes.specs import TaskSpec
from comit_bench.tasks.controls import check_control
from comit_bench.tasks.result import Result
from comit_bench.tokenizers.base import Tokens
from comit_bench.tokenizers.contract import check_looked_up

if TYPE_CHECKING:
    from comit_bench.data.split import OpenData, Split
    from comit_bench.data.tokens.store import TokenStore
    from comit_bench.tokenizers.base import Tokenizer

ROLES = ("train", "early_stop", "report")
Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False, slots=True)
class Role:
    """The images that play one role.

    Attributes:
        split: The split of the data set they are from.
        kept: int64 [N], the images of that split that were tokenized (all, or some with ``--limit``).
        rows: int64 [n], positions in ``kept`` of the images that play the role; none of them is broken.
        messages: N messages in the order of ``kept``; None for a row that sees no image.
        store: Where they lie, with everything a decoder needs.
    """

    split: Split
    kept: Rows
    rows: Rows
    messages: MessageSource | None = None
    store: TokenStore | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def images(self) -> Rows:
        """int64 [n], positions in the split."""
        return self.kept[self.rows]

    @property
    def ids(self) -> list[str]:
        """Ids of the images, [n]."""
        return [self.split.ids[image] for image in self.images]

    def all_ids(self) -> list[str]:
        """Ids of all tokenized images of the split, [N]."""
        return [self.split.ids[image] for image in self.kept]

    def source(self) -> MessageSource:
        """The messages of a row that does see images."""
        assert self.messages is not None
        return self.messages

    def row_tensor(self) -> Tensor:
        """``rows`` for indexing messages."""
        return torch.from_numpy(np.ascontiguousarray(self.rows))

    def tokens(self, tokenizer: Tokenizer, positions: Rows) -> Tokens:
        """Messages with everything a decoder needs.

        Args:
            tokenizer: Looks up codes.
            positions: int64 [b], positions in ``rows``.
        """
        assert self.store is not None
        rows = self.rows[positions]
        offsets = self.store.offsets(rows)
        if self.store.layout.vocab_size is None:
            ids, codes = None, torch.from_numpy(self.store.codes(rows))
        else:
            ids = torch.from_numpy(self.store.ids(rows)).long()
            codes = check_looked_up(tokenizer, tokenizer.codes_from_ids(ids), ids)
        return Tokens(ids, codes, None if offsets is None else torch.from_numpy(offsets))


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Inputs:
    """Everything one tokenizer's run of one task needs.

    Attributes:
        spec: The recipe.
        data: The opened data set.
        roles: One entry per name in ``ROLES``.
        seeds: Probe seeds.
        control: Name of the control, or None.
        cache: Cache directory, for what is computed once per data set (text features, negatives).
        offline: Never ask a hub.
        device: Where probes are fitted.
        pool: Worker processes, or None.
        workers: Without a pool, the number of processes; None is one per usable core.
        progress: Called after every epoch of every seed.
        learning_rates: Tried one after the other; empty is the recipe's alone.
        tokenizer: Who is measured; None for a row that sees no image.
        batch_size: Images per call of the tokenizer; no number depends on it.
        num_workers: Image-reading processes.
        ranks: This process among its siblings.
        work: Where kinds that fit no probe keep what is finished (``tasks/shards.py``); removed once the
            record is written.
        start: Begins a progress bar: what, how many, of what; returns what to call with the number done.
        whole_roles: The roles with the images that turned out to be broken; None when none is.
    """

    spec: TaskSpec
    data: OpenData
    roles: Mapping[str, Role]
    seeds: Sequence[int]
    control: str | None = None
    cache: Path
    offline: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    pool: ProbePool | None = None
    workers: int | None = None
    progress: ProgressCallback | None = None
    learning_rates: Sequence[float] = ()
    tokenizer: Tokenizer | None = None
    batch_size: int = 64
    num_workers: int = 0
    ranks: Ranks = field(default_factory=Ranks)
    work: Path | None = None
    start: Callable[[str, int, str], Callable[[int], None]] = lambda what, total, unit: lambda done: None
    whole_roles: Mapping[str, Role] | None = None

    def the_tokenizer(self) -> Tokenizer:
        """The tokenizer of a row that sees images."""
        assert self.tokenizer is not None
        return self.tokenizer

    def with_roles(self, roles: Mapping[str, Role]) -> Inputs:
        """The same with other images."""
        return replace(self, roles=roles)

    @property
    def probing(self) -> dict[str, Any]:
        """Fields of a ``FitTask`` that recipe, control and tokenizer decide.

        Raises:
            UsageError: A control that does not exist.
            UnsupportedOperation: ``bag-of-tokens`` and a stem, which reads places.
        """
        check_control(self.control)
        stem = self.tokenizer is not None and bool(self.tokenizer.info.stem)
        if stem and self.control == "bag-of-tokens":
            raise UnsupportedOperation(
                f"{self.the_tokenizer().info.name} is left out of {self.spec.name} under bag-of-tokens: its "
                "convolutions read where a patch stands. shuffle-tokens moves the patches instead."
            )
        return {
            "spec": self.spec.probe,
            "permute_targets": self.control == "permute-labels",
            "positions": self.control != "bag-of-tokens",
            "stem": stem,
            "precision": "bfloat16" if self.device.type == "cuda" else "float32",
        }

    def fit(self, task: FitTask) -> Fitted:
        """One probe per seed, see :func:`~comit_bench.probing.pool.fit_seeds`.

        With several learning rates every seed is fitted with each; the one whose probes do best on the
        early-stop images is taken for all seeds.
        """
        task = task.prepared()
        tries: dict[float, list[FitResult]] = {}
        for rate in self.learning_rates or (task.spec.learning_rate,):
            tries[rate] = fit_seeds(
                replace(task, spec=task.spec.model_copy(update={"learning_rate": rate})),
                self.seeds,
                device=self.device,
                pool=self.pool,
                workers=self.workers,
                progress=self.progress,
            )
        scores = {
            rate: sum(one.best.stop_score for one in results) / len(results)
            for rate, results in tries.items()
        }
        best = tries[max(scores, key=scores.__getitem__)]
        return Fitted(best, scores, task.spec.max_epochs, task.precision)

    def check(self) -> None:
        """Refuse empty roles before anything is computed."""
        names = {"train": "training", "early_stop": "early-stop", "report": "report"}
        for name, role in self.roles.items():
            if len(role) == 0:
                raise UsageError(
                    f"the {names[name]} set of {self.spec.name} is empty. Use more images (larger --limit), "
                    "or change split.early_stop.fraction in the recipe."
                )


class Task:
    """One kind of task: what it needs, whom it refuses, what it measures. Only ``run`` must be written.

    Its name, the kind of data it takes and its first metric stand in ``comit_bench.recipes.specs.KINDS``.
    """

    def prepare(self, spec: TaskSpec, *, cache: Path, offline: bool) -> None:
        """Look for what the task needs besides data and tokenizer, before any work.

        Raises:
            MissingError: Something is not there; says how to get it.
        """

    def refuses(self, spec: TaskSpec, tokenizer: Tokenizer) -> str | None:
        """Why this tokenizer cannot be measured, as far as can be said beforehand; None when it can."""
        return None

    def examine(self, inputs: Inputs) -> None:
        """Look at the data before tokens are made.

        Raises:
            BenchError: They cannot be measured; says what is wrong with which files.
        """

    def protocol(self, inputs: Inputs) -> dict[str, Any]:
        """What can change the numbers besides recipe, data and tokenizer (stored in the record)."""
        return {}

    def run(self, inputs: Inputs) -> Result | None:
        """Measure. Kinds that fit probes run in the first process, others in all; there the others give None.

        Raises:
            UnsupportedOperation: The tokenizer cannot do what is measured (it has no decoder, ...).
        """
        raise NotImplementedError

    def majority(self, inputs: Inputs) -> Result:
        """For kinds that fit probes: the row of a reader that knows the training labels and no image."""
        raise UnsupportedOperation(f"kind {inputs.spec.kind!r} does not say what a guesser scores")

    def blind(self, inputs: Inputs) -> Result:
        """For kinds that are ``blind``: the row of the same probe, beside messages that say nothing."""
        raise UnsupportedOperation(f"kind {inputs.spec.kind!r} has nothing to ask a reader without images")

    def decodings(self, spec: TaskSpec) -> float:
        """For plans: how often each image is decoded, about."""
        return 0.0


def find_task(spec: TaskSpec) -> Task:
    """The task of a recipe's kind."""
    module, _, name = spec.task_kind.task.partition(":")
    task: Task = getattr(import_module(module), name)()
    return task


def check_main_metric(spec: TaskSpec, metrics: Mapping[str, object]) -> None:
    """Refuse a main metric that does not exist."""
    if spec.main_metric not in metrics:
        raise UsageError(
            f"recipe {spec.name!r}: main_metric {spec.main_metric!r} is not measured by this task."
            f"{did_you_mean(spec.main_metric, metrics)}"
        )


@dataclass(frozen=True, slots=True)
class Fitted:
    """Fitted probes, one per seed.

    Attributes:
        results: In the order of the seeds.
        tries: Learning rate -> early-stop score in 0..1, mean over the seeds.
        max_epochs: Most epochs allowed.
        precision: Of the products.
    """

    results: Sequence[FitResult]
    tries: Mapping[float, float]
    max_epochs: int
    precision: Precision = "float32"

    def outputs(self) -> list[Tensor]:
        """Outputs on the report images, one per seed."""
        return [result.outputs for result in self.results if result.outputs is not None]

    def unconverged(self) -> tuple[int, ...]:
        """Seeds whose best epoch was the last one allowed."""
        return tuple(one.seed for one in self.results if one.best_epoch == self.max_epochs)

    def details(self, score: str) -> dict[str, Any]:
        """How the fits went, one entry per seed; scores (in percent) are those of the best epoch.

        ``fits`` has the early-stop scores of every epoch. The train score is a running mean over the epoch,
        so it lags behind the weights.

        Args:
            score: Name of the score the fits stopped by.
        """
        found: dict[str, Any] = {
            "seeds": [one.seed for one in self.results],
            "best_epoch": [one.best_epoch for one in self.results],
            "epochs_run": [len(one.history) for one in self.results],
            "seconds": [one.seconds for one in self.results],
            f"train_{score}": [100.0 * one.best.train_score for one in self.results],
            f"early_stop_{score}": [100.0 * one.best.stop_score for one in self.results],
            "fits": {
                "score": score,
                "early_stop": [
                    [round(100.0 * log.stop_score, 2) for log in one.history] for one in self.results
                ],
            },
        }
        if self.precision != "float32":
            found["probe_precision"] = self.precision
        if len(self.tries) > 1:
            found["learning_rate"] = self.results[0].learning_rate
            found["learning_rates"] = {f"{rate:g}": 100.0 * mean for rate, mean in self.tries.items()}
        return found
