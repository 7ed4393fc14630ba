"""Scores of a split, the same on any number of ranks."""
