"""What a step will need: the real step on fake tensors, replayed as a GPU would."""
