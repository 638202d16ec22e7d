"""Small sets of drawings."""

from __future__ import annotations

from typing import Any

from comit_bench.data.scenes.painting import EDITS
from comit_bench.recipes.specs import GeneratorSpec

LAYOUTS = ("recognition", "pairs", "relations", "objectness", "counterfactual")
SIDE = 64


def spec_of(layout: str, **settings: Any) -> GeneratorSpec:
    one_split = layout in ("objectness", "counterfactual")
    counts = {"train": 0 if one_split else 12, "val": len(EDITS) if layout == "counterfactual" else 12}
    content = {"name": "drawings", "layout": layout, "image_size": SIDE, **counts, **settings}
    return GeneratorSpec.model_validate(content)
