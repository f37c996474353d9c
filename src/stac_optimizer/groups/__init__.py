"""What parameter groups hold, how they are checked, and how checkpoints are loaded into them."""
