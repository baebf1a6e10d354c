"""Counting: who holds which byte of a step, since when, until when."""
