"""Metrics, each with its signature; perplexity; paired significance; aligned outputs on the disk."""
