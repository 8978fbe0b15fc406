"""Blocks on their way between the tiers: found, loaded, written down, and observed."""
