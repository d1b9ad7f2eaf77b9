"""One pair of texts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A source X and its target Y.

    Attributes:
        source: the text that takes the place of `{source}` in the template.
        target: the text that the PLM is to write.
        where: "file:line" of the pair, for error messages; "" for a pair that comes from no file.
    """

    source: str
    target: str
    where: str = ""
