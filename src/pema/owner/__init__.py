"""The PLM owner: everything that touches PLM weights, behind one contract."""
