"""What all wrappers are: one optimizer with the one that they wrap, its checkpoints, what it refuses."""
