"""GYAFC: pairs of informal and formal sentences in two domains (Rao and Tetreault 2018), in the corpus's own folders.

    GYAFC_Corpus/
      Entertainment_Music/
        train/  informal, formal                                       line i of one rewrites line i of the other
        tune/   informal, formal.ref0 ... formal.ref3                  four rewrites of each informal sentence
        test/   the same; `formal` and `informal.ref0` ... beside them are of the other direction
      Family_Relationships/  the same

In `tune` and `test` the file `formal` holds other sentences than `informal`: their pairs are never read together.
"""

from __future__ import annotations

from pathlib import Path

from pema.errors import ConfigError, DataError
from pema.tasks.example import Example
from pema.tasks.readers import read_examples

DOMAINS = ("Entertainment_Music", "Family_Relationships")
PARTS = ("train", "tune", "test")
REFERENCES = 4

ACCESS = (
    "GYAFC needs its authors' permission. Write to gyafc.dataset@gmail.com with your affiliation and a short "
    "description of how you will use the data (https://github.com/raosudha89/GYAFC-corpus); formerly Yahoo's "
    "approval for its corpus L6 was needed first. Then give the folder that holds Entertainment_Music and "
    "Family_Relationships."
)


def read_gyafc(
    gyafc: str | Path, *, part: str, domain: str | None = None, reference: int = 0, limit: int | None = None
) -> list[Example]:
    """Read GYAFC, informal to formal.

    Args:
        gyafc: the folder that holds the domains, `GYAFC_Corpus`.
        part: `train`, `tune` (the dev part) or `test`.
        domain: `Entertainment_Music` or `Family_Relationships`; both by default, in this order.
        reference: which of the four rewrites is the target in `tune` and `test`, 0 to 3. `train` has one.
        limit: the number of examples of each domain to read; all by default.

    Raises:
        DataError: the corpus or a file of it is missing (the message says how to ask for it), misaligned or malformed.
        ConfigError: an unknown domain or part, or a reference that is not there.
    """
    if domain is not None and domain not in DOMAINS:
        raise ConfigError(f"domain {domain!r} is none of GYAFC's: choose {' or '.join(DOMAINS)}, or none for both.")
    if part not in PARTS:
        raise ConfigError(f"part {part!r} is none of GYAFC's: choose {', '.join(PARTS)}.")
    most = 1 if part == "train" else REFERENCES
    if not 0 <= reference < most:
        raise ConfigError(f"reference {reference} is not in GYAFC's {part} part: give 0 to {most - 1}.")
    target = "formal" if part == "train" else f"formal.ref{reference}"
    examples: list[Example] = []
    for name in DOMAINS if domain is None else (domain,):
        folder = Path(gyafc) / name / part
        for file in ("informal", target):
            if not (folder / file).is_file():
                raise DataError(f"{folder / file} does not exist. {ACCESS}")
        examples += read_examples(source=folder / "informal", target=folder / target, limit=limit)
    return examples
