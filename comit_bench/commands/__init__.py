"""The command line: one module per command of ``comit-bench``, shared options, the console."""
