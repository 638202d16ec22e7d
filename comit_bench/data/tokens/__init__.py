"""Messages on disk: the token store of the cache, and token files."""
