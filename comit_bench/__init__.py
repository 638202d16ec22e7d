"""comit_bench: what do the tokens of 1D discrete image tokenizers mean?

The public Python surface is four functions, imported on first use so that ``--help`` stays fast:

- :func:`load_tokenizer`: name, hub id or directory -> tokenizer;
- :func:`evaluate`: tokenizer x tasks -> records;
- :func:`build_table`: records -> table;
- :func:`compare`: names of rows -> paired tests between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "build_table", "compare", "evaluate", "load_tokenizer"]

if TYPE_CHECKING:
    from comit_bench.pipeline.evaluate import evaluate as evaluate
    from comit_bench.results.compare import compare as compare
    from comit_bench.results.table import build_table as build_table
    from comit_bench.tokenizers.load import load_tokenizer as load_tokenizer

_LAZY = {
    "build_table": "comit_bench.results.table",
    "compare": "comit_bench.results.compare",
    "evaluate": "comit_bench.pipeline.evaluate",
    "load_tokenizer": "comit_bench.tokenizers.load",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'comit_bench' has no attribute {name!r}")
