"""The real training step and its levers: what a forecast runs is what a run runs."""
