"""Sparse decode, opt in: a decoding sequence reads the pages that its query wants, not all of its K and V."""
