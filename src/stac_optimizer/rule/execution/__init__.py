"""How a rule is run: what is done around every update, whole parameters and rows put together from parts."""
