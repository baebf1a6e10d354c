"""Rosters, file names and grade tables of Canvas, Moodle and GitHub Classroom, as documented.

What such a system exports is the roster, and what is graded goes back into the same table: every
other column and row stays as it came, so the system takes it for its own.
"""
