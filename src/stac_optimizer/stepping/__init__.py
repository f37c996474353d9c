"""What is asked before a step, what is done around rules, and gradient release."""
