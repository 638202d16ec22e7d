"""Networks and their mathematics. No files, no printing, no imports of ours but models."""
