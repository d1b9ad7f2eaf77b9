"""Prompts with demonstrations: solved examples in front of the source.

Plain prompts repeat the filled template: each demonstration is a prompt with its target, followed by a blank line. So a
PLM ends its text with the blank line, not with its end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pema.console import note
from pema.errors import DataError
from pema.tasks.encoding import Encoding
from pema.tasks.example import Example
from pema.tasks.template import SLOT, EncodedExample, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"
"""The text between two demonstrations."""

STOPS = ("\n", SEPARATOR)
"""Where a generated text may end, the first that no target contains."""


@dataclass(frozen=True)
class DemonstrationTemplate(Template):
    """Template whose prompts begin with demonstrations, as many as fit into the context window.

    The last demonstration stands next to the source. Where the prompts are too long, the first ones are left out, and a
    note gives the number of prompts concerned.

    Attributes:
        demonstrations: returns the demonstrations of a source, in the order of the prompt.
        window: context window of the PLM, in tokens.
        reserved: tokens of the window that prompts leave free for the text.
        encoded: the prompts encoded so far, by source.
        shortened: number of demonstrations left out, by source.
    """

    demonstrations: Callable[[str], Sequence[Example]] = field(default=lambda _: (), compare=False)
    window: int = 1 << 30
    reserved: int = 0
    encoded: dict[str, EncodedExample] = field(default_factory=dict, compare=False, repr=False)
    shortened: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, apart: bool = False
    ) -> list[EncodedExample]:
        """Encode prompts and targets; a target ends with the separator instead of the end-of-sequence token."""
        alone = self._alone.encode(tokenizer, examples, apart=apart)

        def encode(template: Template, chosen: Sequence[Example]) -> list[EncodedExample]:
            ended = [replace(each, target=each.target.rstrip() + SEPARATOR) for each in chosen]
            encoded = template.encode(tokenizer, ended, apart=apart)
            return [replace(each, target=each.target[:-1]) for each in encoded]

        return self._with_demonstrations(alone, examples, encode)

    def encode_prompts(self, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str]) -> list[EncodedExample]:
        """Encode prompts alone; see `Template.encode_prompts`."""
        alone = self._alone.encode_prompts(tokenizer, sources)
        new = {source: one for source, one in zip(sources, alone, strict=True) if source not in self.encoded}

        def encode(template: Template, chosen: Sequence[Example]) -> list[EncodedExample]:
            return template.encode_prompts(tokenizer, [example.source for example in chosen])

        encoded = self._with_demonstrations(list(new.values()), [Example(source, "") for source in new], encode)
        self.encoded.update(zip(new, encoded, strict=True))
        return [self.encoded[source] for source in sources]

    @property
    def _alone(self) -> Template:
        return Template(self.text)

    def _with_demonstrations(
        self,
        alone: list[EncodedExample],
        examples: Sequence[Example],
        encode: Callable[[Template, Sequence[Example]], list[EncodedExample]],
    ) -> list[EncodedExample]:
        """Encode examples behind as many demonstrations as fit; `alone` is their encoding without any."""
        encoded = list(alone)
        chosen = {i: tuple(self.demonstrations(example.source)) for i, example in enumerate(examples)}
        left_out = dict.fromkeys(chosen, 0)
        while chosen:
            together: dict[tuple[Example, ...], list[int]] = {}
            for i, given in chosen.items():
                together.setdefault(given, []).append(i)
            for given, which in together.items():
                template = Template("".join(map(self._solved, given)) + self.text) if given else self._alone
                for i, one in zip(which, encode(template, [examples[i] for i in which]), strict=True):
                    if not given or len(one.prompt) + max(len(one.target), self.reserved) <= self.window:
                        encoded[i] = one
                        del chosen[i]
                    else:
                        chosen[i] = given[1:]
                        left_out[i] += 1
        self.shortened.update({examples[i].source: count for i, count in left_out.items()})
        fewer = sum(map(bool, left_out.values()))
        if fewer:
            note(
                f"{fewer:,} of {len(examples):,} prompts have fewer demonstrations than chosen, "
                f"{sum(left_out.values()) / fewer:.1f} fewer on average: the PLM reads {self.window:,} tokens."
            )
        return encoded

    def _solved(self, example: Example) -> str:
        """Return a demonstration: a prompt, its target and the separator."""
        prompt, gap = self.fill(example.source)
        return prompt + gap + example.target.strip() + SEPARATOR


def eligible(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Return the examples that can be demonstrations: the first of each source.

    Examples that contain `{source}` or the characters of a control token are left out: in a template they would not be
    text.
    """
    encoding = Encoding(tokenizer)
    first: dict[str, Example] = {}
    for example in examples:
        if all(_is_text(text, encoding) for text in (example.source, example.target)):
            first.setdefault(example.source, Example(example.source, example.target))
    return list(first.values())


def _is_text(text: str, encoding: Encoding) -> bool:
    try:
        encoding.require_text(text, "")
    except DataError:
        return False
    return SLOT not in text and encoding.mark(text) == text


def stop_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """Return where generated texts stop: at a line break or, if some target has several lines, at a blank line.

    Where targets contain blank lines, texts do not stop there: () is returned.
    """
    targets = [example.target.strip() for example in examples]
    stop = next((each for each in STOPS if not any(each in target for target in targets)), None)
    return () if stop is None else (stop,)
