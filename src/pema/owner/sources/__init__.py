"""Where PLMs come from: their names, packages with weights, and GGUF files, which are converted once."""
