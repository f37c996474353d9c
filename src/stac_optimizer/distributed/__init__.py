"""Several ranks: shards, whether ranks agree, and votes."""
