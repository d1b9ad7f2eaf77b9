"""Replicas of a PLM on a Ray cluster, which build memories, generate texts and choose labels."""
