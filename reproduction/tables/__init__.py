"""The tables in README and docs, made from committed results."""
