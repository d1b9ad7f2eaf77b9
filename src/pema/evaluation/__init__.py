"""Metrics with signatures, perplexity, paired significance tests, and aligned output files."""
