"""What grading writes: the grade list, a page for each student, the class at a glance."""
