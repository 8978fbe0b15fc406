"""The life of a request: its cached prefix is found, it is admitted, its blocks are registered, it is released."""
