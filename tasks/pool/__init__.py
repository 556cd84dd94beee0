"""Pool: a source in, a dataset out, with the bad rows set aside."""
