"""The inspector: a self-contained page that shows which distribution decided each generated token."""
