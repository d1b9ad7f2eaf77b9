"""The part of a GGUF file that a data owner needs of a model which an engine runs: LM head, final norm, tokenizer.

The rows of W_hd are widened a few at a time, and the layers are not read at all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from pema.errors import OwnerError
from pema.owner.sources.conversion import GGUFFile, save_tokenizer
from pema.tensors import save_tensors

ABOUT, TENSORS = "about.json", "parts.safetensors"
ROWS = 4096
"""Number of rows widened at a time."""


@dataclass(frozen=True)
class About:
    """What a GGUF file says of its model.

    Attributes:
        architecture: its architecture.
        scale: the scale of its logits, which multiplies or divides them; 0 if it has none.
        soft_cap: the bound on its logits; 0 if it has none.
        eps: constant of its final norm.
        max_length: maximum tokens of a context; 0 if it does not say.
        ends: tokens that end a text.
        parameters: number of weights.
        bytes: size of the weights.
        kind: type in which W_hd is stored.
        offset: place of W_hd in the file.
        shape: shape of W_hd in its blocks.
    """

    architecture: str
    scale: float
    soft_cap: float
    eps: float
    max_length: int
    ends: tuple[int, ...]
    parameters: int
    bytes: int
    kind: str
    offset: int
    shape: tuple[int, int]

    def rows(self, file: Path, tokens: Sequence[int]) -> Tensor:
        """Read rows of W_hd from the GGUF file, (n, d) float32, exactly as the engine does."""
        from gguf import GGMLQuantizationType

        kind = GGMLQuantizationType[self.kind]
        stored = np.memmap(file, _NUMBERS.get(self.kind, np.uint8), "r", self.offset, self.shape)
        return _widened(stored[np.array(tokens, dtype=np.int64)], kind)


_NUMBERS: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def extract(source: Path, folder: Path, name: str) -> str:
    """Extract from a GGUF file; arguments, result and errors are those of `conversion.convert`."""
    file = GGUFFile(source, name)
    head = file.tensor("output.weight") or file.tensor("token_embd.weight")
    if head is None or head.data.ndim != 2:
        raise OwnerError(f"the GGUF file of {name} has no matrix output.weight or token_embd.weight: no LM head.")
    weight = torch.empty(len(head.data), int(head.shape[0]), dtype=file.dtype)
    for start in range(0, len(weight), ROWS):
        weight[start : start + ROWS] = _widened(head.data[start : start + ROWS], head.tensor_type)
    parts = {"weight": weight}
    for part, named in (("bias", "output"), ("norm.weight", "output_norm"), ("norm.bias", "output_norm")):
        if (tensor := file.tensor(f"{named}.{part.rpartition('.')[2]}")) is not None:
            parts[part] = _widened(tensor.data, tensor.tensor_type)
    architecture = file.get("general.architecture")
    attention = f"{architecture}.attention.layer_norm"
    about = About(
        architecture=str(architecture),
        scale=float(file.get(f"{architecture}.logit_scale", 0.0)),
        soft_cap=float(file.get(f"{architecture}.final_logit_softcapping", 0.0)),
        eps=float(file.get(f"{attention}_rms_epsilon", file.get(f"{attention}_epsilon", 1e-5))),
        max_length=int(file.get(f"{architecture}.context_length", 0)),
        ends=tuple(file.end_tokens),
        parameters=sum(file.sizes.values()),
        bytes=file.bytes,
        kind=head.tensor_type.name,
        offset=int(head.data_offset),
        shape=(int(head.data.shape[0]), int(head.data.shape[1])),
    )
    save_tensors(parts, folder / TENSORS)
    (folder / ABOUT).write_text(json.dumps(asdict(about)), encoding="utf-8")
    save_tokenizer(file, folder)
    return file.weights


def read_extracted(folder: Path) -> tuple[About, dict[str, Tensor]]:
    """Read what `extract` wrote: what the file says, and the tensors weight, bias, norm.weight and norm.bias."""
    values = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    about = About(**values | {"ends": tuple(values["ends"]), "shape": tuple(values["shape"])})
    return about, load_file(folder / TENSORS)


def _widened(stored: Any, kind: Any) -> Tensor:  # noqa: ANN401
    from gguf import dequantize

    return torch.tensor(dequantize(stored, kind), dtype=torch.float32)
