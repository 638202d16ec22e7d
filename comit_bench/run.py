"""``python -m comit_bench.run``: images in on one side, a table out on the other. Read this file first.

dataset -> tokenizer -> tokens -> task -> record -> table

    commands/     what is typed, and what is printed
    pipeline/     from names to records: jobs, plan, evaluate; one job is one line there
    data/         official formats, or embedded scenes that are made on the spot
    tokenizers/   uint8 images -> message (ids, codes); one folder per paper
    data/tokens/  messages on disk, computed once
    tasks/        one module per kind: probes (fitted in probing/) and what is seen without one
    results/      one JSON file per tokenizer x task x protocol, and tables over them

Start with ``commands/run.py``, then ``pipeline/evaluate.py``. Under ``torchrun`` or ``accelerate launch`` all
processes make tokens and the first does the rest.
"""

from comit_bench.commands.app import main_run

if __name__ == "__main__":
    main_run()
