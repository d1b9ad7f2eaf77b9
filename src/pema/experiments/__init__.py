"""Experiments: comparisons and sweeps from one description, and their results with signatures."""
