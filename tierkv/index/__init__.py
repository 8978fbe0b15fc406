"""The index of the blocks in memory: the tree, the places, and the eviction order."""
