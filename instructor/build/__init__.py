"""What is handed out: notebooks, the answer key, the archive for students."""
