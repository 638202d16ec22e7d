"""Training COMiT: objective, crop sampling, schedule, loop. ``python -m comit_bench.train`` is the way in."""
