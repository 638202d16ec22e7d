"""Recipes: what ``task.yaml`` and ``dataset.yaml`` may say, and how YAML and JSON are read."""
