"""Replicas of a PLM on a Ray cluster, which build memories and generate texts."""
