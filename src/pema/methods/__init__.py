"""PEMA and the methods it is compared with, behind one interface."""
