"""Real data as files, and data that the project makes itself."""
