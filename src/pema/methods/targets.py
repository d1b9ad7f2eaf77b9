"""Likelihood of the targets of examples under a causal language model, with gradients through the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pema.errors import DataError
from pema.evaluation.perplexity import LOGITS_BYTES
from pema.memory.encoding import Tokens
from pema.owner.batching import length_batches, pad_right
from pema.owner.causal_lm import output_embedding
from pema.owner.contract import PLM
from pema.owner.probing import hooked
from pema.tasks.example import Example, one_target_each
from pema.tasks.template import Template


def encode(plm: PLM, template: Template, examples: Sequence[Example], virtual_tokens: int = 0) -> Tokens:
    """Encode examples to exactly the tokens that a memory is built from.

    Args:
        plm: provides the tokenizer and the context window.
        template: builds the prompts.
        examples: the pairs; each of several targets of a source is a pair.
        virtual_tokens: number of positions of the context window that are occupied before the prompt.

    Raises:
        DataError: an example is too long for the PLM; the message names it.
    """
    examples = list(one_target_each(examples))
    tokens = Tokens.encode(plm, template, examples)
    lengths = tokens.starts[1:] - tokens.starts[:-1]
    longest, window = int(lengths.argmax()), plm.description.max_length
    if lengths[longest] + virtual_tokens > window:
        raise DataError(
            f"{examples[longest].where or f'example {longest + 1}'}: it has {lengths[longest]:,} tokens, but after "
            f"{virtual_tokens:,} virtual tokens {plm.description.name} reads {window - virtual_tokens:,}: "
            "shorten the example, leave it out, or use fewer virtual tokens."
        )
    return tokens


def cross_entropy(model: Any, tokens: Tokens, which: Sequence[int]) -> tuple[Tensor, int]:  # noqa: ANN401
    """Compute the sum of -log P(y_i | c_i) over the target tokens of some examples, in nats, and their number.

    It takes one forward pass, and the head multiplies target positions only. A causal model never attends to padding on
    the right, so no mask is given.

    Args:
        model: a causal language model of transformers, or one that `peft` derived from it.
        tokens: all examples.
        which: indices of the examples to use.
    """
    logits, targets = target_logits(model, tokens, which)
    return functional.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)


def target_logits(model: Any, tokens: Tokens, which: Sequence[int]) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Return the (n, V) logits that predict the n target tokens of some examples, and the (n,) tokens."""
    padded = pad_right([tokens.sequence(i) for i in which])
    width = padded.shape[1]
    begins = [int(tokens.cuts[i] - tokens.starts[i]) for i in which]
    ends = [int(tokens.starts[i + 1] - tokens.starts[i]) for i in which]
    places = torch.cat(
        [torch.arange(begin, end) + row * width for row, (begin, end) in enumerate(zip(begins, ends, strict=True))]
    )
    embedding = output_embedding(model)

    def at_head(_module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ANN401
        hidden = given[0].flatten(0, -2)
        # The logits that predict a token are at the position before it.
        return (hidden.index_select(0, places.to(hidden.device) - 1)[None], *given[1:])

    with hooked(embedding.register_forward_pre_hook(at_head)):
        logits = model(input_ids=padded.to(model.device), use_cache=False).logits[0]
    return logits, padded.flatten()[places].to(logits.device)


@torch.no_grad()
def mean_cross_entropy(model: Any, tokens: Tokens, which: Sequence[int]) -> float:  # noqa: ANN401
    """Compute the mean of -log P(y_i | c_i) over the target tokens of some examples, in nats, without dropout."""
    training, total, count = model.training, 0.0, 0
    model.eval()
    weight: Any = output_embedding(model).weight
    lengths = [int(tokens.starts[i + 1] - tokens.starts[i]) for i in which]
    try:
        for batch in length_batches(lengths, max(16, LOGITS_BYTES // (4 * len(weight)))):
            loss, n = cross_entropy(model, tokens, [which[i] for i in batch])
            total, count = total + float(loss), count + n
    finally:
        model.train(training)
    return total / count


def perplexity_of(mean: float) -> float:
    """Return the exponential of a mean cross-entropy; infinity where it exceeds float64."""
    return math.exp(mean) if mean < 709 else math.inf
