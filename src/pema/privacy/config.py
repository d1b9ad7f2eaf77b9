"""Defaults of the audit, the same in Python and on the command line."""

REFERENCES = 8
"""Number of reference adapters for the strongest attack."""
