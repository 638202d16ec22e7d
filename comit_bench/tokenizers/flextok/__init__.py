"""FlexTok."""
