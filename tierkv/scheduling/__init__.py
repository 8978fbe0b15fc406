"""Scheduling: which requests run, what each computes next, and which one makes room for another. No model, no bytes."""
