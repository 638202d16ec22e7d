"""Peak memory of reading a Visual Genome of full size: ``python tests/perf/test_visual_genome_memory.py``.

Writes a ``relationships.json`` of 1 GB in the official form (keys, nesting, mixed case, ``name`` and
``names``), reads it in a process of its own, and compares that process's peak resident memory with 1.5 GB.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

SIZE = 1 << 30
DIFFERENT = 6000  # images after which contents repeat, under other ids
LIMIT = 1.5 * (1 << 30)
READ = """
import resource, sys, time
from pathlib import Path
from comit_bench.data.readers import visual_genome
from comit_bench.recipes.specs import find_datasets
recipe = find_datasets()["visual-genome"]
start = time.perf_counter()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
folder = Path(sys.argv[1])
manifest = visual_genome.build(recipe.spec, visual_genome.sources(recipe.spec, folder), progress=False)
rows = sum(len(rows.values) for rows in manifest.splits.values())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(before, peak, rows, manifest.notes["counts"]["relations"], time.perf_counter() - start)
"""


def write_visual_genome(folder: Path, size: int) -> int:
    """Write files of about ``size`` bytes; returns the number of images."""
    draw = random.Random(0)
    words = [f"thing {i}" for i in range(80_000)]  # about as many as the original has
    weights = [1 / (i + 1) for i in range(len(words))]
    objects = draw.choices(words, weights, k=1 << 18)
    verbs = [f"verb {i}" for i in range(30_000)]
    predicates = draw.choices(verbs, [1 / (i + 1) for i in range(len(verbs))], k=1 << 18)
    folder.mkdir(parents=True, exist_ok=True)
    number, bodies = 0, []
    for _ in range(DIFFERENT):
        relations = []
        for _ in range(draw.randint(0, 42)):
            number += 1
            predicate = draw.choice(predicates)
            relations.append({
                "predicate": predicate.upper() if number % 3 == 0 else predicate + " " * (number % 2),
                "object": _end(draw, objects, number * 2), "relationship_id": 15000 + number,
                "synsets": [f"{predicate.replace(' ', '_')}.v.01"],
                "subject": _end(draw, objects, number * 2 + 1),
            })  # fmt: skip
        bodies.append(f'{{"relationships": {json.dumps(relations)}, "image_id": ')
    count, written, pictures = 0, 0, []
    with (folder / "relationships.json").open("w", encoding="ascii") as stream:
        stream.write("[")
        while written < size:
            entry = f"{', ' * (count > 0)}{bodies[count % DIFFERENT]}{count + 1}}}"
            written += stream.write(entry)
            count += 1
            url = f"https://cs.stanford.edu/people/rak248/VG_100K_{1 + count % 2}/{count}.jpg"
            picture = {"width": 800, "url": url, "height": 600, "image_id": count, "flickr_id": None}
            pictures.append(picture | {"coco_id": None if count % 2 else count})
        stream.write("]")
    (folder / "image_data.json").write_text(json.dumps(pictures), encoding="ascii")
    return count


def _end(draw: random.Random, objects: list[str], number: int) -> dict[str, object]:
    word = draw.choice(objects)
    named: dict[str, object] = {"name": word} if number % 4 else {"names": [word.title()]}
    return named | {
        "h": draw.randint(20, 600), "object_id": 1_058_000 + number,
        "synsets": [word.replace(" ", "_") + ".n.01"],
        "w": draw.randint(20, 800), "y": draw.randint(0, 300), "x": draw.randint(0, 400),
    }  # fmt: skip


def measure(folder: Path, size: int = SIZE) -> dict[str, float]:
    """Write, read in another process, and return bytes and seconds."""
    images = write_visual_genome(folder, size)
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", READ, str(folder)], capture_output=True, text=True, check=True
    )
    before, peak, rows, relations, seconds = map(float, done.stdout.split())
    return {
        "json_bytes": (folder / "relationships.json").stat().st_size,
        "images": images,
        "relations": relations,
        "relations_in_the_manifest": rows,
        "before_bytes": before,
        "peak_bytes": peak,
        "seconds": seconds,
        "process_seconds": time.perf_counter() - begin,
    }


@pytest.mark.slow
@pytest.mark.perf
def test_a_file_of_one_gigabyte_is_read_in_less_than_one_and_a_half(tmp_path: Path) -> None:
    found = measure(tmp_path)
    assert found["json_bytes"] >= SIZE
    assert found["relations_in_the_manifest"] > 0
    assert found["peak_bytes"] < LIMIT, found


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        sys.stdout.write(json.dumps(measure(Path(directory)), indent=2) + "\n")
