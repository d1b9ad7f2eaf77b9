"""Options of the benchmarks: one frozen value, passed to every process and stored in every signature."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

DEMO = "demo"
RESTAURANTS = "restaurants"
NONE = "none"


@dataclass(frozen=True)
class Shape:
    """Shape of a head: d, the width of its input, and V, its number of rows; r for preset `best`."""

    name: str
    d: int
    V: int


@dataclass(frozen=True)
class Options:
    """Extent of the measurements.

    Attributes:
        plm: the PLM of the benchmarks that need one: "embedded", a folder, or one of the shapes of `paper_shape`.
        corpus: "demo", the sentences that the package ships; "restaurants", its records and texts; a TSV file; or
            "none", made-up sentences.
        examples: most examples of the corpus.
        words: most words a side in a made-up sentence.
        threads: of torch.
        device: of PLM and training.
        batch_tokens: most tokens of a batch in `building`.
        repeats: timed rounds.
        clock: of `building` and `prefix`: "wall", or "processor" on a machine that others use meanwhile.
        shapes: d and V of the synthetic representations.
        pairs: synthetic pairs.
        published_steps: batches of the published joint loop.
        published_batch: pairs in each of them.
        sgd_seconds: most time for each run of gradient descent in `reconstruction`.
        sgd_epochs: most passes in each of them.
        ranks: r in `reconstruction`; 0 stands for d / 4, the paper's ratio (512 of 2,048).
        new_tokens: generated per sequence.
        batch_sizes: of generation.
        serve_seconds: for each number of clients in `serving`.
        seed: of everything random.
    """

    plm: str = "embedded"
    corpus: str = DEMO
    examples: int = 1000
    words: int = 20
    threads: int = 2
    device: str = "cpu"
    batch_tokens: int = 8192
    repeats: int = 5
    clock: str = "wall"
    shapes: tuple[Shape, ...] = (Shape("embedded PLM", 320, 8192), Shape("d 384", 384, 8192))
    pairs: int = 8192
    published_steps: int = 4
    published_batch: int = 2048
    sgd_seconds: float = 40.0
    sgd_epochs: int = 200
    ranks: tuple[int, ...] = (0, 256)
    new_tokens: int = 48
    batch_sizes: tuple[int, ...] = (1, 32)
    serve_seconds: float = 8.0
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Options:
        """Build the options from the result of `to_dict`."""
        listed = {name: tuple(values[name]) for name in ("ranks", "batch_sizes")}
        return cls(**values | listed | {"shapes": tuple(Shape(**shape) for shape in values["shapes"])})


ON_ACCELERATOR = Options(
    plm="opt-1.3b",
    corpus=NONE,
    examples=2000,
    words=60,
    batch_tokens=65536,
    shapes=(Shape("OPT-1.3B", 2048, 50272), Shape("Llama 3 8B", 4096, 128256)),
    pairs=1 << 16,
    new_tokens=64,
    repeats=3,
)
"""Options for another device than the CPU: a few minutes on one of 2024's."""
