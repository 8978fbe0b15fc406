"""Which blocks this process holds, under which parent, and in which order blocks are evicted."""
