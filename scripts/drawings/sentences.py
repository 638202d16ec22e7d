"""Make the table of sentence vectors: ``python scripts/drawings/sentences.py MODEL``. Development only.

MODEL is a folder with all-MiniLM-L6-v2 as it was published (config.json, model.safetensors,
tokenizer.json; Apache-2.0). A text's vector is the mean of its last states at unit length, as the model
is meant to be used. The table holds the concepts of the drawings and the predicates of relations.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

from comit_bench.data.scenes.atlas import load_drawings
from comit_bench.data.scenes.formats import PREDICATES
from comit_bench.files import sha256_file
from comit_bench.nn.text import mean_states
from comit_bench.tasks.text import TABLE_FILE


def main() -> None:
    """Encode the texts one by one and write the table."""
    parser = argparse.ArgumentParser(prog="sentences", description=__doc__)
    parser.add_argument("model", type=Path)
    folder = parser.parse_args().model
    texts = sorted({*load_drawings().concepts, *PREDICATES})
    pieces = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).float().eval()
    states = []
    for text in texts:
        made = pieces([text], return_tensors="pt")
        states.append(mean_states(model, made["input_ids"], made["attention_mask"].bool()))
    vectors = torch.nn.functional.normalize(torch.cat(states), dim=-1).half()
    source = {"model": "all-MiniLM-L6-v2", "weights": sha256_file(folder / "model.safetensors")}
    save_file({"vectors": vectors}, TABLE_FILE, {"texts": json.dumps(texts), **source})
    sys.stderr.write(f"{TABLE_FILE}: {len(texts)} texts, {TABLE_FILE.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
