"""What STAC knows of a model: its layers, which parameters selectors choose, the split. Knows no optimizer."""
