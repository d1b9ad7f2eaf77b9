"""Memory and time of PEMA and of what it is compared with, at the shape of the paper's PLM."""
