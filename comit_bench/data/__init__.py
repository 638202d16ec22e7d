"""Readers of official dataset formats, the embedded scenes, and the token store."""
