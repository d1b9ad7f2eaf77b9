"""Pages: the report of experiments and the inspector of one generation, each one HTML file that loads nothing."""
