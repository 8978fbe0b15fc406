"""Observability of a cache's memory, and its control: tracker, profiler, reports, metrics, controller."""
