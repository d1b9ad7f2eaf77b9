"""Sources of PLMs: their names, packages with weights, and GGUF files, which are converted once."""
