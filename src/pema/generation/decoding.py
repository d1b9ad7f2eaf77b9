"""Text from sources: batches by length through the PLM's own `generate`, results in the order of the sources."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pema.console import progress
from pema.errors import ConfigError, DataError
from pema.generation.plugin import attach
from pema.generation.schedule import Schedule
from pema.tasks.registry import Task
from pema.tasks.template import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pema.adapter.module import Adapter
    from pema.owner.contract import PLM

Inputs = Callable[[list[int]], AbstractContextManager[object]]
"""What stands around the model's call for a batch, given SL of each of its inputs."""


@dataclass(frozen=True)
class Generated:
    """What came of some sources.

    Attributes:
        texts: one line of text per source, in their order.
        tokens: how many tokens were generated, end-of-sequence included.
    """

    texts: list[str]
    tokens: int


def generate(
    plm: PLM,
    adapter: Adapter | None,
    sources: Sequence[str],
    task: Task,
    schedule: Schedule,
    *,
    batch_size: int = 32,
    num_beams: int = 1,
    max_new_tokens: int | None = None,
    do_sample: bool = False,
    seed: int = 0,
    **settings: Any,  # noqa: ANN401
) -> list[str]:
    """Generate a text for each source.

    A text depends on its own source only, not on what else is in its batch (sampling apart, where the seed fixes the
    whole call).

    Args:
        plm: the PLM.
        adapter: the adapter, or None for the PLM alone.
        sources: what fills the template's slot.
        task: its template makes the prompts.
        schedule: the adapter's weight per step.
        batch_size: sequences at a time.
        num_beams: 1 is greedy (or sampling).
        max_new_tokens: the longest output in tokens; 2 SL + 16 where it is not given. What the PLM's context window
            leaves behind the prompt bounds it.
        do_sample: draw from the mixture instead of taking its best token.
        seed: of the draws.
        settings: further settings of the model's `generate`, such as `temperature`.

    Returns:
        One line of text per source, in the order of `sources`.

    Raises:
        DataError: a source is blank, or too long for the PLM; the message names its number.
        ConfigError: batch_size, num_beams or max_new_tokens below 1.
        MismatchError: the adapter belongs to another PLM.
    """
    with contextlib.ExitStack() as stack:
        inputs: Inputs = plain
        if adapter is not None:
            attached = stack.enter_context(
                attach(plm.model, adapter, plm.head(), schedule, description=plm.description)
            )
            inputs = attached.inputs
        if do_sample:
            devices = [] if plm.model.device.type == "cpu" else [plm.model.device]
            stack.enter_context(
                torch.random.fork_rng(devices, device_type=plm.model.device.type if devices else "cuda")
            )
            torch.manual_seed(seed)
        settings |= {"num_beams": num_beams, "do_sample": do_sample}
        return decode(
            plm, plm.model, sources, task, inputs, batch_size=batch_size, max_new_tokens=max_new_tokens, **settings
        ).texts


def decode(
    plm: PLM,
    model: PreTrainedModel,
    sources: Sequence[str],
    task: Task,
    inputs: Inputs,
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    **settings: Any,  # noqa: ANN401
) -> Generated:
    """Generate from a model as it stands, whatever is plugged into it, greedily unless `settings` say otherwise.

    The model's own generation settings do not decide: what samples by default would make every comparison chance.

    Args:
        plm: its tokenizer, context window and end-of-sequence tokens.
        model: the PLM's model, or one that was made of it.
        sources: what fills the template's slot.
        task: its template makes the prompts.
        inputs: what stands around the model's call for a batch.
        batch_size: sequences at a time.
        max_new_tokens: the longest output in tokens.
        max_length: tokens that a prompt and its output may have together; the PLM's context window where not given.
        settings: further settings of the model's `generate`.
    """
    settings = {"num_beams": 1, "num_return_sequences": 1, "do_sample": False} | settings
    for name, value in (
        ("batch_size", batch_size),
        ("num_beams", settings["num_beams"]),
        ("max_new_tokens", max_new_tokens),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}.")
    prompts = task.template.encode_prompts(plm.tokenizer, list(sources))
    window = plm.description.max_length if max_length is None else max_length
    limits = [token_limit(n, prompt, window, max_new_tokens) for n, prompt in enumerate(prompts, 1)]
    # Longest first: a batch that does not fit into memory fails at once, and padding is least.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].prompt), limits[i]), reverse=True)
    texts, tokens = [""] * len(prompts), 0
    with progress("Generating", len(prompts), "texts") as advance:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch, most = [prompts[i] for i in chosen], [limits[i] for i in chosen]
            with inputs([prompt.source_length for prompt in batch]):
                rows = _generate_batch(plm, model, batch, most, **settings)
            for i, row in zip(chosen, rows, strict=True):
                texts[i] = one_line(plm.tokenizer.decode(row, skip_special_tokens=True))
                tokens += len(row)
            advance(len(chosen))
    return Generated(texts, tokens)


def plain(source_lengths: list[int]) -> AbstractContextManager[None]:
    """`Inputs` of a model that asks for nothing."""
    return contextlib.nullcontext()


class Stop:
    """Ends each row at its own number of new tokens, so that no row's output depends on the others' limits.

    A stopping criterion of transformers; `limits` is (items,), and rows of one item (beams) stand side by side.
    """

    def __init__(self, prompt_columns: int, limits: Tensor) -> None:
        self._last = prompt_columns + limits

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """(rows,) bool: which rows are finished."""
        rows = len(input_ids) // len(self._last)
        return input_ids.shape[1] >= self._last.to(input_ids.device).repeat_interleave(rows)


@torch.no_grad()
def _generate_batch(
    plm: PLM,
    model: PreTrainedModel,
    batch: Sequence[Encoded],
    limits: Sequence[int],
    **settings: Any,  # noqa: ANN401
) -> list[list[int]]:
    """The new tokens of each row, up to its limit and its end-of-sequence token, which is the last one."""
    tokenizer, device = plm.tokenizer, model.device
    ends = list(plm.description.eos_token_ids)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = ends[0] if ends else 0
    columns = max(len(encoded.prompt) for encoded in batch)
    ids = torch.full((len(batch), columns), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, encoded in enumerate(batch):
        ids[row, columns - len(encoded.prompt) :] = torch.tensor(encoded.prompt)
        mask[row, columns - len(encoded.prompt) :] = 1
    stop: Any = [Stop(columns, torch.tensor(limits))]
    out = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max(limits),
        stopping_criteria=stop,
        pad_token_id=pad,
        eos_token_id=ends or None,
        **settings,
    )
    rows = [row[:limit] for row, limit in zip(out[:, columns:].tolist(), limits, strict=True)]
    firsts = [next((i for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[: first + 1] for row, first in zip(rows, firsts, strict=True)]


def one_line(text: str) -> str:
    """`text` without the blanks around it, and with a space for every line break, so that outputs stay aligned."""
    return " ".join(part for line in text.splitlines() if (part := line.strip()))


def token_limit(number: int, encoded: Encoded, max_length: int, max_new_tokens: int | None) -> int:
    """New tokens that a prompt may have: `max_new_tokens`, or 2 SL + 16, within the PLM's context window.

    Args:
        number: which source it is, counted from 1, for the message.
        encoded: the prompt.
        max_length: tokens that the PLM takes.
        max_new_tokens: what the user set, if anything.

    Raises:
        DataError: the prompt leaves no room for one.
    """
    room = max_length - len(encoded.prompt)
    if room < 1:
        raise DataError(
            f"source {number}: its prompt has {len(encoded.prompt)} tokens, and the PLM takes {max_length}, the output "
            "included: shorten it."
        )
    return min(room, 2 * encoded.source_length + 16 if max_new_tokens is None else max_new_tokens)
