"""Reader processes: they decode cold records into shared memory, and encode new ones, beside the interpreter's lock."""
