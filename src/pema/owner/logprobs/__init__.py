"""A PLM of which only log-probabilities are known: its head is recovered from them once, then f at each step."""
