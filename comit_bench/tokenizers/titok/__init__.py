"""TiTok."""
