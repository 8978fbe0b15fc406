"""Immutable blocks of one namespace below the engine's own memory: the seam for engines that own their KV tensors."""
