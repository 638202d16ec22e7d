"""Kind ``gather``: what does a message gain with each crop that is looked at?

The message after every one of nine local crops in a random order is decoded and compared with the image,
without (``random``) and after the whole image (``global+random``). One encoding gives all of its prefixes:
the message after k crops is the message of the policy that stops there. Points have the names of policies, so
that the number in ``global+random:4`` counts the whole image, and three local crops follow it.

Every image has one order per seed, the same for both rows of crops, and one noise per seed for all messages.
Messages are read by one step of the decoder without guidance, which shows what they say and invents nothing.

========================  ======================================================================
``gather_gain``           dB, PSNR after nine local crops minus PSNR after one, mean over images
``gain_over_null``        dB, PSNR after nine local crops minus that of the null, mean over images
``psnr@random:1`` ...     dB, of the messages of ``POINTS``, mean over images
``full_psnr@...``         the same, decoded with the tokenizer's own settings (recipe: ``full``)
``gaining_images``        percent of the images for which nine crops are better than one
========================  ======================================================================

The null: all crops but the first are cut out of another image, at the same places. What improves then is not
read from the crops, but comes with the number of updates. ``chance`` is the null where there are two crops or
more, and an image in the mean colour of all where there is one.

Shape legend: ``U`` seeds, ``n`` images, ``K`` crops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comit_bench.metrics.similarity import PSNR_CAP, psnr_of, squared_error
from comit_bench.metrics.statistics import estimate
from comit_bench.recipes.specs import TaskSpec
from comit_bench.results.outcomes import Outcomes
from comit_bench.results.schema import Metric
from comit_bench.seeding import generator_for
from comit_bench.tasks.base import Inputs, Role, Rows, Task, check_main_metric
from comit_bench.tasks.objectness import derangement
from comit_bench.tasks.reconstruction import first_images, moments, null_psnr, pixel_protocol
from comit_bench.tasks.result import Result
from comit_bench.tasks.shards import Columns, batches, in_shards, joined, noise_seeds
from comit_bench.tokenizers.base import CropStep, Gathers, Tokenizer, Tokens, gathers
from comit_bench.tokenizers.contract import check_decoded, check_steps

LOCAL_CROPS = 9
POLICIES = {"random": f"random:{LOCAL_CROPS}", "global+random": f"global+random:{LOCAL_CROPS + 1}"}
CROPS = {"random": LOCAL_CROPS, "global+random": LOCAL_CROPS + 1}  # K of each
POINTS = {  # messages that are metrics: row of crops, and after how many of them
    "random:1": ("random", 1),
    "random:3": ("random", 3),
    "random:9": ("random", 9),
    "global": ("global+random", 1),
    "global+random:4": ("global+random", 4),
}
Floats = NDArray[np.float64]


def steps_of(
    tokenizer: Gathers,
    images: Tensor,
    ids: Sequence[str],
    row: str,
    *,
    seed: int,
    batch_size: int,
    later: Tensor | None = None,
) -> list[CropStep]:
    """Messages after every crop, [K]; nothing depends on the batch size.

    Args:
        tokenizer: Looks at crops.
        images: uint8 [n, 3, S, S].
        ids: Of the images; with the seed they decide about the orders.
        row: Of ``POLICIES``.
        seed: Of the orders.
        batch_size: Images per call.
        later: uint8 [n, 3, S, S], where all crops after the first are cut out.
    """
    parts = []
    for start in range(0, len(images), batch_size):
        some = slice(start, start + batch_size)
        own = [generator_for(seed, f"gather/{name}") for name in ids[some]]
        others = None if later is None else later[some]
        found = tokenizer.encode_by_crop(images[some], policy=POLICIES[row], generators=own, later=others)
        parts.append(check_steps(tokenizer, found, len(own), CROPS[row]))
    return [_together(steps) for steps in zip(*parts, strict=True)]


def _together(steps: Sequence[CropStep]) -> CropStep:
    """The same step of several batches."""
    tokens = [step.tokens for step in steps]
    ids = [part.ids for part in tokens if part.ids is not None]
    offsets = [part.offsets for part in tokens if part.offsets is not None]
    codes = torch.cat([part.codes for part in tokens])
    whole = Tokens(torch.cat(ids) if ids else None, codes, torch.cat(offsets) if offsets else None)
    return CropStep(whole, torch.cat([step.boxes for step in steps]))


def decoded(
    tokenizer: Gathers, tokens: Tokens, ids: Sequence[str], *, seed: int, batch_size: int, full: bool = False
) -> Tensor:
    """What messages say: uint8 [n, 3, S, S] where the tokenizer computes.

    Args:
        tokenizer: Whose messages.
        tokens: n of them.
        ids: Of the images; with the seed they decide about the noise.
        seed: Of the noise.
        batch_size: Messages per call.
        full: Decode with the tokenizer's settings instead of one step.
    """
    decode = tokenizer.decode if full else tokenizer.decode_one_step
    parts = []
    for start in range(0, len(tokens), batch_size):
        some = slice(start, start + batch_size)
        part = Tokens(
            None if tokens.ids is None else tokens.ids[some],
            tokens.codes[some],
            None if tokens.offsets is None else tokens.offsets[some],
        )
        images = decode(part, seeds=noise_seeds(seed, ids[some]))
        parts.append(check_decoded(images, tokenizer.info, len(part)))
    return torch.cat(parts)


def measure(
    inputs: Inputs, role: Role, partner: Rows | None, positions: Rows, seed: int
) -> Mapping[str, NDArray[np.generic]]:
    """Everything about one shard and seed.

    Args:
        inputs: The run.
        role: Whose images.
        partner: int64, for every image of the role the one that lends the null's crops; None: there is no
            other image.
        positions: int64 [n], positions in the role.
        seed: Of orders and noise.

    Returns:
        Mean squared errors float64: ``random`` [n, 9], ``global+random`` [n, 10], the same of the null under
        ``null/...``, and ``full/<point>`` [n]; ``moments`` of the images as kind ``reconstruction`` has them.
    """
    tokenizer = _gathering(inputs.the_tokenizer())
    ids = [role.ids[position] for position in positions.tolist()]
    images = _read(inputs, role, positions)
    others = None if partner is None else _read(inputs, role, partner[positions])
    how: dict[str, Any] = {"seed": seed, "batch_size": inputs.batch_size}

    def error(tokens: Tokens, *, full: bool = False) -> Tensor:
        seen = decoded(tokenizer, tokens, ids, full=full, **how)
        return squared_error(images.to(seen.device), seen).cpu()

    columns = {"moments": moments(images)}
    for row in POLICIES:
        steps = steps_of(tokenizer, images, ids, row, **how)
        columns[row] = torch.stack([error(step.tokens) for step in steps], dim=1)
        if inputs.spec.gather.full:
            for point, (of, crops) in POINTS.items():
                if of == row:
                    columns[f"full/{point}"] = error(steps[crops - 1].tokens, full=True)
        if others is not None:
            steps = steps_of(tokenizer, images, ids, row, later=others, **how)
            null = [columns[row][:, 0], *(error(step.tokens) for step in steps[1:])]
            columns[f"null/{row}"] = torch.stack(null, dim=1)
    return {name: value.numpy() for name, value in columns.items()}


def _read(inputs: Inputs, role: Role, positions: Rows) -> Tensor:
    return torch.cat([batch.images for batch in batches(inputs, role, positions)])


def _gathering(tokenizer: Tokenizer) -> Gathers:
    assert gathers(tokenizer)  # refuses() has looked
    return tokenizer


class Gather(Task):
    """PSNR by the number of crops."""

    def protocol(self, inputs: Inputs) -> dict[str, Any]:
        """The images as in kind ``reconstruction``, and the rules that stand in no recipe."""
        rules = {
            "crops": POLICIES,
            "order": "one per image and seed, the same with and without the whole image",
            "null": "all crops but the first from another image, everybody's lent once",
        }
        return {**pixel_protocol(inputs, inputs.spec.gather.count), "gather": rules}

    def refuses(self, spec: TaskSpec, tokenizer: Tokenizer) -> str | None:
        """Tokenizers whose message does not grow crop by crop."""
        if gathers(tokenizer):
            return None
        return "its message does not grow crop by crop (COMiT's does)"

    def decodings(self, spec: TaskSpec) -> float:
        """One step without guidance is a twentieth of ten guided ones."""
        one_step = 2 * sum(CROPS.values()) - len(CROPS)  # the null shares the first crop
        return one_step / 20 + len(POINTS) * spec.gather.full

    def run(self, inputs: Inputs) -> Result | None:
        """Follow every message crop by crop, once per seed; None in all processes but the first."""
        inputs.check()
        check_main_metric(inputs.spec, dict.fromkeys(_names(full=inputs.spec.gather.full)))
        role = first_images(inputs.roles["report"], inputs.spec.gather.count)
        partner = derangement(role.ids, 0, 0) if len(role) > 1 else None
        runs = []
        for seed in inputs.seeds:
            shards = in_shards(
                inputs,
                role,
                f"crops-{seed}",
                lambda rows, seed=seed: measure(inputs, role, partner, rows, seed),  # type: ignore[misc]
            )
            if shards is not None:
                runs.append({name: joined(shards, name) for name in shards[0]})
        return _result(inputs, role, runs) if runs else None


def _names(*, full: bool) -> list[str]:
    kinds = ("psnr", "full_psnr") if full else ("psnr",)
    points = [f"{kind}@{point}" for kind in kinds for point in POINTS]
    return ["gather_gain", "gain_over_null", *points, "gaining_images"]


def _result(inputs: Inputs, role: Role, runs: Sequence[Columns]) -> Result:
    errors: dict[str, Floats] = {
        name: np.stack([run[name] for run in runs]).astype(np.float64)  # [U, n, K]
        for name in runs[0]
        if name != "moments"
    }
    psnr = {name: psnr_of(torch.from_numpy(values)).numpy() for name, values in errors.items()}
    colour = null_psnr(runs[0]["moments"], inputs.the_tokenizer().info.resolution)
    outcomes, nulls = _outcomes(inputs, role, psnr)
    metrics: dict[str, Metric] = {}
    for name in outcomes.values:
        chance = colour["all"] if name not in nulls else nulls[name]
        metrics[name] = outcomes.metric(
            name, unit="%" if name == "gaining_images" else "dB", chance=chance, higher_is_better=True
        )
    check_main_metric(inputs.spec, metrics)
    details: dict[str, Any] = {
        "psnr_mean_colour": colour["all"],
        "psnr_own_mean_colour": colour["own"],
        "psnr_cap": PSNR_CAP,
        "by_crops": {row: _curve(errors, psnr, row) for row in POLICIES},
    }
    extra = {} if "gain_over_null" in metrics else {"left_out": "the null (it needs another image)"}
    return Result(metrics=metrics, extra=extra, details={"gather": details}, outcomes=outcomes)


def _outcomes(
    inputs: Inputs, role: Role, psnr: Mapping[str, Floats]
) -> tuple[Outcomes, dict[str, float | None]]:
    """What every image contributes, and the null of those metrics that have one of their own."""

    def told(values: Mapping[str, Floats], prefix: str) -> dict[str, Floats]:
        return {
            f"{prefix}psnr@{point}": values[row][:, :, crops - 1] for point, (row, crops) in POINTS.items()
        }

    def gain(values: Mapping[str, Floats]) -> Floats:
        return values["random"][:, :, -1] - values["random"][:, :, 0]

    values = {"gather_gain": gain(psnr)}
    nulls: dict[str, float | None] = {"gather_gain": None, "gaining_images": None}
    columns: dict[str, Floats] = {}
    if "null/random" in psnr:
        null = {row: psnr[f"null/{row}"] for row in POLICIES}
        values["gain_over_null"] = psnr["random"][:, :, -1] - null["random"][:, :, -1]
        nulls = {"gain_over_null": 0.0, "gather_gain": float(gain(null).mean())}
        nulls["gaining_images"] = 100 * float((gain(null) > 0).mean())
        columns = told(null, "null_")
        for point, (_, crops) in POINTS.items():
            if crops > 1:
                nulls[f"psnr@{point}"] = float(columns[f"null_psnr@{point}"].mean())
    values |= told(psnr, "")
    if inputs.spec.gather.full:
        values |= {f"full_psnr@{point}": psnr[f"full/{point}"] for point in POINTS}
    values["gaining_images"] = (gain(psnr) > 0).astype(np.float64)
    return Outcomes(ids=role.ids, seeds=inputs.seeds, values=values, columns=columns), nulls


def _curve(errors: Mapping[str, Floats], psnr: Mapping[str, Floats], row: str) -> dict[str, Any]:
    """Means over images after 1, 2, ... crops; ``mse`` in squared grey levels of 0 to 255."""
    found = [estimate(psnr[row][:, :, k]) for k in range(CROPS[row])]
    curve = {
        "psnr": [one.value for one in found],
        "stderr": [one.stderr for one in found],
        "mse": errors[row].mean(axis=(0, 1)).tolist(),
    }
    if f"null/{row}" in psnr:
        curve["null_psnr"] = psnr[f"null/{row}"].mean(axis=(0, 1)).tolist()
    return curve
