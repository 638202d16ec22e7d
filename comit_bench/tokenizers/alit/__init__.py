"""ALIT."""
