"""Engines that keep K and V in memory of their own, each with tierkv's warm and cold tiers below it."""
