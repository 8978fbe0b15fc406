"""Reader processes: they read, check and decode cold records into shared memory, beside the interpreter's lock."""
