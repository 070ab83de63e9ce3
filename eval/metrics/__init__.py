"""Metrics: what an answer is worth, by its text; one family a file."""
