"""The embedded world: scenes that are painted from a seed and written in official formats."""
