"""Lengths of the examples that a comparison measures, checked before the first run."""

from __future__ import annotations

from collections.abc import Sequence

from pema.errors import DataError
from pema.experiments.data import Data
from pema.methods.targets import encode
from pema.owner.local import LocalPLM
from pema.tasks.example import Example
from pema.tasks.template import Template


def require_fit(plm: LocalPLM, template: Template, data: Data) -> None:
    """Refuse dev and test examples that the PLM cannot read; those of training are read before the first run anyway.

    Args:
        plm: the PLM.
        template: builds the prompts.
        data: the data; targets of dev are measured, and test prompts leave space for a text.

    Raises:
        DataError: an example is too long for the PLM; the message names it.
    """
    if data.dev:
        encode(plm, template, data.dev)
    _require_prompts(plm, template, data.test)


def _require_prompts(plm: LocalPLM, template: Template, examples: Sequence[Example]) -> None:
    for number, (example, encoded) in enumerate(
        zip(examples, template.encode_prompts(plm.tokenizer, examples), strict=True), 1
    ):
        if len(encoded.prompt) >= plm.max_length:
            raise DataError(
                f"{example.where or f'test example {number}'}: its prompt has {len(encoded.prompt):,} tokens, and "
                f"{plm.description.name} takes {plm.max_length:,} including the output: shorten it, or leave it out."
            )
