"""From what came back to points: whose it is, what it answered, what that earns."""
