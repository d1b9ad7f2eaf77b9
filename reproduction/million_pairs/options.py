"""Options of `million_pairs`: the shape of the PLM, the number of pairs and the tokens that occur, and the stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """Settings of the measurements.

    Attributes:
        pairs: pairs of the memory.
        seen: number of different words of the targets.
        d: width of the PLM.
        V: its vocabulary.
        ffn: width of the feed-forward part of its only layer; less than OPT's 4 d, so that the PLM itself takes less.
        heads: its attention heads.
        words: words of a source.
        length: tokens of a target, with the one that ends it.
        epochs: of training.
        learning_rate: of training; 0: that of the preset, for which a comparison of losses needs many steps.
        threads: of torch.
        seed: of everything random.
    """

    pairs: int = 1_000_000
    seen: int = 5_000
    d: int = 2048
    V: int = 50_272
    ffn: int = 2048
    heads: int = 16
    words: int = 8
    length: int = 32
    epochs: int = 1
    learning_rate: float = 0.0
    threads: int = 1
    seed: int = 0

    @property
    def examples(self) -> int:
        """Number of examples."""
        return -(-self.pairs // self.length)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Setting:
        """Return the settings of a result."""
        config = result["signature"]["config"]
        return cls(**{field.name: config.get(field.name, field.default) for field in dataclasses.fields(cls)})


@dataclass(frozen=True)
class Stage:
    """A stage, measured in a process of its own.

    Attributes:
        kind: build, verify, reconstruct, train, steps, or project.
        memory: the memory that it makes or reads: float16, int8, or the number of principal coordinates.
        preset: of `train` and `steps`.
        vocabulary: of `train` and `steps`.
        limit: maximum number of pairs of `train` and `steps`, drawn from the memory; 0: all.
    """

    kind: str
    memory: str = "float16"
    preset: str = ""
    vocabulary: str = ""
    limit: int = 0

    @property
    def name(self) -> str:
        """Name of the stage in the results."""
        limit = f"{self.limit} pairs" if self.limit else ""
        return ", ".join(part for part in (self.kind, self.memory, self.preset, self.vocabulary, limit) if part)

    @classmethod
    def named(cls, name: str) -> Stage:
        """Return the stage of a name: `kind`, or `kind,memory,preset,vocabulary,limit` up to any of them."""
        kind, *rest = (part.strip() for part in name.split(","))
        given: dict[str, Any] = dict(zip(("memory", "preset", "vocabulary", "limit"), rest, strict=False))
        if "limit" in given:
            given["limit"] = int(given["limit"])
        return cls(kind, **given)
