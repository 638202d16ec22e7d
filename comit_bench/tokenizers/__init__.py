"""One adapter per tokenizer family; ``loading.load_tokenizer`` is the one way in."""
