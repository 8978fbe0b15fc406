"""Attention backends: torch, flash-attn 2 and FlashInfer behind one Protocol, and the choice of one per shape."""
