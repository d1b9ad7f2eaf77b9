"""Pages: the report of experiments and the inspector of one generation, each a self-contained HTML file."""
