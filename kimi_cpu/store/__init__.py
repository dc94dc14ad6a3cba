"""Checkpoints on disk: validated, memory-mapped, read in place."""
