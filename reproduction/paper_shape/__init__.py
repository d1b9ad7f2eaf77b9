"""Memory and time of PEMA and of other methods, at the shape of the paper's PLM."""
