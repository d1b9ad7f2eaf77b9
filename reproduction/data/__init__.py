"""Real data as files, and synthetic data of the project."""
