"""Multi-latent attention (MLA): the latent of DeepSeek models in the cache, in place of K and V of every head."""
