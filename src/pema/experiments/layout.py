"""Names of the files in the results folder of an experiment."""

from __future__ import annotations

import re

EXPERIMENT = "experiment.json"
"""File of the facts common to all runs."""

COMPARISON = "comparison.json"
"""File of the comparison of the runs on the test examples."""

TEST = "examples.jsonl"
"""File of the test examples."""

COMET = "comet"
"""Folder of the scores written by `reproduction/comet_score.py`."""

LONGEST_NAME = 200
"""Maximum length of a run's name: file systems allow 255 bytes, including the suffix."""


def run_name(label: str, seed: int) -> str:
    """Return the name of a run's files: its label in lower-case letters, digits and `.=+`, and its seed."""
    return f"{re.sub(r'[^a-z0-9.=+]+', '-', label.lower()).strip('-')}-seed{seed}"
