"""The tables of `million_pairs`."""

from __future__ import annotations

from reproduction.paths import RESULTS

FILE = RESULTS / "million_pairs.jsonl"
