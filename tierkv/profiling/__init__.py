"""What watches the memory of a cache and tells of it: tracker, profiler, reports, metrics."""
