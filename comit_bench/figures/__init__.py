"""Figures of messages. Every module computes arrays (``compute``) and draws them (``draw``); none prints.

Every ``compute`` of a tokenizer takes images of ``inputs.load_inputs``, a cropping policy (None is the
tokenizer's own) and a seed of all noise. It raises ``UnsupportedOperation`` where a tokenizer cannot do
what is shown, and ``UsageError`` for settings out of range.
"""
