"""What a task gets for a job, and everything about it that can change a number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from comit_bench.data.images import upright
from comit_bench.data.split import OpenData
from comit_bench.data.splitting import holdout
from comit_bench.pipeline.jobs import Job, Settings
from comit_bench.pipeline.messages import ENCODE_SEED, policy_of
from comit_bench.pipeline.session import Session
from comit_bench.probing import stem
from comit_bench.recipes.specs import check_fit
from comit_bench.tasks.base import Inputs, Role, find_task
from comit_bench.tokenizers.base import Tokenizer
from comit_bench.tokenizers.identity import code_version


def roles_of(job: Job, data: OpenData, settings: Settings) -> dict[str, Role]:
    """For train, early_stop and report: the images that play this role, broken ones included.

    Where no probe is fitted there is only ``report``.

    Raises:
        UsageError: The data are of another kind than the task, or a split does not exist.
    """
    check_fit(job.task, job.dataset)
    spec = job.task.spec
    source, fraction = spec.split.early_stop.source, spec.split.early_stop.fraction
    kept = {n: np.array(settings.images_of(data.splits[n]), dtype=np.int64) for n in spec.split_names}
    if not spec.task_kind.probed:
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


def inputs_of(job: Job, data: OpenData, session: Session) -> Inputs:
    """What the task gets, still without tokenizer and messages."""
    spec, settings = job.task.spec, session.settings
    probed, on_cpu = spec.task_kind.probed, session.device.type == "cpu"
    return Inputs(
        spec=spec,
        data=data,
        roles=roles_of(job, data, settings),
        seeds=list(range((settings.seeds if probed else None) or spec.seeds)),
        control=settings.control if probed else None,
        cache=settings.cache_dir,
        offline=settings.offline,
        device=session.device,
        pool=session.pool if on_cpu and probed else None,
        workers=None if on_cpu else 1,
        learning_rates=settings.probe_lr if probed else (),
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        ranks=session.ranks,
    )


def protocol_of(job: Job, tokenizer: Tokenizer | None, inputs: Inputs, settings: Settings) -> dict[str, Any]:
    """Everything that can change the number, except the weights, which are the row's identity.

    The tokenizer's side also says which network they are the weights of, and which code computes it.
    """
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
        **find_task(spec).protocol(replace(inputs, tokenizer=tokenizer)),
    }
    if inputs.learning_rates:
        protocol["probe_lr"] = list(inputs.learning_rates)
    if inputs.control is not None:
        protocol["control"] = inputs.control
    if settings.limit is not None:
        protocol["limit"] = settings.limit
    if tokenizer is not None:
        info = tokenizer.info
        protocol["tokenizer"] = {
            "family": info.family,
            "configuration": info.configuration,
            "version": code_version(tokenizer),
            "preprocessing": upright(info.preprocessing) if data.exif else info.preprocessing,
            "policy": policy_of(job, tokenizer),
            "options": dict(info.options),
            "encode_seed": ENCODE_SEED,
        }
        if info.stem and spec.task_kind.probed:
            protocol["tokenizer"]["stem"] = {"name": info.stem, "version": stem.VERSION}
        decoder = getattr(tokenizer, "decode_options", None)
        if decoder and spec.task_kind.decodes:
            protocol["tokenizer"]["decode"] = dict(decoder)
    return protocol
