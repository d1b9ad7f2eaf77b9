"""Names of what lies in the results folder of an experiment beside its runs."""

from __future__ import annotations

EXPERIMENT = "experiment.json"
"""What all runs have in common."""

COMPARISON = "comparison.json"
"""Their comparison on the test examples."""

TEST = "examples.jsonl"
"""The test examples."""

COMET = "comet"
"""Folder of the scores that `reproduction/comet_score.py` leaves."""
