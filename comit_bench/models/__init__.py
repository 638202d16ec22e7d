"""Networks and their mathematics. No printing, no files but a teacher's weights, no imports of ours but models."""
