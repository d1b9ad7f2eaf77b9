"""Tasks: examples, prompt templates, and the readers of data files."""
