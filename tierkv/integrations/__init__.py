"""Adapters that let other engines keep their KV in tierkv. Each module imports its engine only when it is used."""
