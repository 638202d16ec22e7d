"""vq-grid, a small tokenizer of our own whose tokens have places: what there is of it."""

from __future__ import annotations

from comit_bench.tokenizers.family import Family, Preset, Shipped

FAMILY = Family(
    name="vq-grid",
    loader="comit_bench.tokenizers.vq_grid.adapter:load",
    presets=(
        Preset(
            name="vq-grid-nano",
            source=Shipped(),
            parameters=0.49,
            message_length=16,
            vocab_size=1000,
            sizes={
                "model.image_size": 32,
                "model.width": 64,
                "model.depth": 2,
                "model.inner_width": 96,
                "model.fsq_levels": [8, 5, 5, 5],
            },
        ),
    ),
)
