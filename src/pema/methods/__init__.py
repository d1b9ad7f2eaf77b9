"""PEMA and the methods it is compared with, with one interface."""
