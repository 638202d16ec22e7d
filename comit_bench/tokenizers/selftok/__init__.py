"""SelfTok."""
