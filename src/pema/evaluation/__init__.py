"""Metrics, each with its signature; perplexity; paired significance tests; aligned output files."""
