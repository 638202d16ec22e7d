"""Figures of messages. Every module computes arrays (``compute``) and draws them (``draw``); none prints."""
