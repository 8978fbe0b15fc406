"""Ranks of a model that is split over several GPUs: they agree on the cached tokens that all of them loaded."""
