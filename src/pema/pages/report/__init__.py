"""The report: one HTML page of the results of comparisons and sweeps."""
