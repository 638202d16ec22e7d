"""Suites: which tasks and which rows are meant when nothing else is said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from comit_bench.errors import UsageError, did_you_mean
from comit_bench.files import DATA_VARIABLE
from comit_bench.pipeline.jobs import REFERENCES, Settings
from comit_bench.recipes.specs import find_tasks, kinds
from comit_bench.tokenizers.base import Tokenizer

DEFAULT_TOKENIZERS = ("kmeans-patch", "vq-grid-nano", "titok-nano", "comit-nano")
ALL = "all"
SUITES = ("scenes", "drawings", "paper")


def choose_suite(suite: str | None, data_root: Path | None) -> tuple[str, str]:
    """The suite and the reason for it."""
    if suite is not None:
        if suite not in SUITES:
            raise UsageError(f"unknown suite {suite!r}.{did_you_mean(suite, SUITES)}")
        return suite, "as --suite says"
    if data_root is not None:
        return "paper", f"because a data root is given: {data_root}"
    return "scenes", f"embedded data; give --data-root or set {DATA_VARIABLE} for the paper suite"


def suite_tasks(suite: str, settings: Settings, *, every: bool = False) -> list[str]:
    """Tasks of a suite: recognition, pairs, relations, then others by kind and name.

    Args:
        suite: The suite.
        settings: Where to look for recipes.
        every: Also those that are done only when asked for (``by_default: false``).
    """
    recipes = find_tasks(settings.include, allow_override=settings.allow_override)
    chosen = [recipe.spec for recipe in recipes.values() if recipe.spec.suite == suite]
    order = list(kinds())
    ordered = sorted(chosen, key=lambda spec: (order.index(spec.kind), spec.name))
    return [spec.name for spec in ordered if every or spec.by_default]


def choose_tasks(tasks: Sequence[str] | None, suite: str, settings: Settings) -> list[str]:
    """Task names; ``all`` among them stands for every task of the suite, None for its default ones."""
    if tasks is None or not list(tasks):
        found = suite_tasks(suite, settings)
        if not found:
            raise UsageError(f"suite {suite}: its tasks are done when named: --tasks NAME, or --tasks all")
        return found
    chosen: list[str] = []
    for task in tasks:
        chosen += suite_tasks(suite, settings, every=True) if task == ALL else [task]
    return list(dict.fromkeys(chosen))


def with_references(tokenizers: Sequence[str | Tokenizer], suite: str) -> list[str | Tokenizer]:
    """Add the rows that bracket every score: the reference rows and, when embedded, the pixels."""
    references = [*REFERENCES] + (["pixel-oracle"] if suite != "paper" else [])
    named = {t.lower() for t in tokenizers if isinstance(t, str)}
    return [*(name for name in references if name not in named), *tokenizers]
