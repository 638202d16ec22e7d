"""``python -m comit_bench.train``."""

from comit_bench.commands.train import main

if __name__ == "__main__":
    main()
