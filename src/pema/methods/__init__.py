"""PEMA and what it is compared with, on one contract."""
