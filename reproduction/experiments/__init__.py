"""Experiments that are more than a config for `pema compare` or `pema sweep`."""
