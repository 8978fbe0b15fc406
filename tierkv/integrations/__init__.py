"""Engines that keep K and V in memory of their own, each with tierkv below it. Each imports its engine when used."""
