"""STAC's two roles: how arguments become groups, overrides, and foreign optimizers that update a role."""
