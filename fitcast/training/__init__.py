"""Runs: before them, through them, after them; and what survives when one is killed."""
