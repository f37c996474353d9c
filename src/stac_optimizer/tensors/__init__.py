"""Tensors without rules: layouts, precision, pieces that stay in cache, 8-bit codes, rounding."""
