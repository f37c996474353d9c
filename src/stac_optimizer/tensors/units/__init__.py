"""Units of work: how an elementwise update is cut into pieces, and which threads run them."""
