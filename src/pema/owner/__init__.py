"""The PLM owner: all code that accesses PLM weights, behind one contract."""
