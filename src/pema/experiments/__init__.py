"""Experiments: one setting in, one result with its signature out."""
