"""Warm and cold tiers that a daemon has, as a cache uses them."""
