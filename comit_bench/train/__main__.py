"""``python -m comit_bench.train``."""

from comit_bench.train.command import main

if __name__ == "__main__":
    main()
