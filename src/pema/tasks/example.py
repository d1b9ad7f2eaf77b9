"""The pair of texts that a task consists of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A pair of a source X and its target Y.

    Attributes:
        source: the text that replaces `{source}` in the template.
        target: the text that the PLM should generate.
        where: "file:line" of the pair, for error messages; "" if it does not come from a file.
    """

    source: str
    target: str
    where: str = ""
