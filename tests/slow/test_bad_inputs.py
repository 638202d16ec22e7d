"""Bad inputs of every kind over every command: one line that names the thing, and an exit code.

A case is a command line. It passes when the command ends in time with one of the documented exit codes, says
one error, names what is wrong, and shows no traceback (nor that the last net caught something unexpected).
``OK`` marks inputs that look bad and are not.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bad_world
import pytest
from bad_world import BAD_IMAGES, BAD_JSON, BAD_PICKLES, BAD_PLACES, BAD_SAFETENSORS, BAD_YAML, DIGITS, LONG
from command_server import ROOT, Commands, Ended

pytestmark = pytest.mark.slow

ERROR, USAGE, MISSING = 1, 2, 3
BAD = frozenset({ERROR, USAGE, MISSING})
OK = frozenset({0})
NOBODY = "~nobody-at-all/x"
RAW = os.fsdecode(b"caf\xe9")  # no UTF-8
NUMBERS = ("", " ", "x", "²", "1.5", "nan", "inf", "-1", "0x10", DIGITS)
UNEXPECTED = ("The traceback is in", "no log could be written")  # words of the last net


@dataclass(frozen=True, slots=True)
class Case:
    """``{w}`` in an argument stands for the folder of ``bad_world``; ``names`` must stand in the message."""

    kind: str
    name: str
    argv: tuple[str, ...]
    names: str = ""
    codes: frozenset[int] = BAD
    entry: str = "comit-bench"
    environment: tuple[tuple[str, str | None], ...] = ()

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.name}"


CASES: list[Case] = []


def add(
    kind: str, name: str, *argv: str, names: str = "", codes: frozenset[int] = BAD, **more: object
) -> None:
    CASES.append(Case(kind, name, argv, names, codes, **more))  # type: ignore[arg-type]


RUN = ("run", "--dry-run", "--quiet")
SWEEP = ("sweep", "--quiet", "--limit", "2")
FIGURE = {  # every figure with a tokenizer
    "attention": ("figure", "attention"),
    "codebook": ("figure", "codebook"),
    "counterfactual": ("figure", "counterfactual"),
    "edit": ("figure", "edit"),
    "evolution": ("figure", "evolution"),
    "gather": ("figure", "gather"),
    "neighbours": ("figure", "neighbours"),
    "policies": ("figure", "policies"),
    "reconstruction": ("figure", "reconstruction"),
}
TOKENIZE = ("tokenize", "{w}/images", "--out", "t.safetensors", "--quiet")
DETOKENIZE = ("detokenize", "{w}/tokens.safetensors", "--out", "back", "--quiet")
TRAIN = ("train", "--config", "comit-nano", "--dry-run")
MINI = ("--include-path", "{w}/recipes")


def short(value: str) -> str:
    return {DIGITS: "digits", LONG: "long", "": "empty", " ": "blank", RAW: "raw", NOBODY: "nobody"}.get(
        value, value.replace("/", "_")
    )


# Whole numbers
WHOLE = {
    "run": (RUN, ("--limit", "--seeds", "--batch-size", "--num-workers")),
    "sweep": (SWEEP, ("--limit", "--batch-size", "--steps")),
    "tokenize": (TOKENIZE, ("--seed", "--batch-size", "--num-workers")),
    "detokenize": (DETOKENIZE, ("--seed", "--batch-size")),
    "data-build": (("data", "build", "mini-masks", "--data-root", "{w}/data", *MINI), ("--workers",)),
    "data-show": (("data", "show", "mini-masks", "--data-root", "{w}/data", *MINI), ("--seed",)),
    "figure-edit": (FIGURE["edit"], ("--count", "--span", "--seed")),
    "figure-attention": (FIGURE["attention"], ("--sweep-count",)),
    "figure-neighbours": (FIGURE["neighbours"], ("--neighbours", "--pool")),
    "figure-policies": (FIGURE["policies"], ("--curve-count",)),
    "figure-gather": (FIGURE["gather"], ("--count", "--curve-count")),
}
SIGNED = {"--seed"}  # where a negative number is one
for command, (prefix, options) in WHOLE.items():
    for option in options:
        for value in NUMBERS:
            if (option in SIGNED and value == "-1") or (option == "--seed" and command != "tokenize"):
                continue
            add(
                "whole",
                f"{command}{option}={short(value)}",
                *prefix,
                f"{option}={value}",
                names=option.strip("-"),
            )
for value in ("0", "auto,", "Auto", "1e3"):
    add("whole", f"run-batch-size={value}", *RUN, f"--batch-size={value}", names="batch-size")
for option in ("--limit", "--seeds"):
    add("whole", f"run{option}=0", *RUN, f"{option}=0", names=option)
add("whole", "run-limit-larger-than-data", *RUN, "--limit", "1000000000000", codes=OK)
add("whole", "run-limit-huge", *RUN, "--limit", "9" * 400, codes=OK)
# Other numbers
for value in ("", "x", "²", "nan", "inf", "-inf", "-1", "1,,x", "1;2", "1e400", DIGITS + "x"):
    add("number", f"sweep-guidance={short(value)}", *SWEEP, f"--guidance={value}", names="guidance")
for value in ("", ",", "1,two", "0", "1,0", "1.5", "1,-2", "1e3", "1 2", "nan", DIGITS):
    add("number", f"sweep-steps={short(value)}", *SWEEP, f"--steps={value}", names="steps")
for value in ("nan", "inf", "x", "", "1.5", "-99", "99", "1e400"):
    add("number", f"attention-layer={short(value)}", *FIGURE["attention"], f"--layer={value}", names="layer")
for value in ("nan", "inf", "x", "", "1", "-0.1", "1e400"):
    add("number", f"attention-time={short(value)}", *FIGURE["attention"], f"--time={value}", names="time")
for option in ("--limit", "--memory"):
    for value in ("nan", "x", "", "-1"):
        add(
            "number",
            f"cost{option}={short(value)}",
            "cost",
            "comit-nano",
            f"{option}={value}",
            names=option.strip("-"),
        )

# KEY=VALUE
PAIRS = {
    "no-sign": "posterior",
    "no-key": "=3",
    "no-value": "steps=",
    "blank-value": "steps= ",
    "only-sign": "=",
    "dots": "..=1",
    "no-name": "comit.=1",
    "unknown": "colour=blue",
    "unknown-family": "cosmit.steps=3",
    "near": "step=3",
    "nan": "steps=nan",
    "inf": "steps=inf",
    "minus-inf": "guidance=-inf",
    "guidance-nan": "guidance=nan",
    "fraction": "steps=1.5",
    "words": "steps=many",
    "square": "steps=²",
    "zero": "steps=0",
    "negative": "steps=-3",
    "digits": f"steps={DIGITS}",
    "infinite": "guidance=1e999",
    "truth": "steps=true",
    "long-key": f"{LONG}=1",
    "long-value": f"posterior={LONG}",
    "posterior": "posterior=samples",
    "solver": "solver=rk99",
    "momentum-nan": "momentum=nan",
    "momentum-words": "momentum=fast",
    "surrogate": f"posterior={RAW}",
    "of-loader": "device=cpu",
    "of-python": "__class__=x",
}
for name, pair in PAIRS.items():
    for command, prefix in (
        ("run", (*RUN, "-t", "comit-nano")),
        ("tokenize", TOKENIZE),
        ("detokenize", DETOKENIZE),
        ("sweep", SWEEP),
    ):
        add("option", f"{command}-{name}", *prefix, "--option", pair, names=pair.partition("=")[0][:20])
for command, prefix in (("run", RUN), ("tokenize", TOKENIZE)):
    add("option", f"{command}-twice", *prefix, "--option", "steps=1", "--option", "steps=2", names="steps")
for name, pair, who in (
    ("flextok-tokens", "tokens=0", "flextok-d18-d28"),
    ("flextok-tokens-many", "tokens=100000", "flextok-d18-d28"),
    ("flextok-tokens-half", "tokens=1.5", "flextok-d18-d28"),
    ("flextok-steps", "steps=nan", "flextok-d18-d28"),
    ("flextok-guidance", "guidance=nan", "flextok-d18-d28"),
    ("flextok-mode", "guidance_mode=strong", "flextok-d18-d28"),
    ("flextok-scale", "scaling_factor=nan", "flextok-d18-d28"),
    ("flextok-compile", "compile=perhaps", "flextok-d18-d28"),
    ("titok-compile", "compile=2", "titok-l-32"),
    ("titok-pickle", "allow_pickle=perhaps", "titok-l-32"),
    ("alit-iterations", "iterations=0", "alit-small"),
    ("alit-iterations-half", "iterations=1.5", "alit-small"),
    ("alit-halting", "halting=nan", "alit-small"),
    ("alit-base", "base=large", "alit-small"),
    ("kmeans-patch", "patch=0", "kmeans-patch"),
    ("kmeans-patch-half", "patch=1.5", "kmeans-patch"),
    ("kmeans-patch-odd", "patch=7", "kmeans-patch"),
    ("kmeans-vocab", "vocab=0", "kmeans-patch"),
    ("kmeans-vocab-words", "vocab=many", "kmeans-patch"),
    ("kmeans-resolution", "resolution=-32", "kmeans-patch"),
    ("pixels-patch", "patch=0", "pixel-oracle"),
    ("pixels-patch-words", "patch=x", "pixel-oracle"),
    ("pixels-resolution", "resolution=1000000", "pixel-oracle"),
):
    add(
        "option", name, *RUN, "--weights", "random", "-t", who, "--option", pair, names=pair.partition("=")[0]
    )

# Cropping policies
for policy in (
    *(
        "",
        " ",
        "raster",
        "raster:",
        "raster:0",
        "raster:x",
        "raster:²",
        "raster:1.5",
        "raster:-1",
        "raster:10x",
    ),
    *(
        "random:1000000",
        "random:0",
        "adaptive:-1",
        "adaptive:0",
        "adaptive:nan",
        "global+",
        "+global",
        "global++raster:3",
    ),
    *(
        "order:99",
        "order:",
        "order:a",
        "order:-1",
        "global:3",
        "spiral:3",
        "GLOBAL ;",
        LONG,
    ),
    *(f"raster:{DIGITS}", "global+raster:0", "global+order:", "none", "raster:9:9", "order:0,,1"),
):
    tag = short(policy) if len(policy) < 40 else "long" if policy == LONG else "digits"
    add("policy", f"run-{tag}", *RUN, "-t", "comit-nano", "--policy", policy, names="policy")
    if tag in ("raster:0", "order:99", "global+", "digits", "empty", "spiral:3"):
        add("policy", f"tokenize-{tag}", *TOKENIZE, "--policy", policy, names="policy")
        add("policy", f"sweep-{tag}", *SWEEP, "--policy", policy, names="policy")
        for figure, command in FIGURE.items():
            add("policy", f"{figure}-{tag}", *command, "--policy", policy, names="policy")

# Names
for name in (
    *("", " ", "comit-nanoo", "comit_nano", "..", "a/b/c", "/nowhere", "./nowhere", "~", NOBODY, LONG, RAW),
    *("a\nb", "comit-nano/", "{w}/a-file", "{w}/a-folder", "{w}/no-images", "C:\\models\\x", "user/", "/"),
    *("hub.example/x y", "üñí/çødé", "majority"),
):
    tag = short(name).replace("\n", "-").replace("{w}", "w")
    shown = (
        ""
        if name in ("", " ", LONG, RAW, "a\nb", "~", "majority")
        else name.replace("{w}/", "").partition("\\")[0][:7]
    )
    if name != "majority":
        add("name", f"run-{tag}", *RUN, "-t", name, names=shown)
    add("name", f"tokenize-{tag}", *TOKENIZE, "-t", name, names=shown)
    if tag in ("comit-nanoo", "long", "nobody", "empty", "majority"):
        add("name", f"detokenize-{tag}", *DETOKENIZE, "-t", name, names=shown)
        add("name", f"sweep-{tag}", *SWEEP, "-t", name, names=shown)
        add("name", f"cost-{tag}", "cost", name, names=shown)
        add("name", f"fetch-{tag}", "weights", "fetch", name, names=shown)
        for figure, command in FIGURE.items():
            add("name", f"{figure}-{tag}", *command, "-t", name, names=shown)
add("name", "tokenizer-of-hub", *RUN, "-t", "cvg-unibe/comit-l", names="comit-l", codes=frozenset({MISSING}))
add(
    "name",
    "tokenizer-of-hub-offline",
    *RUN,
    "--offline",
    "-t",
    "comit-l",
    names="comit-l",
    codes=frozenset({MISSING}),
)
add("name", "tokenizer-twice-other-case", *RUN, "-t", "comit-nano", "-t", "COMiT-Nano", codes=OK)
for value in (
    "",
    ",",
    " , ",
    "recognition",
    "recognition-scenes,nothing",
    "ALL",
    "all;all",
    LONG,
    "a/b",
    "²",
):
    add("name", f"tasks={short(value)}", *RUN, f"--tasks={value}")
    add("name", f"table-tasks={short(value)}", "table", "{w}/good-records", f"--tasks={value}")
add("name", "tasks=all,all", *RUN, "--tasks", "all,all", codes=OK)
add("name", "tasks-twice", *RUN, "--tasks", "recognition-scenes, recognition-scenes", codes=OK)
for value in ("", "scene", "PAPER", "all", LONG):
    add("name", f"suite={short(value)}", *RUN, f"--suite={value}", names="suite")
for option, values in {
    "--control": ("", "permute", "shuffle_tokens", LONG),
    "--overwrite": ("", "yes", "allways"),
    "--dtype": ("", "float16", "bfloat16", "int8", "float33"),
    "--device": ("", "gpu", "cuda:-1", "cuda:99", "cuda:²", "cpu:7", "mps", "meta", "xpu", "hpu", LONG),
}.items():
    for value in values:
        add(
            "name", f"run{option}={short(value)}", *RUN, "-t", "comit-nano", f"{option}={value}", names=option
        )
for value in ("", "gpu", "meta", "mps", "cuda:99"):
    add("name", f"tokenize-device={short(value)}", *TOKENIZE, f"--device={value}", names="device")
    add("name", f"train-device={short(value)}", *TRAIN, f"--device={value}", names="device")
    add("name", f"figure-device={short(value)}", *FIGURE["edit"], f"--device={value}", names="device")
for value in ("", "random.", NOBODY, LONG, "{w}/a-file", "{w}/a-folder", "/nowhere", "~"):
    add("name", f"weights={short(value).replace('{w}', 'w')}", *RUN, "-t", "comit-nano", f"--weights={value}")
    add(
        "name",
        f"titok-weights={short(value).replace('{w}', 'w')}",
        *RUN,
        "-t",
        "titok-nano",
        f"--weights={value}",
    )
for value in ("", "tokenizer", "x", LONG):
    add("name", f"ls={short(value)}", "ls", value)
for value in ("", "nothing", "mini-coc", LONG, "../mini-coco"):
    for verb in ("build", "show", "download"):
        add("name", f"data-{verb}={short(value)}", "data", verb, value, *MINI)
add(
    "name",
    "show-split",
    "data",
    "show",
    "mini-masks",
    "--data-root",
    "{w}/data",
    *MINI,
    "--split",
    "test",
    names="test",
)
add("name", "reconstruction-show", *FIGURE["reconstruction"], "--show", "ugly", names="ugly")
add("name", "sweep-task", *SWEEP, "--task", "recognition-scenes", names="recognition-scenes")
add("name", "sweep-no-task", *SWEEP, "--task", "nothing", names="nothing")
for value in ("", "me", "me/", "/x", "a/b/c", "me/x y", "me/..", "é/x", LONG):
    add("name", f"push-repo={short(value)}", "push", "{w}/nano", "--repo", value, "--dry-run", names="repo")
for command in ("", "rum", "figure", "data"):
    argv = (command, "nothing") if command in ("figure", "data") else (command,)
    add("name", f"command={short(command)}", *argv)
add("name", "no-such-option", "run", "--tokeniser", "x", names="tokeniser")
add("name", "argument-too-many", "doctor", "x", names="x")

# Paths: of a file where a folder is due, the other way round, and of nothing that can be
PATHS = {
    "empty": "",
    "nobody": NOBODY,
    "long": LONG,
    "name-long": "y" * 300,
    "raw": RAW,
    "below-file": "{w}/a-file/x",
}
FOLDER_IN = {**PATHS, "file": "{w}/a-file", "absent": "/nowhere/at/all"}
FILE_IN = {**PATHS, "folder": "{w}/a-folder", "absent": "/nowhere/at/all"}
FOLDER_OUT = {**PATHS, "file": "{w}/a-file"}
FILE_OUT = {**PATHS, "folder": "{w}/a-folder"}
for tag, value in FOLDER_IN.items():
    add("path", f"tokenize-dir-{tag}", "tokenize", value, "--out", "t.safetensors")
    add("path", f"figure-images-{tag}", *FIGURE["edit"], f"--images={value}")
    add("path", f"push-{tag}", "push", value, "--repo", "me/x", "--dry-run")
    add("path", f"include-{tag}", *RUN, f"--include-path={value}")
    add("path", f"ls-include-{tag}", "ls", "tasks", f"--include-path={value}")
    add("path", f"table-{tag}", "table", value)
    add("path", f"data-root-{tag}", "data", "build", "mini-coco", *MINI, f"--data-root={value}")
    add("path", f"run-data-root-{tag}", *RUN, f"--data-root={value}", "--tasks", "imagenet100")
    add("path", f"doctor-data-root-{tag}", "doctor", f"--data-root={value}")
    add("path", f"figure-sweeps-{tag}", "figure", "sweeps", f"--results={value}")
    add("path", f"train-source-{tag}", *TRAIN, "data.kind=class-folders", f"data.source={value}")
for tag, value in FILE_IN.items():
    add("path", f"detokenize-{tag}", "detokenize", value, "--out", "back")
    add("path", f"validate-{tag}", "validate", value)
    add("path", f"train-config-{tag}", "train", f"--config={value}")
    add("path", f"convert-{tag}", "weights", "convert", "alit-small", value)
for tag, value in FOLDER_OUT.items():
    add("path", f"run-output-{tag}", "run", "--quiet", "-t", "comit-nano", "--tasks", "retrieval-scenes",
        "--limit", "8", "--no-references", f"--output={value}")  # fmt: skip
    add("path", f"sweep-output-{tag}", *SWEEP, f"--output={value}")
    add(
        "path",
        f"figure-output-{tag}",
        *FIGURE["edit"],
        "--images={w}/images",
        "--count=2",
        f"--output={value}",
    )
    add("path", f"table-output-{tag}", "table", "{w}/good-records", f"--output={value}")
    add("path", f"detokenize-out-{tag}", *DETOKENIZE[:2], f"--out={value}")
    add("path", f"train-output-{tag}", *TRAIN, f"output={value}")
    add(
        "path",
        f"show-output-{tag}",
        "data",
        "show",
        "mini-masks",
        "--data-root",
        "{w}/data",
        *MINI,
        f"--output={value}",
    )
for tag, value in FILE_OUT.items():
    add("path", f"tokenize-out-{tag}", *TOKENIZE[:2], f"--out={value}")
add("path", "tokenize-no-images", "tokenize", "{w}/no-images", "--out", "t.safetensors", names="no-images")
add("path", "tokenize-out-in-dir", *TOKENIZE[:2], "--out", "{w}/images/a.png", names="a.png")
add("path", "output-is-data-root", "run", "--quiet", "--limit", "8", "--tasks", "mini-recognition", *MINI,
    "--data-root", "{w}/data", "--output", "{w}/data", names="output")  # fmt: skip
add("path", "table-no-records", "table", "{w}/no-images", names="no-images", codes=frozenset({MISSING}))
for variable in ("COMIT_BENCH_CACHE", "COMIT_BENCH_DATA"):
    for tag, value in {"nobody": NOBODY, "long": LONG, "file": "{w}/a-file", "raw": RAW}.items():
        argv = (
            (*RUN, "-t", "kmeans-patch") if variable.endswith("CACHE") else (*RUN, "--tasks", "imagenet100")
        )
        add("path", f"{variable}-{tag}", *argv, environment=((variable, value),))

# YAML
for name in (*BAD_YAML, *BAD_PLACES):
    if name != "absent":
        add("yaml", f"recipe-{name}", *RUN, "--include-path", "{w}/recipe/" + name, names="task.yaml")
    add(
        "yaml",
        f"validate-{name}",
        "validate",
        f"{{w}}/recipe/{name}/probes/mine/task.yaml",
        names="task.yaml",
    )
    add(
        "yaml",
        f"train-{name}",
        "train",
        "--dry-run",
        "--config",
        f"{{w}}/yaml/{name}.yaml",
        names=f"{name}.yaml",
    )

# JSON: records, checkpoints
for name in (*BAD_JSON, *BAD_PLACES):
    add("json", f"validate-{name}", "validate", f"{{w}}/json/{name}.json", names=f"{name}.json")
    add("json", f"config-{name}", *RUN, "-t", "{w}/config/" + name, names="config.json")
    add(
        "json",
        f"push-{name}",
        "push",
        "{w}/config/" + name,
        "--repo",
        "me/x",
        "--dry-run",
        names="config.json",
    )
for name in bad_world.bad_records():
    add("record", f"validate-{name}", "validate", f"{{w}}/records/{name}/x.json", names="x.json")
    add("record", f"table-{name}", "table", f"{{w}}/records/{name}", names="x.json")
for name in BAD_JSON:
    add("record", f"table-json-{name}", "table", f"{{w}}/records/json-{name}", names="x.json")

# safetensors and pickles
for name in (*BAD_SAFETENSORS, *BAD_PLACES):
    add(
        "safetensors",
        f"run-{name}",
        *RUN,
        "-t",
        "{w}/weights/" + name,
        names="model.safetensors" if name != "absent" else "",
    )
    add("safetensors", f"tokenize-{name}", *TOKENIZE, "-t", "{w}/weights/" + name)
    add(
        "safetensors",
        f"detokenize-{name}",
        "detokenize",
        f"{{w}}/safetensors/{name}.safetensors",
        "--out",
        "b",
        names=name,
    )
for name in BAD_PICKLES:
    add(
        "pickle",
        f"convert-{name}",
        "weights",
        "convert",
        "alit-small",
        f"{{w}}/pickles/{name}.pth",
        names=f"{name}.pth",
    )
    add(
        "pickle",
        f"weights-{name}",
        *RUN,
        "-t",
        "titok-l-32",
        "--weights",
        f"{{w}}/pickles/{name}.pth",
        names=f"{name}.pth",
    )

# Token files
for name in (
    *(
        "cut",
        "changed",
        "format",
        "version",
        "no-version",
        "vocab-text",
        "vocab-digits",
        "vocab-small",
        "vocab-zero",
    ),
    *(
        "vocab-huge",
        "length",
        "length-square",
        "length-negative",
        "no-tokenizer",
        "tokenizer-unknown",
        "tokenizer-long",
    ),
    *("tokenizer-home", "tokenizer-empty", "weights-other", "options-list", "options-broken", "options-deep"),
    *("options-digits", "resolution", "names-list", "names-broken", "names-deep"),
    *(
        "names-digits",
        "names-fewer",
        "names-twice",
        "names-outside",
        "names-absolute",
        "names-nul",
        "names-numbers",
    ),
    *(
        "names-surrogate",
        "names-long",
        "broken-list",
        "ids-float",
        "ids-shape",
        "ids-large",
    ),
    *("ids-negative", "ids-absent", "names-absent", "offsets-nan", "offsets-shape", "codes-too"),
):
    add(
        "tokens",
        name,
        "detokenize",
        f"{{w}}/tokens/{name}.safetensors",
        "--out",
        "back",
        "--quiet",
        names=name,
    )
add("tokens", "of-another", *DETOKENIZE, "-t", "titok-nano", names="titok-nano")

# Data sets, images, annotations, masks, tars, CSV
LOOKS_BAD_ONLY = {"classes-image-is-loop"}
for name, (dataset, _) in bad_world.bad_data().items():
    add("data", name, "data", "build", dataset, *MINI, "--data-root", "{w}/bad-data/" + name, "--quiet")
for name in BAD_IMAGES:
    add(
        "image",
        f"tokenize-{name}",
        "tokenize",
        "{w}/bad-images/" + name,
        "--out",
        "t.safetensors",
        names="x.png",
    )
    add("image", f"figure-{name}", *FIGURE["edit"], "--images", "{w}/bad-images/" + name)
    add("image", f"train-{name}", "train", "--config", "comit-nano", "steps=1", "data.kind=class-folders",
        f"data.source={{w}}/bad-images/{name}")  # fmt: skip
for name in ("cut", "text", "empty"):
    add("image", f"train-tar-{name}", "train", "--config", "comit-nano", "steps=1", "data.kind=webdataset",
        f"data.source={{w}}/tars/{name}.tar", names=f"{name}.tar")  # fmt: skip

# Training settings
for setting in (
    *(
        "steps",
        "=5",
        "steps=",
        "steps=x",
        "steps=0",
        "steps=-1",
        "steps=1.5",
        "steps=nan",
        "steps=.nan",
        "steps=.inf",
    ),
    *(
        "steps=[1",
        "steps=[1]",
        "steps={",
        "steps=*a",
        "steps=&a [*a]",
        "steps=!!python/name:os.system",
        "steps=²",
    ),
    *(
        "steps=2024-13-45",
        "steps=2024-01-01",
        "steps=" + DIGITS,
        "steps=0x" + "f" * 20000,
        "steps=" + "[" * 3000,
    ),
    *(
        "steps=true",
        "seed=x",
        "seed=1.5",
        "seed=" + DIGITS,
        "seed=-1",
        "stepz=5",
        "optim=5",
        "optim.=5",
        ".=5",
        "optim.lr=1",
    ),
    *(
        "optim.learning_rate=nan",
        "optim.learning_rate=inf",
        "optim.learning_rate=1e999",
        "optim.learning_rate=0",
    ),
    *(
        "optim.learning_rate=fast",
        "optim.betas=[0.9]",
        "optim.betas=[nan, 0.9]",
        "optim.betas=0.9",
        "optim.ema=2",
    ),
    *("objective.time_mu=nan", "objective.time_mu=.inf", "objective.time_sigma=0", "objective.skip=-0.1"),
    *(
        "crops.mean=nan",
        "crops.max_crops=10",
        "crops.max_crops=0",
        "crops.sigma=.inf",
        "data.count=0",
        "data.count=1.5",
    ),
    *(
        "data.kind=imagenet",
        "data.kind=hf",
        "data.source=x",
        "data.workers=-1",
        "data.max_broken=nan",
        "data.val_count=1",
    ),
    *(
        "model.preset=comit-x",
        "model.depth=0",
        "model.width=7",
        "model.heads=5",
        "model.fsq_levels=[]",
        "model.fsq_levels=[0]",
    ),
    *(
        "model.fsq_levels=[8, x]",
        "model.fsq_levels=8",
        "model.message_length=" + "9" * 30,
        "model.vocab_size=7",
    ),
    *(
        "model.image_size=7",
        "model.representation_layer=99",
        "model.vae_path=~nobody-at-all/x",
        "teacher.name=none",
    ),
    *(
        "teacher.name=dinov3",
        "teacher.cache_dtype=float16",
        "global_batch=0",
        "device_batch=0",
        "device_batch=7",
    ),
    *(
        "name=",
        "name=a/b",
        "name=../x",
        "name=" + LONG,
        "name=..",
        "output=" + NOBODY,
        "output=",
        "precision=float16",
    ),
    *(
        "precision=bfloat16",
        "sharding=fsdp3",
        "push_to_hub=x",
        "extends=comit-b",
        "kind=other",
        "validation.steps=0",
    ),
    *(
        "validation.guidance=nan",
        "validation.pictures=99",
        "export.dtype=int8",
        "tensorboard=perhaps",
        "name=" + RAW,
    ),
):
    text = setting if len(setting) < 60 else f"{setting[:20]}-long"
    add("train", text.replace(RAW, "raw"), *TRAIN, setting, names=setting.partition("=")[0].split(".")[-1])
for setting in (
    "steps=0",
    "width=7",
    "image_size=33",
    "patch=0",
    "dim=0",
    "learning_rate=nan",
    "count=1",
    "seed=x",
):
    add("train", f"teacher-{setting}", "train", "--config", "scenes-teacher", "--dry-run", setting)
for setting in (
    "batch=1",
    "model=other",
    "codebook_weight=nan",
    "commitment=-1",
    "restart_every=5",
    "optim.ema=0.9",
):
    add("train", f"grid-{setting}", "train", "--config", "vq-grid-nano", "--dry-run", setting,
        names=setting.partition("=")[0].split(".")[-1])  # fmt: skip
add("train", "no-config", "train", names="config")
add("train", "config-unknown", "train", "--config", "comit-nan", names="comit-nan")
for value in ("", "nothing", "/nowhere", "{w}/a-file", "{w}/a-folder", NOBODY, LONG):
    add(
        "train",
        f"resume={short(value).replace('{w}', 'w')}",
        "train",
        "--config",
        "comit-nano",
        "steps=1",
        f"--resume={value}",
    )

# Recipes by content
RECIPE = "name: {name}\nversion: 1\ntitle: t\nkind: retrieval\nsuite: extra\ndataset: scenes-recognition\n"
RECIPES = {
    "version-zero": RECIPE.format(name="mine").replace("version: 1", "version: 0"),
    "version-text": RECIPE.format(name="mine").replace("version: 1", "version: one"),
    "version-half": RECIPE.format(name="mine").replace("version: 1", "version: 1.5"),
    "version-true": RECIPE.format(name="mine").replace("version: 1", "version: true"),
    "unknown-key": RECIPE.format(name="mine") + "colour: red\n",
    "near-key": RECIPE.format(name="mine") + "retrievals: {}\n",
    "foreign-section": RECIPE.format(name="mine") + "probe: {width: 8}\n",
    "other-name": RECIPE.format(name="yours"),
    "name-slash": RECIPE.format(name="a/b"),
    "name-empty": RECIPE.format(name="''"),
    "name-number": RECIPE.format(name="5"),
    "name-control": RECIPE.format(name='"mi\\u001bne"'),
    "name-date": RECIPE.format(name="2024-01-01"),
    "kind-unknown": RECIPE.format(name="mine").replace("retrieval", "retrievall"),
    "dataset-unknown": RECIPE.format(name="mine").replace("scenes-recognition", "nothing"),
    "dataset-kind": RECIPE.format(name="mine").replace("scenes-recognition", "scenes-pairs"),
    "title-empty": RECIPE.format(name="mine").replace("title: t", "title: ''"),
    "title-lines": RECIPE.format(name="mine").replace("title: t", 'title: "a\\nb"'),
    "seeds-zero": RECIPE.format(name="mine") + "seeds: 0\n",
    "seeds-many": RECIPE.format(name="mine") + "seeds: 1e3\n",
    "split-absent": RECIPE.format(name="mine") + "split: {report: test}\n",
    "k-text": RECIPE.format(name="mine") + "retrieval: {k: [one]}\n",
    "k-zero": RECIPE.format(name="mine") + "retrieval: {k: [0]}\n",
    "k-empty": RECIPE.format(name="mine") + "retrieval: {k: []}\n",
    "k-larger-than-data": RECIPE.format(name="mine") + "retrieval: {k: [999999999]}\n",
    "extends-itself": RECIPE.format(name="mine") + "extends: mine\n",
    "main-metric": RECIPE.format(name="mine") + "main_metric: beauty\n",
}
LATE = ("main-metric", "k-larger-than-data")  # only the data show that these are wrong
for name in RECIPES:
    add("recipe", name, "run", "--quiet", *([] if name in LATE else ["--dry-run"]), "--no-references",
        "-t", "comit-nano", "--tasks", "mine", "--limit", "8", "--include-path", "{w}/by-content/" + name,
        names="mine")  # fmt: skip
    if name in LATE:
        continue
    add(
        "recipe",
        f"validate-{name}",
        "validate",
        f"{{w}}/by-content/{name}/probes/mine/task.yaml",
        names="mine",
    )
add(
    "recipe",
    "defined-before",
    *RUN,
    "--include-path",
    "{w}/by-content/defined-before",
    names="retrieval-scenes",
)
for name, text in {
    "extends-unknown": "extends: nothing\n",
    "extends-list": "extends: [a]\n",
    "extends-map": "extends: {a: 1}\n",
    "extends-self": "extends: extends-self\n",
    "extends-deep": "extends: comit-b-no-srepa\n",
    "section-list": "extends: comit-nano\noptim: [1]\n",
    "section-text": "extends: comit-nano\noptim: x\n",
    "section-none": "extends: comit-nano\noptim:\n",
    "kind-list": "kind: [a]\n",
}.items():
    RECIPES[f"train {name}"] = text
    add(
        "recipe",
        f"train-{name}",
        "train",
        "--dry-run",
        "--config",
        f"{{w}}/by-content/{name}.yaml",
        names=name,
    )

# No home, no network, launchers
add("machine", "rank-half", *RUN, environment=(("WORLD_SIZE", "2"),))
for value in ("", "x", "0", "-1", "1.5", DIGITS):
    add("machine", f"world={short(value)}", *RUN, environment=(("WORLD_SIZE", value), ("RANK", "0")))
add("machine", "rank-out-of-range", *RUN, environment=(
    ("WORLD_SIZE", "2"), ("RANK", "5"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")))  # fmt: skip
add("machine", "fetch-offline", "weights", "fetch", "alit-small", names="alit-small")
add("machine", "fetch-hub-offline", "weights", "fetch", "comit-l", names="comit-l")
add("machine", "fetch-url", "weights", "fetch", "alit-small", "--url", "not a url", names="not a url")
add(
    "machine",
    "fetch-url-file",
    "weights",
    "fetch",
    "alit-small",
    "--url",
    "file:///etc/passwd",
    names="file:",
)
add(
    "machine",
    "download-offline",
    "data",
    "download",
    "mscoco-pairs",
    "--data-root",
    "d",
    names="annotations_trainval2017",
)
add("machine", "download-no-root", "data", "download", "mscoco-pairs", names="data-root")
add(
    "machine",
    "paper-suite-without-data",
    *RUN,
    "--suite",
    "paper",
    names="data-root",
    codes=frozenset({MISSING}),
)

# The same by real processes: no server, no fork
OF_THEIR_OWN = [
    "whole-run--batch-size=²",
    "whole-run-limit-larger-than-data",
    "number-sweep-steps=nan",
    "option-run-no-sign",
    "option-run-surrogate",
    "policy-run-raster:0",
    "name-run-nobody",
    "name-run-long",
    "name-tasks=recognition",
    "name-run--device=meta",
    "path-tokenize-dir-absent",
    "path-detokenize-folder",
    "yaml-recipe-laughs",
    "yaml-recipe-deep-list",
    "yaml-train-digits",
    "json-config-deep-list",
    "record-table-value-nan",
    "safetensors-run-long-header",
    "tokens-names-outside",
    "train-steps=.nan",
    "machine-world=x",
    "image-tokenize-bomb",
    "data-tar-cut",
    "recipe-extends-itself",
]
REAL = tuple(case for case in CASES if case.id in OF_THEIR_OWN)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    bad_world.build(folder)
    for name, text in RECIPES.items():
        if name.startswith("train "):
            bad_world.write(folder / "by-content" / f"{name.removeprefix('train ')}.yaml", text)
        else:
            bad_world.write(folder / "by-content" / name / "probes" / "mine" / "task.yaml", text)
            bad_world.write(folder / "by-content" / name / "probes" / "mine" / "README.md", "# words\n")
    again = folder / "by-content/defined-before/probes/retrieval-scenes"
    bad_world.write(again / "task.yaml", RECIPE.format(name="retrieval-scenes"))
    return folder


@pytest.fixture(scope="module")
def commands(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    home = tmp_path_factory.mktemp("home")
    environment = {"HOME": str(home), "COMIT_BENCH_CACHE": str(home / "cache"), "HF_HOME": str(home / "hf")}
    with Commands(environment) as server:
        made = server.run(
            ("tokenize", f"{world}/images", "--out", f"{world}/tokens.safetensors", "--quiet"), home
        )
        assert made.code == 0, made.err
        bad_world.build_tokens(world, world / "tokens.safetensors")
        # embedded data are made once, so that no case waits for them
        for name in ("scenes-recognition", "scenes-objectness", "scenes-counterfactual"):
            made = server.run(("data", "build", name, "--quiet", "--no-check-images"), home, timeout=120)
            assert made.code == 0, made.err
        yield server


def filled(text: str, world: Path) -> str:
    return text.replace("{w}", str(world))


def messages(text: str) -> list[str]:
    """Lines that say an error."""
    return [line for line in text.splitlines() if re.match(r"(error|missing|failed|BAD)\b", line, re.I)]


def complaints(case: Case, ended: Ended) -> list[str]:
    """What is wrong about how a command ended; empty when nothing is."""
    everything = f"{ended.err}\n{ended.out}"
    found = []
    if ended.code is None:
        found.append("did not end in time")
    elif ended.code not in case.codes:
        found.append(f"exit code {ended.code}, expected one of {sorted(case.codes)}")
    if "Traceback" in everything:
        found.append("a traceback")
    if ended.code and len([line for line in messages(everything) if line.lower().startswith("error")]) > 1:
        found.append("more than one error")
    if ended.code and case.codes != OK and not messages(everything):
        found.append("no line that says the error")
    if any(words in everything for words in UNEXPECTED):
        found.append("caught by the last net only")
    if ended.code and case.codes != OK and case.names and case.names not in everything:
        found.append(f"does not name {case.names!r}")
    return found


def check(case: Case, ended: Ended) -> None:
    wrong = complaints(case, ended)
    assert not wrong, f"{case.id}: {'; '.join(wrong)}\n{ended.err[-1500:]}\n{ended.out[-500:]}"


def test_there_are_enough_cases_and_every_id_is_one() -> None:
    ids = [case.id for case in CASES]
    assert len(ids) == len(set(ids)) >= 300
    assert len(REAL) == len(OF_THEIR_OWN) >= 20


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id[:80])
def test_bad_input(case: Case, commands: Commands, world: Path, tmp_path: Path) -> None:
    argv = [filled(part, world) for part in case.argv]
    environment = {name: value and filled(value, world) for name, value in case.environment}
    check(
        case,
        commands.run(
            argv,
            tmp_path,
            entry=case.entry,
            environment=environment,
            timeout=float(os.environ.get("CASE_SECONDS", "60")),
        ),
    )


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.id[:80])
def test_the_same_in_a_process_of_its_own(
    case: Case, commands: Commands, world: Path, tmp_path: Path
) -> None:
    program = [sys.executable, "-c", "from comit_bench.commands.app import main; main()"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {name: filled(value, world) for name, value in case.environment if value is not None}
    done = subprocess.run(
        program + [filled(part, world) for part in case.argv],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=180,
        check=False,
    )
    out, err = (stream.decode("utf-8", "backslashreplace") for stream in (done.stdout, done.stderr))
    check(case, Ended(done.returncode, out, err, 0.0))
