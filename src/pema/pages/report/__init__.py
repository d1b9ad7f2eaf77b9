"""The report: one HTML page made from the result folders of comparisons and sweeps."""
