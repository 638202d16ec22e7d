"""What ``comit-bench paper`` would do: what is missing and how to get it, what it costs, as text.

Nothing is loaded, opened or downloaded for it: files are looked for, and costs are those of
``results/reference/cost.md`` and of the recipes. So the plan is the same with and without data and weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from comit_bench.commands.paper_parts import DATA, PaperPart, PaperStep
from comit_bench.errors import MissingError
from comit_bench.pipeline.jobs import Settings
from comit_bench.pipeline.plan import human_bytes, human_seconds
from comit_bench.recipes.specs import (
    DatasetSpec,
    Recipe,
    TaskSpec,
    find_datasets,
    find_tasks,
    recipe_root,
)
from comit_bench.tokenizers.family import Hub, Release
from comit_bench.tokenizers.registry import tokenizers

GPU_RATE = 1e14  # FLOP per second, a round number for one current GPU
DEFAULT_STEPS = 10  # of COMiT's decoder, whose cost is listed
# Images of sets whose recipe does not say; upper bounds where the recipe keeps only some of them.
IMAGES = {
    "imagenet100": {"train": 126_689, "val": 5_000},
    "mscoco-pairs": {"train": 98_630, "val": 24_657},
    "visual-genome": {"train": 86_462, "val": 21_615},
}


@dataclass(frozen=True, slots=True)
class Need:
    """Something that is not here.

    Attributes:
        name: In a word or two.
        what: What exactly is missing, and where it was looked for; may be empty.
        how: How to get it.
        required: False where only some checkpoints need it.
    """

    name: str
    what: str
    how: str
    required: bool = True


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What of a step can be done now.

    Attributes:
        step: The step.
        now: The same with the tokenizers and tasks that are here; None when nothing is left of it.
        needs: What keeps the rest from being done.
    """

    step: PaperStep
    now: PaperStep | None
    needs: tuple[Need, ...]

    @property
    def required(self) -> list[Need]:
        """Those without which the rest cannot be done."""
        return [need for need in self.needs if need.required]

    @property
    def waits_for(self) -> str:
        """The same in words; may be empty."""
        return ", ".join(dict.fromkeys(need.name for need in self.required))


@dataclass(frozen=True, slots=True)
class JobCost:
    """What jobs cost: images that are read, FLOPs of encoding and decoding, and bytes of the token cache."""

    images: int = 0
    flops: float = 0.0
    bytes: int = 0

    def __add__(self, other: JobCost) -> JobCost:
        return JobCost(self.images + other.images, self.flops + other.flops, self.bytes + other.bytes)


@cache
def _tasks() -> dict[str, Recipe[TaskSpec]]:
    return find_tasks()


@cache
def _datasets() -> dict[str, Recipe[DatasetSpec]]:
    return find_datasets()


# ------------------------------------------------------------------------------------------ missing


def tokenizer_needs(name: str, options: Iterable[str] = ()) -> list[Need]:
    """What a tokenizer's weights lack.

    Args:
        name: A name of the registry, a hub id, or a directory.
        options: ``FAMILY.KEY=VALUE`` of the command.
    """
    from comit_bench.tokenizers.presence import command, weights_state

    entry = tokenizers().get(name.lower())
    if entry is None:
        if Path(name).is_dir() or name.count("/") == 1:
            return []
        train = f"comit-bench train --config {Path(name).name} data.source={DATA}/imagenet/train"
        return [Need(f"checkpoint {name}", "not released, to be trained", train)]
    needs, preset = [], entry.preset
    if weights_state(preset) not in ("yes", "-"):
        where = "" if isinstance(preset.source, Release) else str(preset.source)
        needs.append(Need(f"weights {name}", where, command(preset)))
    renders = f"{entry.family.name}.decoder=renderer" in options
    for part in entry.family.parts if isinstance(preset.source, Hub | Release) else ():
        if isinstance(part.source, Release) and not (renders and part.name == f"{name}-renderer"):
            continue
        if weights_state(part) != "yes":
            required = part.always or isinstance(part.source, Release)
            needs.append(Need(f"weights {part.name}", part.note or str(part.source), command(part), required))
    return needs


def data_needs(spec: DatasetSpec, data_root: Path | None) -> list[Need]:
    """What of a data set is not below the data root."""
    from comit_bench.data.pieces import missing_pieces

    return [Need(f"data {spec.name}", piece.what, piece.command) for piece in missing_pieces(spec, data_root)]


def task_needs(name: str, settings: Settings) -> list[Need]:
    """What a task needs besides tokenizers: data, judges, text encoders. Asks no hub."""
    from comit_bench.tasks.base import find_task

    spec, data = _tasks()[name].spec, _datasets()
    needs = data_needs(data[spec.dataset].spec, settings.data_root)
    try:
        find_task(spec).prepare(spec, cache=settings.cache_dir, offline=True)
    except MissingError as error:
        how = str(error).replace("--offline forbids a download", "were not fetched")
        needs.append(Need(f"{'text encoder' if spec.kind == 'relations' else 'judge'} of {name}", "", how))
    return needs


def image_needs(images: str, data_root: Path | None) -> list[Need]:
    """What keeps a figure from its images."""
    if images.startswith(f"{DATA}/"):
        folder = None if data_root is None else data_root / images.removeprefix(f"{DATA}/")
        if folder is not None and folder.is_dir():
            return []
        how = "put any photographs there; the paper took some of unsplash.com"
        return [Need("photographs", f"{folder or images}/", how)]
    known = _datasets()
    return data_needs(known[images].spec, data_root) if images in known else []


def plan_parts(parts: Sequence[PaperPart], settings: Settings) -> list[tuple[PaperPart, list[StepPlan]]]:
    """What of every part can be done now, and what it lacks."""
    tasks = {name for part in parts for step in part.steps for name in step.tasks}
    lacking = {name: task_needs(name, settings) for name in sorted(tasks)}
    return [(part, [_plan_step(step, settings, lacking) for step in part.steps]) for part in parts]


def _plan_step(step: PaperStep, settings: Settings, lacking: Mapping[str, Sequence[Need]]) -> StepPlan:
    names = {name: tokenizer_needs(name, step.options) for name in step.tokenizers}
    tasks = {name: lacking[name] for name in step.tasks}
    images = image_needs(step.images, settings.data_root)
    ready = [tuple(name for name, needs in found.items() if not any(need.required for need in needs))
             for found in (names, tasks)]  # fmt: skip
    wanting = (names and not ready[0]) or (tasks and not ready[1]) or images
    now = None if wanting else replace(step, tokenizers=ready[0], tasks=ready[1])
    needs = [need for found in (*names.values(), *tasks.values(), images) for need in found]
    return StepPlan(step, now, tuple(dict.fromkeys(needs)))


# --------------------------------------------------------------------------------------------- cost


@cache
def preset_costs() -> dict[str, tuple[float, float]]:
    """FLOPs of encoding and decoding one image, by preset, from ``results/reference/cost.md``."""
    text = (recipe_root("results") / "reference" / "cost.md").read_text(encoding="utf-8")
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 8 and re.fullmatch(r"[\d.,]+", cells[4]):
            encode, decode = (1e9 * float(cell.replace(",", "")) for cell in cells[4:6])
            found[cells[0]] = (encode, decode)
    return found


@cache
def _crop_factor(name: str, policy: str) -> float:
    """How much more than the global crop alone a policy costs, counted.

    What an adaptive policy chooses is not known without data: its crops cost what random ones do, and each
    of them but the first takes one step of decoding.
    """
    from comit_bench.commands.cost import encode_gflop, step_gflop
    from comit_bench.tokenizers.load import load_tokenizer

    tokenizer = load_tokenizer(name, weights="random", device="meta", offline=True)
    crops = encode_gflop(tokenizer, policy.replace("adaptive", "random"))
    if "adaptive" in policy:
        crops += (int(policy.rpartition(":")[2]) - 1) * step_gflop(tokenizer)
    return crops / encode_gflop(tokenizer, "global")


def _preset(name: str) -> str:
    """The preset that a tokenizer costs as much as: itself, or that of an ablation."""
    known = preset_costs()
    bare = Path(name).name.lower()
    return next(
        (n for n in sorted(known, key=len, reverse=True) if bare == n or bare.startswith(f"{n}-")), bare
    )


def image_counts(spec: DatasetSpec) -> dict[str, int]:
    """Images by split, at most; nothing is opened."""
    if spec.generator is not None:
        return {"train": spec.generator.train, "val": spec.generator.val}
    return {**IMAGES.get(spec.name, {}), **spec.expected}


def job_cost(
    task: TaskSpec, name: str, policy: str | None, settings: Settings, *, options: Sequence[str] = ()
) -> JobCost | None:
    """Cost of one tokenizer on one task; None when the tokenizer's is not known."""
    from comit_bench.tasks.base import find_task

    preset = _preset(name)
    entry = tokenizers().get(preset)
    own = [o.partition(".")[2] for o in options if entry and o.startswith(entry.family.name)]
    found = preset_costs().get(" ".join([preset, *own[:1]])) or preset_costs().get(preset)
    counts = image_counts(_datasets()[task.dataset].spec)
    if settings.limit is not None:
        counts = {split: min(count, settings.limit) for split, count in counts.items()}
    if found is None or entry is None:
        return None
    encode, decode = found
    if policy is not None and entry.looks_at_crops():
        encode *= _crop_factor(preset, policy)
    length = entry.preset.message_length or 256
    if not task.task_kind.probed:
        count = getattr(getattr(task, task.kind), "count", None)
        images = min(counts.get(task.split.report, 0), count or counts.get(task.split.report, 0))
        times = find_task(task).decodings(task) * task.seeds  # at most: without noise, once for all seeds
        return JobCost(images, images * (encode + times * decode), 2 * images * length)
    images = sum(counts.values())
    return JobCost(images, images * encode, 2 * images * length)


def step_jobs(step: PaperStep) -> list[tuple[str, str, str | None, float]]:
    """Task, tokenizer, policy and, for sweeps, the solver steps in units of the default, of every job."""
    known, jobs = tokenizers(), []
    for task in step.tasks:
        for name in step.tokenizers:
            crops = (entry := known.get(_preset(name))) is not None and entry.looks_at_crops()
            for policy in (step.policies or (None,)) if crops else (None,):
                for share in _points(step):
                    jobs.append((task, name, policy, share))
    return jobs


def _points(step: PaperStep) -> list[float]:
    """Solver steps of a sweep's points in units of the default; one where nothing is swept."""
    if "--steps" in step.more:
        values = step.more[step.more.index("--steps") + 1].split(",")
        return [float(value) / DEFAULT_STEPS for value in values]
    if "--guidance" in step.more:
        return [1.0] * len(step.more[step.more.index("--guidance") + 1].split(","))
    return [1.0]


def total_cost(steps: Iterable[PaperStep], settings: Settings) -> tuple[JobCost, list[str]]:
    """Cost of all different jobs together, and the tokenizers whose cost is not known."""
    known, total, unknown, seen = _tasks(), JobCost(), [], set()
    for step in steps:
        for job in step_jobs(step):
            task, name, policy, share = job
            key = (task, name, policy or "global", share, step.command if share != 1.0 else "")
            if key in seen:
                continue
            seen.add(key)
            cost = job_cost(known[task].spec, name, policy, settings, options=step.options)
            if cost is None:
                unknown.append(name)
                continue
            total += replace(cost, flops=cost.flops * share)
    return total, list(dict.fromkeys(unknown))


def _cost_text(cost: JobCost) -> str:
    gpu = human_seconds(cost.flops / GPU_RATE)
    return f"{cost.images:,} images, {cost.flops / 1e15:,.3g} PFLOP, {gpu} at {GPU_RATE / 1e12:.0f} TFLOP/s"


# --------------------------------------------------------------------------------------------- text


def describe(
    plans: Sequence[tuple[PaperPart, Sequence[StepPlan]]], settings: Settings, *, suite: str
) -> list[str]:
    """The plan as lines: every command with what it costs and lacks, then how to get what is missing."""
    data = DATA if settings.data_root is None else str(settings.data_root)
    steps = [plan.step for _, part in plans for plan in part]
    lines = [f"the COMiT paper, suite {suite}: {len(plans)} parts, {len(steps)} commands"]
    for part, part_plans in plans:
        lines.append(f"{part.name}: {part.title}")
        if not part_plans:
            lines.append(f"  left out: {part.lacking}")
        for plan in part_plans:
            lines.append(f"  {plan.step.text(output=str(settings.output), data=data)}")
            cost, unknown = total_cost([plan.step], settings)
            told = [_cost_text(cost)] if cost.flops else []
            told += [f"cost of {', '.join(unknown)} not known"] if unknown else []
            lines += [f"    cost: {'; '.join(told)}"] if told else []
            if plan.required:
                state = "waits for" if plan.now is None else "in part; the rest waits for"
                lines.append(f"    {state}: {plan.waits_for}")
            elif plan.step.follows:
                lines.append("    reads what the command above left")
    total, unknown = total_cost(steps, settings)
    lines.append(f"in all: {_cost_text(total)}; token cache at most {human_bytes(total.bytes)}")
    lines.append(
        "  costs are those of encoding and decoding (results/reference/cost.md), without the fits of probes; "
        "what several parts need is done and counted once"
    )
    missing = list(dict.fromkeys(need for _, part in plans for plan in part for need in plan.needs))
    if not missing:
        return [*lines, "nothing is missing"]
    lines.append("missing, and how to get it:")
    for need in missing:
        what = f": {need.what}" if need.what else ""
        lines.append(f"  {need.name}{what}{'' if need.required else ' (perhaps)'}\n    {need.how}")
    return lines
