"""Memory of the Visual Genome probe as its recipe has it: 512 images, 20 candidates, 256 tokens, T5-base.

Run it alone: ``python -m pytest tests/perf/test_relation_memory.py -m perf -s``. One training step is cut
after a few chunks, which is all that memory depends on: gradients add up in place, chunk after chunk
(``comit_bench.tasks.contrast``). That chunks change no number is a unit test.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

LIMIT_GB = 24
CHUNKS = 2

PROGRAM = textwrap.dedent(
    """
    import json, resource, sys, time
    import numpy as np, torch
    from comit_bench.recipes.specs import find_tasks
    from comit_bench.tasks import contrast
    from comit_bench.probing.fit import MessageSource, Examples
    from comit_bench.tasks.negatives import Lists, Words

    recipe = find_tasks()["visual-genome"].spec
    count, length, width = recipe.probe.batch_size, 256, 768  # T5-base has vectors of 768
    words = Words(150, 150)
    draw = np.random.default_rng(0)
    table = np.concatenate([np.arange(count)[:, None], draw.integers(0, 150, (count, 3))], axis=1)
    codes = torch.randn(count, length, 6)
    data = Examples(MessageSource(codes=codes), torch.arange(count))
    row, every = table[:1, None, 1:].repeat(16, 1), np.ones((1, 16), bool)
    lists = Lists(np.arange(1), row, every, {"random": slice(1, 16)})
    task = contrast.ContrastTask(
        spec=recipe.probe, negatives=recipe.negatives, words=words,
        train=data, early_stop=data, report=data, table=table, known=table,
        stop_lists=lists, report_lists=lists,
        objects=torch.randn(150, width), predicates=torch.randn(150, width),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fit = contrast._Fit(task, 0, torch.device("cpu"))
    every = fit._chunks
    seen = []
    def some(images, groups):
        seen.append(len(every(images, groups)))
        return every(images, groups)[: int(sys.argv[1])]
    fit._chunks = some
    started = time.perf_counter()
    fit.epoch(1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"chunks": seen[0], "before": before / 2**20, "peak": peak / 2**20,
                      "seconds": time.perf_counter() - started}))
    """
)


@pytest.mark.perf
def test_a_step_of_the_visual_genome_probe_fits() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(CHUNKS)], capture_output=True, text=True, check=True, timeout=3600
    )
    found = json.loads(done.stdout.splitlines()[-1])
    sys.stdout.write(
        f"\n{CHUNKS} of {found['chunks']} chunks: {found['seconds']:.0f} s, {found['before']:.2f} GB before, "
        f"{found['peak']:.2f} GB at most\n"
    )
    assert found["chunks"] > CHUNKS
    assert found["peak"] < LIMIT_GB
