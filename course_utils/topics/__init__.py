"""One instrument a topic of the lessons: what a lesson counts, runs or breaks on purpose."""
