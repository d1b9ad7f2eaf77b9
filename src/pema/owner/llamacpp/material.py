"""What is at hand of a model that an engine runs: its LM head and its tokenizer, without its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pema.devices import has_bfloat16
from pema.errors import OwnerError
from pema.files import digest
from pema.owner.bundle import MASKED, NormSettings
from pema.owner.head import Head, Norm
from pema.owner.llamacpp.tokenisation import end_tokens, ordinary_tokens
from pema.owner.loading import NO_LIMIT
from pema.owner.sources.conversion import LOCAL
from pema.owner.sources.extraction import read_extracted
from pema.owner.sources.gguf import converted, require_whole
from pema.owner.sources.served import Served

WIDE = "bfloat16"
"""Type that quantised weights are widened to by `sources.conversion`, which here concerns the head only."""


RECOVERED = "recovery.json"
"""File in the folder of a head bundle that was recovered from log-probabilities (`pema.owner.logprobs.recover`)."""


@dataclass(frozen=True)
class Material:
    """What is known of a model without running it.

    Attributes:
        name: name of the PLM.
        fingerprint: SHA-256 of what identifies it.
        architecture: its architecture, as llama.cpp calls it.
        weights: a line on its weights.
        tokenizer: its tokenizer.
        ends: tokens that end a text.
        heads: forms that its LM head may have, the likeliest first: they differ in scale and soft cap.
        rows: returns rows of W_hd in float32, as exactly as they are known.
        norm: its final norm, or None if it is not known.
        max_length: maximum tokens of a context.
        parameters: number of weights, or None if it is not known.
        bytes: size of the weights, or None if it is not known.
    """

    name: str
    fingerprint: str
    architecture: str
    weights: str
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]
    heads: tuple[Head, ...]
    rows: Callable[[Sequence[int]], Tensor]
    norm: Norm | None
    max_length: int
    parameters: int | None
    bytes: int | None

    def ordinary_tokens(self, count: int) -> list[int]:
        """Return at most `count` ordinary tokens; see `tokenisation.ordinary_tokens`."""
        return ordinary_tokens(self.tokenizer, self.ends, self.heads[0].vocabulary_size, count)


def material(served: Served, engine: str = "llama.cpp") -> Material:
    """Read what is at hand of a model.

    Args:
        served: the model.
        engine: what runs it, for the messages.

    Raises:
        OwnerError: the file or folder cannot be read or lacks something.
    """
    return _of_bundle(served, engine) if served.model.is_dir() else _of_gguf(served)


def _of_gguf(served: Served) -> Material:
    folder, name, weights = converted(served.name, lambda: [served.model], served.content, head_only=True)
    about, parts = read_extracted(Path(folder))
    weight = parts["weight"]
    if weight.dtype == torch.float16 or (weight.dtype == torch.bfloat16 and not has_bfloat16(torch.device("cpu"))):
        weight = weight.float()  # the same values, in a type in which the processor is fast
    # Of a scale the file does not say whether it multiplies or divides.
    scales = [about.scale, 1 / about.scale, 1.0] if about.scale else [1.0]
    caps = [about.soft_cap, None] if about.soft_cap else [None]
    norm = None
    if "norm.weight" in parts:
        kind: Literal["layer", "rms"] = "layer" if "norm.bias" in parts else "rms"
        norm = Norm(NormSettings(kind, about.eps), parts["norm.weight"], parts.get("norm.bias"))
    tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
    return Material(
        name=name,
        fingerprint=digest({"engine": "llama.cpp", "file": served.content or require_whole(served.model)}),
        architecture=f"llama.cpp {about.architecture}",
        weights=f"{weights.removesuffix(f', widened to {WIDE}')}, run by llama.cpp",
        tokenizer=tokenizer,
        ends=end_tokens(tokenizer, about.ends),
        heads=tuple(Head(weight, parts.get("bias"), scale=scale, soft_cap=cap) for scale, cap in product(scales, caps)),
        rows=lambda tokens: about.rows(served.model, tokens),
        norm=norm,
        max_length=about.max_length or NO_LIMIT,
        parameters=about.parameters,
        bytes=about.bytes,
    )


def _of_bundle(served: Served, engine: str) -> Material:
    folder = served.model
    if (folder / RECOVERED).exists():
        raise OwnerError(
            f"the head bundle {folder} was recovered from log-probabilities, in a basis of its own, and {engine} "
            f"returns vectors in the model's: name the PLM logprobs+http://host:port#{folder}, with the server that "
            "gives log-probabilities, or give the head bundle that the owner released, the model's folder or GGUF file."
        )
    head = Head.load(folder)
    if head.fingerprint.startswith(MASKED):
        raise OwnerError(
            f"the head bundle {folder} is masked, and {engine} returns representations as they are: give the plain one."
        )
    if head.norm is not None:
        raise OwnerError(
            f"the head bundle {folder} begins before the final norm, and {engine} returns what comes after it: "
            "release it with tap 'head_input'."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and what tokenizers raises
        raise OwnerError(
            f"the folder {folder} contains a head bundle and no tokenizer: copy the model's tokenizer.json and "
            "tokenizer_config.json into it."
        ) from error
    return Material(
        name=served.name,
        fingerprint="",
        architecture="llama.cpp",
        weights="run by llama.cpp",
        tokenizer=tokenizer,
        ends=end_tokens(tokenizer, []),
        heads=(head,),
        rows=lambda chosen: head.weight[list(chosen)].float(),
        norm=None,
        max_length=NO_LIMIT,
        parameters=None,
        bytes=None,
    )
