"""Networks and their mathematics: no printing, no files but a teacher's weights, no imports but models."""
