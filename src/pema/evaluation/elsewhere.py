"""Scores computed in another environment: COMET needs transformers 4, so `reproduction/comet_score.py` runs it there.

A score file is JSON: `metric`, the scores of the `segments`, a `signature`, and the SHA-256 of the scored texts
(`hypotheses_sha256`, `references_sha256`, each over the lines joined by line feeds). It is valid for those texts only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pema.errors import DataError
from pema.evaluation.score import Array, Reference, all_valid, require_aligned
from pema.files import read_json


@dataclass(frozen=True)
class _File:
    metric: str
    segments: Array
    signature: str
    hypotheses: str
    references: str


class ExternalScores:
    """Metric that is the mean of segment scores read from files, one file per system."""

    def __init__(self, paths: Iterable[str | Path]) -> None:
        """Read the files.

        Raises:
            DataError: no file is given, one is not a score file, or the files contain different metrics.
        """
        self.paths = tuple(Path(path) for path in paths)
        files = [_read(path) for path in self.paths]
        metrics = sorted({file.metric for file in files})
        if len(metrics) != 1:
            raise DataError(
                f"the score files contain different metrics, {' and '.join(metrics)}: give files of one metric."
                if metrics
                else "no score file is given: give one per system."
            )
        signatures = sorted({file.signature for file in files})
        if len(signatures) > 1:
            raise DataError(
                f"the scores have different signatures, {' and '.join(signatures)}: score all systems with the same "
                "settings."
            )
        (self.name,), (self._signature,) = metrics, signatures
        self._files = {file.hypotheses: file for file in files}

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Reference]) -> Array:
        """Return (n, 2): the score of each segment, and 1 as its count.

        The other environment scores against one reference, the first of each segment.

        Raises:
            DataError: no file scores these hypotheses, or the file scores them against other references.
        """
        file = self._files.get(digest(hypotheses))
        if file is None or file.references != digest([texts[0] for texts in all_valid(references)]):
            what = "hypotheses" if file is None else "references"
            raise DataError(
                f"{self.name} was computed on other {what} ({', '.join(map(str, self.paths))}): score these again with "
                "reproduction/comet_score.py."
            )
        require_aligned(hypotheses=hypotheses, scores=[""] * len(file.segments))
        return np.stack([file.segments, np.ones(len(file.segments))], 1)

    def value(self, totals: Array) -> float:
        """Return the mean over the segments."""
        return float(totals[0] / totals[1])

    def signature(self, totals: Array) -> str:
        """Return the signature in the files."""
        return f"{self._signature}|n:{int(totals[1])}"


def digest(texts: Sequence[str]) -> str:
    """Return the SHA-256 of texts, one per line."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _read(path: Path) -> _File:
    try:
        content: dict[str, Any] = read_json(path)
        segments = np.array(content["segments"], np.float64)
        texts = [content[key] for key in ("metric", "signature", "hypotheses_sha256", "references_sha256")]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is not a score file ({error!r}): write it with reproduction/comet_score.py."
        ) from error
    if segments.ndim != 1 or not len(segments) or not np.isfinite(segments).all() or set(map(type, texts)) != {str}:
        raise DataError(
            f"{path} is not a score file (one finite number per segment): write it with reproduction/comet_score.py."
        )
    return _File(texts[0], segments, texts[1], texts[2], texts[3])
