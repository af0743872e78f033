"""Measuring: what a model draws, how it describes, and how sure the numbers are."""
