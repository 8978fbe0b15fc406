"""What runs a model over the cache: attention, decoding, CUDA graphs, prompts."""
