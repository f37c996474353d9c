"""Foreign optimizers in a role."""
