"""The life of a request: acquire its cached prefix and its blocks, commit what it computes, release it."""
