"""Training of language models that the project ships."""
