"""Statistics of the targets of a data set for the texts to generate: length, and number of lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pema.schema import check, option

MULTIPLE = 8
"""Limits are multiples of this number."""


@dataclass(frozen=True)
class TargetStatistics:
    """The length of targets in tokens, end of sequence included, and whether one has several lines.

    Attributes:
        longest: number of tokens of the longest target.
        common: number of tokens that at most one percent of the targets exceed.
        line_breaks: maximum number of line breaks in a row in a target, apart from white space around it: 0 if all
            targets are one line, 2 or more if one has a blank line.
    """

    longest: int = option(least=1, most=1 << 30)
    common: int = option(least=1, most=1 << 30)
    line_breaks: int = option(least=0, most=1 << 30)

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def of(cls, lengths: Sequence[int] | npt.NDArray[np.int64], targets: Iterable[str]) -> TargetStatistics:
        """Measure targets: their numbers of tokens, at least one, and their texts."""
        common = np.quantile(np.asarray(lengths), 0.99, method="higher")
        return cls(int(max(lengths)), int(common), count_line_breaks(targets))

    @classmethod
    def merged(cls, parts: Sequence[TargetStatistics]) -> TargetStatistics:
        """Return the statistics of several data sets together; `common` holds for each, so it holds for all."""
        return cls(
            max(each.longest for each in parts),
            max(each.common for each in parts),
            max(each.line_breaks for each in parts),
        )

    @property
    def max_new_tokens(self) -> int:
        """Token limit of the texts to generate: the longest target and a quarter more, so no usual text is cut.

        A few exceptionally long targets do not let all texts run on: at most twice `common`. Rounded up to a multiple
        of `MULTIPLE`.
        """
        limit = min(self.longest + -(-self.longest // 4), 2 * self.common)
        return -(-limit // MULTIPLE) * MULTIPLE

    @property
    def stop(self) -> tuple[str, ...]:
        """Stop strings of the texts to generate; see `stop_after`."""
        return stop_after(self.line_breaks)


def count_line_breaks(targets: Iterable[str]) -> int:
    """Return the maximum number of line breaks in a row in a target, apart from white space around it."""
    runs = (run for target in targets for run in re.findall("\n+", target.strip().replace("\r\n", "\n")))
    return max(map(len, runs), default=0)


def stop_after(line_breaks: int) -> tuple[str, ...]:
    """Return the stop strings of texts like targets with so many line breaks in a row.

    They are a line break if no target contains one, else a blank line if none contains that, else (): a PLM that does
    not end its text after the answer goes on with another line, often another prompt.
    """
    return ("\n" * (line_breaks + 1),) if line_breaks < 2 else ()
