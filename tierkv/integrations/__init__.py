"""Engines that use tierkv as it is used from their own code: one module or package for each, which imports the engine."""
