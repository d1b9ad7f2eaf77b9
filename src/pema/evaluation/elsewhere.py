"""Scores that another environment gave: COMET needs transformers 4, so `reproduction/comet_score.py` runs it apart.

Such a file is JSON: `metric`, the `segments`' scores, a `signature`, and the SHA-256 of the texts that were scored
(`hypotheses_sha256`, `references_sha256`, each over the lines joined by line feeds). It belongs to those texts only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pema.errors import DataError
from pema.evaluation.score import Array, require_aligned
from pema.files import read_json


@dataclass(frozen=True)
class _File:
    metric: str
    segments: Array
    signature: str
    hypotheses: str
    references: str


class ScoredElsewhere:
    """The mean of the segments' scores in files, one file a system, on the contract of a metric."""

    def __init__(self, paths: Iterable[str | Path]) -> None:
        """Read the files.

        Raises:
            DataError: there is none, one is not such a file, or they hold different metrics.
        """
        self.paths = tuple(Path(path) for path in paths)
        files = [_read(path) for path in self.paths]
        metrics = sorted({file.metric for file in files})
        if len(metrics) != 1:
            raise DataError(
                f"scores of one metric belong together, and these are of {' and '.join(metrics)}."
                if metrics
                else "no file of scores is given."
            )
        signatures = sorted({file.signature for file in files})
        if len(signatures) > 1:
            raise DataError(f"these scores were made in different ways: {' and '.join(signatures)}. Score all alike.")
        (self.name,), (self._signature,) = metrics, signatures
        self._files = {file.hypotheses: file for file in files}

    def statistics(self, hypotheses: Sequence[str], references: Sequence[str]) -> Array:
        """The score of each segment and 1, which counts it: (n, 2).

        Raises:
            DataError: no file scores these hypotheses, or it does so against other references.
        """
        file = self._files.get(digest(hypotheses))
        if file is None or file.references != digest(references):
            what = "hypotheses" if file is None else "references"
            raise DataError(
                f"these are not the {what} that {self.name} was computed on ({', '.join(map(str, self.paths))}): score "
                "them again with reproduction/comet_score.py."
            )
        require_aligned(hypotheses=hypotheses, scores=[""] * len(file.segments))
        return np.stack([file.segments, np.ones(len(file.segments))], 1)

    def value(self, totals: Array) -> float:
        """The mean over the segments."""
        return float(totals[0] / totals[1])

    def signature(self, totals: Array) -> str:
        """What the files say of how they were made."""
        return f"{self._signature}|n:{int(totals[1])}"


def digest(texts: Sequence[str]) -> str:
    """SHA-256 of texts, one a line."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _read(path: Path) -> _File:
    try:
        found: dict[str, Any] = read_json(path)
        segments = np.array(found["segments"], np.float64)
        texts = [found[key] for key in ("metric", "signature", "hypotheses_sha256", "references_sha256")]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} does not hold scores as reproduction/comet_score.py writes them: {error!r}."
        ) from error
    if segments.ndim != 1 or not len(segments) or not np.isfinite(segments).all() or set(map(type, texts)) != {str}:
        raise DataError(
            f"{path} does not hold scores as reproduction/comet_score.py writes them: one number a segment."
        )
    return _File(texts[0], segments, texts[1], texts[2], texts[3])
