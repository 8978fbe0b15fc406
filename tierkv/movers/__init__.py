"""What moves the bytes of blocks: between tiers, compressed or raw, and between engines' pools and blocks."""
