"""One source per assignment, py:percent: text, marked solutions, and cells that stay here."""
