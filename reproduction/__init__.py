"""Code and results behind the numbers in README and docs, and the pages generated from them.

`python -m reproduction` writes every page from the committed results; `docs/reproduction.md` says which command makes
which number.
"""
