"""Reader of GYAFC: informal and formal sentence pairs in two domains (Rao and Tetreault 2018), in the original layout.

    GYAFC_Corpus/
      Entertainment_Music/
        train/  informal, formal                                       line i of `formal` rewrites line i of `informal`
        tune/   informal, formal.ref0 ... formal.ref3                  four rewrites of each informal sentence
        test/   the same; the files `formal` and `informal.ref0` ... belong to the opposite direction
      Family_Relationships/  the same

In `tune` and `test` the sentences of `formal` are not those of `informal`: the two are never read as pairs.
"""

from __future__ import annotations

from pathlib import Path

from pema.errors import ConfigError, DataError
from pema.schema import among
from pema.tasks.example import Example
from pema.tasks.readers import read_examples

DOMAINS = ("Entertainment_Music", "Family_Relationships")
PARTS = ("train", "tune", "test")
REFERENCES = 4

ACCESS = (
    "GYAFC needs its authors' permission. Write to gyafc.dataset@gmail.com with your affiliation and a short "
    "description of how you will use the data (https://github.com/raosudha89/GYAFC-corpus); formerly Yahoo's "
    "approval for its corpus L6 was needed first. Then give the folder that contains Entertainment_Music and "
    "Family_Relationships."
)


def read_gyafc(
    gyafc: str | Path, *, part: str, domain: str | None = None, reference: int = 0, limit: int | None = None
) -> list[Example]:
    """Read GYAFC, informal to formal.

    Args:
        gyafc: the folder with the domains, `GYAFC_Corpus`.
        part: `train`, `tune` (the development set) or `test`.
        domain: `Entertainment_Music` or `Family_Relationships`; default: both, in this order.
        reference: number (0 to 3) of the rewrite used as target in `tune` and `test`; `train` has only one.
        limit: the number of examples to read per domain; default: all.

    Raises:
        DataError: a file is missing (the message says how to request the corpus), misaligned or malformed.
        ConfigError: an unknown domain or part, or a reference that does not exist.
    """
    among("GYAFC domain", [] if domain is None else [domain], DOMAINS)
    among("GYAFC part", [part], PARTS)
    most = 1 if part == "train" else REFERENCES
    if not 0 <= reference < most:
        raise ConfigError(f"reference {reference} does not exist in GYAFC's {part} part: give 0 to {most - 1}.")
    target = "formal" if part == "train" else f"formal.ref{reference}"
    examples: list[Example] = []
    for name in DOMAINS if domain is None else (domain,):
        folder = Path(gyafc) / name / part
        for file in ("informal", target):
            if not (folder / file).is_file():
                raise DataError(f"{folder / file} does not exist. {ACCESS}")
        examples += read_examples(source=folder / "informal", target=folder / target, limit=limit)
    return examples
