"""A memory of a million pairs of a PLM of OPT-1.3B's width and vocabulary: time, memory and loss of every stage."""
