"""What is taught: examples, the prompt templates that hold them, the files they are read from, and the tasks."""
