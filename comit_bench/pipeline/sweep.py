"""Reconstruction for a list of settings: solver steps, guidance, cropping policies, tokenizers.

Every point is an ordinary record: its settings stand on the tokenizer's side of the protocol, so tables
give it a row of its own and a killed sweep goes on where it was. Messages do not depend on the decoder's
settings and are made once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from comit_bench.errors import UnsupportedOperation, UsageError, shown
from comit_bench.nn.ranks import launched
from comit_bench.pipeline.evaluate import evaluate
from comit_bench.pipeline.jobs import OptionValue
from comit_bench.pipeline.session import Reporter
from comit_bench.pipeline.suite import choose_suite
from comit_bench.recipes.specs import find_tasks, pick
from comit_bench.results.schema import Record
from comit_bench.tokenizers.base import Tokenizer

TASKS = {
    "scenes": "reconstruction-scenes",
    "drawings": "reconstruction-drawings",
    "paper": "reconstruction-imagenet1k",
}
AXES = ("steps", "guidance")
_log = logging.getLogger(__name__)


def sweep_points(
    steps: Sequence[int], guidance: Sequence[float], options: Mapping[str, OptionValue]
) -> Iterator[dict[str, OptionValue]]:
    """Options of the decoder, one mapping per point: each list is one sweep, the other setting stays."""
    for axis, values in (("steps", steps), ("guidance", guidance)):
        for value in values:
            least, most = (1, 100_000) if axis == "steps" else (0, 1e9)
            if not least <= value <= most:  # NaN compares with nothing
                what = "whole numbers" if axis == "steps" else "numbers"
                raise UsageError(
                    f"--{axis}: {shown(value)} is no value for it, expected {what} from {least} to {most:g}"
                )
    if not steps and not guidance:
        yield dict(options)
    for step in dict.fromkeys(steps):
        yield {**options, "steps": step}
    for weight in dict.fromkeys(guidance):
        yield {**options, "guidance": weight}


def sweep(
    tokenizers: Sequence[str | Tokenizer],
    *,
    task: str | None = None,
    steps: Sequence[int] = (),
    guidance: Sequence[float] = (),
    reporter: Reporter | None = None,
    **settings: Any,
) -> list[Record]:
    """Measure reconstruction at every point of one or several sweeps; what ``comit-bench sweep`` calls.

    Args:
        tokenizers: Names, directories or hub ids; loaded anew for every point. Objects are taken as they
            are, with their own decoder settings.
        task: A task of kind ``reconstruction``; None is that of the suite.
        steps: Solver steps, at the guidance of ``options`` or the tokenizer's own.
        guidance: Guidance weights, at the steps of ``options`` or the tokenizer's own.
        reporter: Progress hooks.
        **settings: See :class:`comit_bench.pipeline.jobs.Settings`; ``policy`` may be a list, all of which
            are measured at every point.

    Returns:
        One record per point, tokenizer and policy; each is on disk already. A point that two sweeps share
        is measured once and returned once. A tokenizer without a decoder is left out with a warning.

    Raises:
        UsageError, MissingError: Wrong names or settings, absent data or weights.
        UnsupportedOperation: A tokenizer's protocol does not tell the points apart.
        BenchError: A point failed; those before it are kept.
    """
    suite, _ = choose_suite(None, settings.get("data_root"))
    name = task or TASKS[suite]
    recipe = pick(name, find_tasks(tuple(settings.get("include", ()))), "task")
    if recipe.spec.kind != "reconstruction":
        raise UsageError(
            f"task {name} is of kind {recipe.spec.kind!r}: a sweep needs one of 'reconstruction'"
        )
    given: Mapping[str, OptionValue] = settings.pop("options", {})
    points = list(sweep_points(steps, guidance, given))
    if (steps or guidance) and not all(isinstance(tokenizer, str) for tokenizer in tokenizers):
        raise UsageError("steps and guidance need tokenizers by name: objects have their settings already")
    found: dict[tuple[str, str, str], Record] = {}
    for number, options in enumerate(points, 1):
        _log.info("point %d of %d: %s", number, len(points), options or "as the tokenizers come")
        for tokenizer in tokenizers:
            records = evaluate(
                tokenizer, [name], references=False, reporter=reporter, options=options, **settings
            )
            if not records and launched().rank == 0:
                _log.warning("%s is left out: it has no decoder", tokenizer)
            for record in records:
                check_point(record, options)
                row = record.tokenizer
                found.setdefault((row.name, row.weights, record.protocol_digest), record)
    return list(found.values())


def check_point(record: Record, options: Mapping[str, OptionValue]) -> None:
    """Refuse a record that does not say where in the sweep it stands: it might be another point's."""
    for axis in AXES:
        if axis in options and record.decoder_setting(axis) != float(options[axis]):
            raise UnsupportedOperation(
                f"{record.tokenizer.name} takes {axis}={options[axis]} but does not tell it in its protocol, "
                "so its points cannot be told apart (see decode_options of the COMiT adapter)"
            )
