"""A deletion request: its state, the purge of bytes, the search for what remains, and the certificate."""
