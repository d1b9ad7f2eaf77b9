"""Lengths of the examples that a comparison measures, checked before the first run."""

from __future__ import annotations

from collections.abc import Sequence

from pema.errors import DataError
from pema.methods.targets import encode
from pema.owner.contract import PLM
from pema.tasks.example import Example
from pema.tasks.template import Template


def require_fit(plm: PLM, template: Template, dev: Sequence[Example], test: Sequence[Example]) -> None:
    """Refuse dev and test examples that the PLM cannot read; the first run begins by reading those of training.

    Args:
        plm: the PLM.
        template: builds the prompts.
        dev: examples whose targets are measured.
        test: examples whose prompts must leave space for a text.

    Raises:
        DataError: an example is too long for the PLM; the message names it.
    """
    if dev:
        encode(plm, template, dev)
    prompts, window = template.encode_prompts(plm.tokenizer, test), plm.description.max_length
    for number, (example, encoded) in enumerate(zip(test, prompts, strict=True), 1):
        if len(encoded.prompt) >= window:
            raise DataError(
                f"{example.where or f'test example {number}'}: its prompt has {len(encoded.prompt):,} tokens, and "
                f"{plm.description.name} takes {window:,} including the output: shorten it, or leave it out."
            )
