"""``gpu.md`` out of ``results.jsonl``, after every part. Needs nothing but Python, whatever else is broken.

``python scripts/gpu_day/summary.py OUT [part NAME STATE SECONDS]`` first notes how a part ended.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RESULTS, PAGE = "results.jsonl", "gpu.md"


def read(out: Path) -> list[Row]:
    """All results so far; a line that was cut off in the middle is left out."""
    rows = []
    path = out / RESULTS
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; empty without rows."""
    body = [f"| {' | '.join(row)} |" for row in rows]
    if not body:
        return ""
    return "\n".join([f"| {' | '.join(head)} |", "|" + " :-- |" * len(head), *body]) + "\n"


def number(value: Any, form: str = ".3g") -> str:
    """A number as text, a dash for none."""
    return "–" if value is None else format(value, form)


def percent(value: Any) -> str:
    """A share in percent; zero is said to be zero."""
    return "–" if value is None else ("0" if value == 0 else f"{100 * value:.2g}") + " %"


def of(rows: list[Row], part: str) -> list[Row]:
    """Results of one part."""
    return [row for row in rows if row.get("part") == part and "state" not in row]


def machine(rows: list[Row]) -> str:
    """What it ran on."""
    facts = next((row for row in of(rows, "environment") if row.get("what") == "machine"), None)
    if facts is None:
        return "The machine is not known: the part `environment` did not run.\n"
    text = (
        f"{facts['device']}"
        + (f", {facts['memory_gib']} GiB, driver {facts['driver']}" if facts.get("driver") else "")
        + f"; torch {facts['torch']}, Python {facts['python']}, commit {facts['commit']}.\n"
    )
    if facts.get("tiny"):
        text += "\n**Tiny numbers: this only shows that it runs.**\n"
    if facts["missing"]:
        text += f"\n**Missing packages: {', '.join(facts['missing'])}.**\n"
    rates = next((row for row in of(rows, "environment") if row.get("what") == "rates"), {})
    if "float32_flops" in rates:
        kinds = [(k.removesuffix("_flops"), v) for k, v in rates.items() if k.endswith("_flops")]
        products = ", ".join(f"{name} {value / 1e12:.3g}" for name, value in kinds)
        text += (
            f"\nOne large matrix product, TFLOP/s: {products}. A copy on the device moves "
            f"{rates['copy_bytes_per_s'] / 1e12:.3g} TB/s (read and written).\n"
        )
    return text


def states(rows: list[Row]) -> str:
    """How every part ended."""
    ended = [row for row in rows if "state" in row]
    return table(("part", "", "seconds"), ((r["part"], r["state"], str(r["took"])) for r in ended))


def outcomes(rows: list[Row], part: str) -> str:
    """Counts of test outcomes, and what failed."""
    tests = [row for row in of(rows, part) if "test" in row]
    if not tests:
        return ""
    counts = Counter(row["outcome"] for row in tests)
    text = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) + ".\n"
    failed = [row for row in tests if row["outcome"] == "failed"]
    if failed:
        lines = (f"- `{row['test']}` ({row['when']}): {row.get('said') or 'no message'}" for row in failed)
        text += "\n" + "\n".join(lines) + "\n"
    return text


def ids(rows: list[Row]) -> str:
    """Shares of ids that differ."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    counts: dict[tuple[str, str], str] = {}
    for row in of(rows, "ids"):
        if "precision" in row:
            key = (row["name"], row["against"])
            found.setdefault(key, {})[row["precision"]] = row.get("error") or percent(row["differ"])
            counts[key] = str(row.get("ids", "–"))
    kinds = ("float32", "tf32", "bfloat16")
    head = ("network", "compared with", "ids", *kinds)
    return table(head, ((*key, counts[key], *(v.get(k, "–") for k in kinds)) for key, v in found.items()))


def speed(rows: list[Row]) -> str:
    """Images per second."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    columns: list[str] = []
    for row in of(rows, "speed"):
        if "batch" in row:
            column = f"{row['what']} {row['batch']}"
            columns += [column] if column not in columns else []
            cell = row.get("error") or f"{row['images_per_s']:.3g} ({number(row['peak_gib'], '.2g')} GiB)"
            found.setdefault((row["name"], row["dtype"]), {})[column] = cell
    columns.sort(key=lambda c: (c.split()[0] != "encode", int(c.split()[1])))
    cells = ((*key, *(values.get(c, "–") for c in columns)) for key, values in found.items())
    failed = [
        f"- {row['name']}: {row['error']}\n"
        for row in of(rows, "speed")
        if "error" in row and "batch" not in row
    ]
    return table(("preset", "type", *columns), cells) + "".join(failed)


def training(rows: list[Row]) -> str:
    """Steps and their largest costs."""
    head = (
        "step",
        "images",
        "crops",
        "images/s",
        "TFLOP",
        "of the peak",
        "VAE",
        "GiB",
        "three largest costs",
    )
    cells = []
    for row in of(rows, "training"):
        if "images" not in row:
            continue
        name = f"{row['name']} {row['settings']}".strip()
        if "error" in row:
            cells.append((name, str(row["images"]), str(row["crops"]), row["error"], *[""] * 5))
            continue
        largest = ", ".join(f"{c['name']} {100 * c['share']:.0f} %" for c in row["costs"])
        rate, arithmetic = number(row["images_per_s"]), number(row["step_tflop"])
        sizes = (str(row["images"]), str(row["crops"]))
        shares = (percent(row["of_peak"]), percent(row["vae_share"]))
        cells.append((name, *sizes, rate, arithmetic, *shares, number(row["peak_gib"]), largest))
    return table(head, cells)


def trainings(rows: list[Row]) -> str:
    """What was trained, how fast, and what was not."""
    own, text = of(rows, "trainings"), ""
    trial = next((row for row in own if row.get("what") == "trial"), None)
    if trial is not None:
        rates = ", ".join(f"{arm} {rate:.3g}" for arm, rate in trial["rates"].items())
        text = (
            f"Side by side {trial['together']:.3g} images/s ({rates}); {trial['images']:,} images for each.\n"
        )
    head = ("training", "seed", "images", "images/s", "seconds", "")
    cells = []
    for row in own:
        if "arm" not in row:
            continue
        told = (row["arm"], str(row["seed"]))
        if "error" in row:
            cells.append((*told, "", "", "", row["error"].replace("|", "/")))
            continue
        state = "whole" if row["whole"] else "stopped early, exported"
        cells.append((*told, f"{row['images']:,}", number(row["images_per_s"]), str(row["seconds"]), state))
    return text + "\n" + table(head, cells)


def probe(rows: list[Row]) -> str:
    """Epochs of the probe."""
    head = ("type", "images timed", "images/s", "one epoch, s", "GiB")
    cells = []
    for row in of(rows, "probe"):
        if "dtype" in row and row["dtype"] != "warm-up":
            if "error" in row:
                cells.append((row["dtype"], str(row["images"]), row["error"], "", ""))
            else:
                cells.append(
                    (
                        row["dtype"], str(row["images"]), number(row["images_per_s"]), number(row["epoch_s"]),
                        number(row["peak_gib"]),
                    )
                )  # fmt: skip
    both = [(row["scores"], shares(row)) for row in of(rows, "probe") if "scores" in row]
    return table(head, cells) + ("\n" + table(("type", "right answers, % (each seed)"), both) if both else "")


def shares(row: Row) -> str:
    """Mean over the seeds, and each."""
    if "error" in row:
        return str(row["error"])
    return f"{100 * row['score']:.1f} ({', '.join(f'{100 * one:.1f}' for one in row['of_seeds'])})"


def left_out(rows: list[Row], part: str) -> str:
    """What a part did not get to."""
    names = [name for row in of(rows, part) if "names" in row for name in row["names"]]
    return f"\nLeft out for want of time: {', '.join(names)}.\n" if names else ""


def page(rows: list[Row]) -> str:
    """The whole page."""
    parts = {
        "Tests that need a GPU": outcomes(rows, "tests"),
        "Trainings on drawings": trainings(rows) + left_out(rows, "trainings"),
        "Ids that differ": ids(rows),
        "Encoding and decoding, images per second (peak memory)": speed(rows) + left_out(rows, "speed"),
        "One training step": training(rows) + left_out(rows, "training"),
        "A probe fit of ImageNet100's size": probe(rows),
        "Tasks from images to a record": outcomes(rows, "tasks"),
    }
    text = f"# On a GPU\n\n{machine(rows)}\n{states(rows)}"
    return text + "".join(f"\n## {title}\n\n{body}" for title, body in parts.items() if body.strip())


def main(arguments: list[str]) -> None:
    """Note how a part ended, if that is asked for, and write the page."""
    out = Path(arguments[0])
    if arguments[1:2] == ["part"]:
        name, state, seconds = arguments[2:5]
        with (out / RESULTS).open("a", encoding="utf-8") as stream:
            stream.write("\n" + json.dumps({"part": name, "state": state, "took": int(seconds)}) + "\n")
    (out / PAGE).write_text(page(read(out)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
