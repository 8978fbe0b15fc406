"""Values and small helpers that every room may import."""
