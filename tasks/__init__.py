"""How each step is done: one folder per family, one file per method."""
