"""The inspector: which distribution decided each generated token, on one self-contained page."""
