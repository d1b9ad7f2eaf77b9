"""The tables in README and docs, generated from committed results."""
