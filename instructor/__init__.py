"""What a class needs: assignments, their builder, the grader. Students never install it."""
