"""Prompts with demonstrations: solved examples in front of the source.

In a chat each demonstration is a turn of the user and the assistant's answer. Plain prompts repeat the filled template:
each demonstration is a prompt with its target, followed by a blank line. So a PLM ends its text with the blank line,
not with its end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pema.console import note
from pema.errors import DataError
from pema.schema import require
from pema.tasks.encoding import Encoding
from pema.tasks.example import Example, Turn, require_examples
from pema.tasks.forms import SLOT
from pema.tasks.registry import Task, chosen_task
from pema.tasks.selection import Nearest
from pema.tasks.template import EncodedExample, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"
"""Text after a demonstration of a plain prompt."""

Encode = Callable[[Template, Sequence[Example]], list[EncodedExample]]


@dataclass(frozen=True)
class DemonstrationTemplate(Template):
    """Template whose prompts begin with demonstrations, as many as fit into the context window.

    The last demonstration is next to the source. If a prompt is too long, its first demonstrations are left out, and a
    note gives the number of such prompts.

    Attributes:
        demonstrations: returns the demonstrations of a source, in the order of the prompt.
        window: context window of the PLM, in tokens.
        reserved: tokens of the window that prompts leave free for the text.
        encoded: the prompts encoded so far.
        shortened: number of demonstrations left out, by source.
    """

    demonstrations: Callable[[str], Sequence[Example]] = field(default=lambda _: (), compare=False)
    window: int = 1 << 30
    reserved: int = 0
    encoded: dict[str | Example, EncodedExample] = field(default_factory=dict, compare=False, repr=False)
    shortened: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, apart: bool = False
    ) -> list[EncodedExample]:
        """Encode prompts and targets; after a plain prompt the separator ends the target."""

        def encode(template: Template, chosen: Sequence[Example]) -> list[EncodedExample]:
            if template.chat:
                return template.encode(tokenizer, chosen, apart=apart)
            ended = [replace(each, target=each.target.rstrip() + SEPARATOR) for each in chosen]
            encoded = template.encode(tokenizer, ended, apart=apart)
            return [replace(each, target=each.target[:-1]) for each in encoded]

        alone = self._alone(tokenizer)
        alone.encode(tokenizer, examples, apart=apart)  # errors name the example's own number
        return self._with_demonstrations(alone, examples, encode)

    def encode_prompts(
        self, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str | Example]
    ) -> list[EncodedExample]:
        """Encode prompts without targets; see `Template.encode_prompts`."""

        def encode(template: Template, chosen: Sequence[Example]) -> list[EncodedExample]:
            return template.encode_prompts(tokenizer, chosen)

        alone = self._alone(tokenizer)
        alone.encode_prompts(tokenizer, sources)
        new = [each for each in dict.fromkeys(sources) if each not in self.encoded]
        examples = [each if isinstance(each, Example) else Example(each, "") for each in new]
        self.encoded.update(zip(new, self._with_demonstrations(alone, examples, encode), strict=True))
        return [self.encoded[each] for each in sources]

    def _alone(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        return Template(self.text, self.chat, self.system).settled(tokenizer)

    def _with_demonstrations(
        self, alone: Template, examples: Sequence[Example], encode: Encode
    ) -> list[EncodedExample]:
        """Encode examples after as many demonstrations as fit."""
        encoded: dict[int, EncodedExample] = {}
        pending = {i: tuple(self.demonstrations(example.source)) for i, example in enumerate(examples)}
        left_out = dict.fromkeys(pending, 0)
        while pending:
            together: dict[tuple[Example, ...], list[int]] = {}
            for i, given in pending.items():
                together.setdefault(() if alone.chat else given, []).append(i)
            for front, which in together.items():
                template = replace(alone, text="".join(_solved(alone, each) for each in front) + alone.text)
                chosen = [_after(alone, pending[i], examples[i]) if alone.chat else examples[i] for i in which]
                for i, one in zip(which, encode(template, chosen), strict=True):
                    if not pending[i] or len(one.prompt) + max(len(one.target), self.reserved) <= self.window:
                        encoded[i] = one
                        del pending[i]
                    else:
                        pending[i] = pending[i][1:]
                        left_out[i] += 1
        self.shortened.update({examples[i].source: count for i, count in left_out.items()})
        fewer = sum(map(bool, left_out.values()))
        if fewer:
            note(
                f"{fewer:,} of {len(examples):,} prompts have fewer demonstrations than chosen, "
                f"{sum(left_out.values()) / fewer:.1f} fewer on average: the PLM reads {self.window:,} tokens."
            )
        return [encoded[i] for i in range(len(examples))]


def _solved(template: Template, example: Example) -> str:
    """Return a demonstration of a plain prompt: a prompt, its target and the separator."""
    prompt, gap = template.fill(example.source)
    return prompt + gap + example.target.strip() + SEPARATOR


def _after(template: Template, demonstrations: Sequence[Example], example: Example) -> Example:
    """Return an example with demonstrations as earlier turns of its conversation, after its system turn."""
    turns = [
        turn
        for each in demonstrations
        for turn in (Turn("user", template.text.replace(SLOT, each.source)), Turn("assistant", each.target))
    ]
    first = [turn for turn in example.history if turn.role == "system"]
    return replace(example, history=(*first, *turns, *(turn for turn in example.history if turn.role != "system")))


def demonstrate(
    examples: Iterable[Example], pool: Iterable[Example], k: int, task: str | Task | Template
) -> list[Example]:
    """Put demonstrations in front of examples, as the first turns of their conversations.

    Those of an example are the k of `pool` with the most similar sources (BM25, `pema.tasks.retrieval`), the most
    similar one last. Examples of its own source are not among them, so the prompts of training data look like those of
    new sources, and no prompt contains its target. Prompts must be a chat.

    Args:
        examples: training data, or sources to generate for (with a blank target).
        pool: solved examples, such as the training data; of each source the first without a history is used.
        k: number of demonstrations of each example; fewer if the pool has no more of other sources.
        task: the task that the examples are used with, its name or its template: it writes the turns of the
            demonstrations.

    Returns:
        The examples with longer histories; a system turn stays the first.

    Raises:
        ConfigError: k is below 1.
        DataError: every example of the pool has a history; or one of them, or of `examples`, is not an `Example`.
    """
    require("k", k, int, least=1)
    template = task if isinstance(task, Template) else chosen_task(task).template
    solved = one_of_each_source(each for each in require_examples(pool) if not each.history)
    if not solved:
        raise DataError("no example of the pool can be a demonstration: all have earlier turns, or there are none.")
    nearest, found = Nearest(solved), dict[str, Sequence[Example]]()
    demonstrated = []
    for example in require_examples(examples):
        if example.source not in found:
            others = [each for each in nearest.select(example.source, k + 1) if each.source != example.source]
            found[example.source] = others[-k:]
        demonstrated.append(_after(template, found[example.source], example))
    return demonstrated


def one_of_each_source(examples: Iterable[Example]) -> list[Example]:
    """Return the first example of each source, with its first target."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.source, Example(example.source, example.target))
    return list(first.values())


def eligible(examples: Sequence[Example], template: Template, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Return the examples that can be demonstrations: of each source the first without earlier turns.

    In plain prompts, examples that contain `{source}` or the characters of a control token are left out: in a template
    they would not be text.
    """
    encoding = None if template.settled(tokenizer).chat else Encoding(tokenizer)
    return one_of_each_source(
        example
        for example in examples
        if not example.history
        and (encoding is None or all(_is_text(text, encoding) for text in (example.source, example.target)))
    )


def _is_text(text: str, encoding: Encoding) -> bool:
    try:
        encoding.require_text(text, "")
    except DataError:
        return False
    return SLOT not in text and encoding.mark(text) == text
