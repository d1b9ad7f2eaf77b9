"""Names of what lies in the results folder of an experiment beside its runs."""

from __future__ import annotations

import re

EXPERIMENT = "experiment.json"
"""What all runs have in common."""

COMPARISON = "comparison.json"
"""Their comparison on the test examples."""

TEST = "examples.jsonl"
"""The test examples."""

COMET = "comet"
"""Folder of the scores that `reproduction/comet_score.py` leaves."""

LONGEST_NAME = 200
"""Characters of a run's name at most: file systems take 255 bytes, and an ending comes behind it."""


def run_name(label: str, seed: int) -> str:
    """The name of a run's files: its label in small letters, digits and `.=+`, and its seed."""
    return f"{re.sub(r'[^a-z0-9.=+]+', '-', label.lower()).strip('-')}-seed{seed}"
