"""Options of `paper_shape`: shapes of language models, length of the measurements, and minimum memory of methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ADAM_BYTES, FROZEN_BYTES, HALF_BYTES = 16, 4, 2
"""Bytes of a trained weight in float32 with gradient and two moments; of a frozen one in float32; in half precision."""


@dataclass(frozen=True)
class Shape:
    """An OPT model: width d, vocabulary V."""

    name: str
    d: int
    layers: int
    heads: int
    ffn: int
    V: int = 50272
    positions: int = 2050

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer: four projections, two of the feed-forward part, two norms."""
        return 4 * (self.d**2 + self.d) + 2 * self.d * self.ffn + self.ffn + self.d + 4 * self.d

    @property
    def other_parameters(self) -> int:
        """Weights outside the layers: embeddings, which are W_hd too, positions, the final norm."""
        return (self.V + self.positions) * self.d + 2 * self.d


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("opt-125m", 768, 12, 12, 3072),
        Shape("d 1024, 24 layers", 1024, 24, 16, 4096),
        Shape("opt-1.3b", 2048, 24, 32, 8192),
    )
}
"""Shapes by name; the second has the size of OPT-350M, which projects its embeddings and norms after its layers."""


METHODS = (
    "full",
    "lora",
    "lora-bfloat16",
    "offsite",
    "knn",
    "pema-paper",
    "pema-paper-float32",
    "pema-best",
    "owner",
)
"""Methods; see `reproduction.paper_shape.methods`. `owner` is the PLM owner's side of PEMA."""


@dataclass(frozen=True)
class Setting:
    """Settings of the measurements.

    Attributes:
        batch_size: sequences in a step of training a language model.
        length: tokens in each of them.
        steps: of that training; the first one is not timed.
        pairs: in the memory that PEMA reads; more than fill its buffer, so more would not take more memory.
        knn_pairs: in the memory that kNN-LM reads, which takes memory in proportion.
        queries: searches that are timed.
        prompt: tokens before generation.
        new_tokens: generated tokens.
        repeats: timed rounds of generation.
        threads: of torch.
        device: "cpu", "cuda", or "auto": an accelerator where there is one.
    """

    batch_size: int = 1
    length: int = 128
    steps: int = 4
    pairs: int = 24_576
    knn_pairs: int = 98_304
    queries: int = 20
    prompt: int = 64
    new_tokens: int = 16
    repeats: int = 5
    threads: int = 1
    device: str = "auto"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Setting:
        """Return the settings of a result."""
        config = result["signature"]["config"]
        return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})


def kept_layers(layers: int) -> tuple[int, int]:
    """Return the number of layers of Offsite-Tuning's emulator, and of each of its two adapters.

    The published code has emulators of 8 layers between adapters of 2 for OPT-1.3B: 0.4 of the 20 that lie between.
    """
    adapters = 2 if layers >= 6 else 1
    return max(1, round(0.4 * (layers - 2 * adapters))), adapters


def memory_pairs(method: str, setting: Setting) -> int:
    """Return the number of pairs of the memory that a method reads; 0 if it reads none."""
    return setting.knn_pairs if method == "knn" else setting.pairs if method.startswith("pema") else 0


def least_bytes(shape: Shape, method: str, setting: Setting) -> int:
    """Compute the minimum bytes of a method by arithmetic, not by measurement.

    Weights, gradients and moments where a language model is trained, without what a pass keeps for its gradients; the
    index of kNN-LM; W_hd in half precision and the adapter's weights, gradients and moments for PEMA.
    """
    layer, other, d = shape.layer_parameters, shape.other_parameters, shape.d
    whole = shape.layers * layer + other
    if method == "full":
        return ADAM_BYTES * whole
    if method == "offsite":
        emulator, adapters = kept_layers(shape.layers)
        return FROZEN_BYTES * (emulator * layer + other) + ADAM_BYTES * 2 * adapters * layer
    if method == "knn":
        return setting.knn_pairs * d * FROZEN_BYTES
    if method.startswith("pema"):
        rank = min(512, d) if method.startswith("pema-paper") else min(2048, 6 * d)
        return HALF_BYTES * shape.V * d + ADAM_BYTES * 2 * rank * d
    return (FROZEN_BYTES if method == "lora" else HALF_BYTES) * whole
