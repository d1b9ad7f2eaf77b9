"""Everything behind the numbers in README and docs: what is run, what it found, and the pages made from that.

`python -m reproduction` writes every page from the committed results; `docs/reproduction.md` says which command makes
which number.
"""
