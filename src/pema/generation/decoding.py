"""Generation from sources: batches sorted by length, the PLM's own `generate`, results in the order of the sources."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig

from pema.adapter.schedule import NoAdapter, Schedule
from pema.adapter.task import require_task, task_of
from pema.console import note, progress
from pema.errors import ConfigError, DataError, PemaError
from pema.generation.config import GenerateConfig, with_own_ending
from pema.generation.plugin import attach_to
from pema.generation.proposed import write_proposed
from pema.generation.settings import ARGUMENTS, OF_THE_HISTORY, check, without_own_settings
from pema.generation.texts import FinishReason, StopStrings, TokenLimits, finished
from pema.owner.causal_lm import state_argument
from pema.owner.contract import GivesProposals, SharesPrefix
from pema.owner.positions import PositionEncoding
from pema.schema import require
from pema.tasks.example import Example
from pema.tasks.registry import Task
from pema.tasks.template import EncodedExample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pema.adapter.module import Adapter
    from pema.owner.contract import PLM, PromptPrefix, Proposer

Inputs = Callable[[list[int]], AbstractContextManager[object]]
"""Function of SL of each input of a batch; it builds the context manager around the model's call."""


@dataclass(frozen=True)
class GeneratedTexts:
    """Texts generated for a list of sources, and how they ended.

    Attributes:
        texts: one text per source, in the order of the sources; it may have several lines.
        tokens: number of generated tokens, with those that ended a text (end of sequence, stop strings).
        finish_reasons: why each text ended.
    """

    texts: list[str]
    tokens: int
    finish_reasons: list[FinishReason]

    @property
    def cut(self) -> int:
        """Number of texts that ended at their token limit and not by the PLM's choice."""
        return self.finish_reasons.count("length")

    @property
    def stopped(self) -> int:
        """Number of texts that ended at a stop string."""
        return self.finish_reasons.count("stop_string")


def generate(
    plm: PLM,
    adapter: Adapter | None,
    sources: Sequence[str | Example],
    task: Task | None = None,
    schedule: Schedule | str | None = None,
    **settings: Any,  # noqa: ANN401
) -> list[str]:
    """Generate one text per source.

    A text depends on its own source only, not on the rest of its batch (except with sampling, where the seed fixes
    the whole call). In bfloat16 and float16 this holds up to rounding: a batch is rounded in a different order than a
    single row, so the choice between two nearly equally probable tokens may change. Load the PLM in float32, or use
    batch_size=1, where this matters. The generation settings in the PLM's folder (`generation_config.json`) are
    ignored: the default is greedy decoding without penalties, for a PLM behind a server as well.

    Args:
        plm: the PLM.
        adapter: the adapter, or None for the PLM alone.
        sources: the texts that fill the template's slot; an example stands for its source and its history.
        task: the task, whose template builds the prompts; None means the adapter's own task.
        schedule: the adapter's weight per step, or the name of a schedule; None means the adapter's own schedule.
        settings: fields of `GenerateConfig`, and further settings of the model's `generate`, such as `temperature` or
            `repetition_penalty` (see `pema.generation.settings`), `logits_processor`, `stopping_criteria`, and
            `max_length`, the maximum number of tokens of a prompt and its text together. Without `max_new_tokens` and
            `stop` those of the adapter apply, with `NoAdapter()` too. A note reports how many texts were truncated at
            their token limit.

    Returns:
        One text per source, in the order of `sources`; it may have several lines.

    Raises:
        DataError: a source is blank, or too long for the PLM; the message gives its number.
        ConfigError: a setting is below 1, unknown, or not applicable here; or no task is given.
        MismatchError: the adapter belongs to another PLM, task or template.
    """
    return generate_counted(plm, adapter, sources, task, schedule, **settings).texts


def generate_counted(
    plm: PLM,
    adapter: Adapter | None,
    sources: Sequence[str | Example],
    task: Task | None = None,
    schedule: Schedule | str | None = None,
    **settings: Any,  # noqa: ANN401
) -> GeneratedTexts:
    """Generate one text per source as `generate` does, and return the counts as well."""
    task = task or adapters_task(adapter)
    mixture = schedule_of(adapter, schedule, settings.pop("lambda_max", None))
    with contextlib.ExitStack() as stack:
        inputs: Inputs = plain
        if adapter is not None:
            task = require_task(adapter.config, task, plm.tokenizer)
        ending = with_own_ending(None if adapter is None else adapter.config, settings)
        if isinstance(plm, GivesProposals) and plm.proposer is not None:
            return _decode_proposals(plm, plm.proposer, adapter, mixture, sources, task, **ending)
        if adapter is not None:
            inputs = stack.enter_context(attach_to(plm, adapter, mixture)).inputs
        return decode(plm, plm.generator, sources, task, inputs, **ending)


def adapters_task(adapter: Adapter | None) -> Task:
    """Return the task that an adapter was trained with.

    Raises:
        ConfigError: there is no adapter, or it does not record its task.
    """
    if adapter is None:
        raise ConfigError(
            "without an adapter the task is unknown: give task, for example pema.get_task('translation')."
        )
    return task_of(adapter.config)


def schedule_of(adapter: Adapter | None, schedule: Schedule | str | None, lambda_max: float | None) -> Schedule:
    """Return the given schedule, the schedule with the given name, or the adapter's own schedule.

    Raises:
        ConfigError: the name is unknown, the adapter has no fitted schedule, or lambda_max is not applicable.
    """
    if schedule is not None and not isinstance(schedule, str):
        if lambda_max is not None:
            raise ConfigError(
                f"lambda_max={lambda_max} has no effect with the schedule {schedule!r}, which has its own weight: "
                "leave one out, or give the name of a schedule ('constant', 'unrolling', 'linear')."
            )
        return schedule
    if adapter is None:
        return NoAdapter()
    return adapter.config.choose_schedule(schedule, lambda_max)


def decode(
    plm: PLM,
    model: PreTrainedModel,
    sources: Sequence[str | Example],
    task: Task,
    inputs: Inputs,
    /,
    *,
    max_length: int | None = None,
    **settings: Any,  # noqa: ANN401
) -> GeneratedTexts:
    """Generate from a model in its current state, plug-ins included; greedily unless `settings` say otherwise.

    The model's own generation settings are ignored: sampling by default would make comparisons random. Sampling is
    seeded, and the state of the global random generators is restored afterwards.

    Args:
        plm: provides the tokenizer, the context window and the end-of-sequence tokens.
        model: the PLM's model, or one derived from it.
        sources: the texts that fill the template's slot; an example stands for its source and its history.
        task: the task; its template builds the prompts.
        inputs: builds the context manager around the model's call for a batch.
        max_length: maximum number of tokens of a prompt and its output together, within the PLM's context window.
        settings: fields of `GenerateConfig`, and further settings of the model's `generate`.

    Raises:
        DataError: a source is blank, or too long for the PLM; the message gives its number.
        ConfigError: a setting is below 1, unknown, or not applicable here.
    """
    config, further = GenerateConfig.split(settings)
    require("max_length", max_length, int | None, least=1)
    ends = _ends(further.get("eos_token_id", ends_of(plm, task)))
    settings = {"num_beams": config.num_beams, "do_sample": config.do_sample} | further | {"eos_token_id": ends}
    check(settings, ends)
    if config.do_sample:
        # transformers would keep the 50 most probable tokens only.
        settings = {"top_k": 0} | settings
    prompts, limits = _prompts(plm, sources, task, config, max_length)
    texts, reasons, tokens = [""] * len(prompts), cast("list[FinishReason]", ["length"] * len(prompts)), 0
    stop = config.stop or ()
    # A model whose position encoding depends on the longest row of a batch gets rows of equal length only.
    alike = any(map(settings.get, OF_THE_HISTORY)) or PositionEncoding(model).varies
    with (
        progress("Generating", len(prompts), "texts") as advance,
        without_own_settings(model),
        _seeded(model, config.seed) if config.do_sample else contextlib.nullcontext(),
    ):
        prefix = _shared_prefix(plm, model, prompts, settings)
        for chosen in _batches(prompts, limits, config.batch_size, alike=alike):
            batch, most = [prompts[i] for i in chosen], [limits[i] for i in chosen]
            with inputs([prompt.source_length for prompt in batch]):
                rows = _generate_batch(plm, model, batch, most, stop, settings, prefix)
            for i, row in zip(chosen, rows, strict=True):
                early = len(row) < limits[i] and bool(settings.get("stopping_criteria"))
                texts[i], count, reasons[i] = finished(plm.tokenizer, row, ends, stop, by_criterion=early)
                tokens += count
            advance(len(chosen))
    return _noted(GeneratedTexts(texts, tokens, reasons), config)


def _prompts(
    plm: PLM, sources: Sequence[str | Example], task: Task, config: GenerateConfig, max_length: int | None
) -> tuple[list[EncodedExample], list[int]]:
    """Return the prompts, and the maximum number of new tokens of each."""
    prompts = task.template.encode_prompts(plm.tokenizer, list(sources))
    window = min(plm.description.max_length, max_length or plm.description.max_length)
    return prompts, [token_limit(n, prompt, window, config.max_new_tokens) for n, prompt in enumerate(prompts, 1)]


def _noted(result: GeneratedTexts, config: GenerateConfig) -> GeneratedTexts:
    """Return the texts, after a note on those that are truncated."""
    if result.cut:
        limit = "2 SL + 16" if config.max_new_tokens is None else f"max_new_tokens={config.max_new_tokens}"
        note(
            f"{result.cut:,} of {len(result.texts):,} texts are truncated at their token limit ({limit}, within the "
            "PLM's context window): raise max_new_tokens for longer texts."
        )
    return result


def _decode_proposals(
    plm: PLM,
    proposer: Proposer,
    adapter: Adapter | None,
    schedule: Schedule,
    sources: Sequence[str | Example],
    task: Task,
    *,
    max_length: int | None = None,
    **settings: Any,  # noqa: ANN401
) -> GeneratedTexts:
    """Generate with a PLM that gives its likeliest tokens only; the arguments are those of `decode`."""
    config, further = GenerateConfig.split(settings)
    require("max_length", max_length, int | None, least=1)
    if adapter is not None:
        adapter.require(plm.description)
    ends = ends_of(plm, task)
    check({"num_beams": config.num_beams, "do_sample": config.do_sample} | further, ends)
    prompts, limits = _prompts(plm, sources, task, config, max_length)
    texts = write_proposed(plm, proposer, adapter, schedule, prompts, limits, ends, config, further)
    return _noted(GeneratedTexts(*texts), config)


@contextlib.contextmanager
def _seeded(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Seed sampling inside the block, and restore the state of the random generators afterwards."""
    kind = model.device.type
    devices = [] if kind == "cpu" else [model.device]
    with torch.random.fork_rng(devices, device_type=kind if devices else "cuda"):
        torch.manual_seed(seed)
        yield


def plain(source_lengths: list[int]) -> AbstractContextManager[None]:
    """Return an empty context manager: the `Inputs` of a model that needs none."""
    return contextlib.nullcontext()


def _batches(
    prompts: Sequence[EncodedExample], limits: Sequence[int], size: int, *, alike: bool
) -> Iterator[list[int]]:
    """Yield the prompt indices of each batch; with `alike`, batches hold prompts of equal length, without padding.

    The longest come first: a batch that does not fit into memory fails at once, and padding is minimal.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].prompt), limits[i]), reverse=True)
    for _, group in itertools.groupby(order, key=lambda i: len(prompts[i].prompt) if alike else 0):
        numbers = list(group)
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size]


def _shared_prefix(
    plm: PLM, model: PreTrainedModel, prompts: Sequence[EncodedExample], settings: Mapping[str, Any]
) -> PromptPrefix | None:
    """Return the common prefix of all prompts, encoded once; None if the model or the settings do not allow it."""
    own_cache = settings.get("use_cache") is False or any(map(settings.get, ("cache_implementation", "cache_config")))
    if own_cache or not isinstance(plm, SharesPrefix) or model is not plm.generator:
        return None
    return plm.prompt_prefix([prompt.prompt for prompt in prompts])


def ends_of(plm: PLM, task: Task) -> list[int]:
    """Return the tokens that end a text: the PLM's, and the one that ends the targets of the task."""
    end = task.template.end(plm.tokenizer)
    return sorted({*plm.description.eos_token_ids, *([] if end is None else [end])})


def _ends(given: Any) -> list[int]:  # noqa: ANN401
    ends = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    if not all(isinstance(token, int) and token >= 0 for token in ends):
        raise ConfigError(f"eos_token_id must be a token id, or a list of token ids, not {given!r}.")
    return ends


@torch.no_grad()
def _generate_batch(
    plm: PLM,
    model: PreTrainedModel,
    batch: Sequence[EncodedExample],
    limits: Sequence[int],
    stop: Sequence[str],
    settings: Mapping[str, Any],
    prefix: PromptPrefix | None,
) -> list[list[int]]:
    """Return the new tokens of each row, up to its limit or to its end-of-sequence token, which is included.

    A row that ended at a stop string may be followed by other tokens.

    Raises:
        ConfigError: the model's `generate` refuses the settings.
    """
    tokenizer, device, ends = plm.tokenizer, model.device, settings["eos_token_id"]
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = ends[0] if ends else 0
    columns = max(len(encoded.prompt) for encoded in batch)
    ids = torch.full((len(batch), columns), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, encoded in enumerate(batch):
        ids[row, columns - len(encoded.prompt) :] = torch.tensor(encoded.prompt)
        mask[row, columns - len(encoded.prompt) :] = 1
    arguments = {name: settings[name] for name in ARGUMENTS if settings.get(name)}
    criteria: list[Any] = [TokenLimits(columns, torch.tensor(limits)), *arguments.get("stopping_criteria", [])]
    arguments["stopping_criteria"] = [*criteria, *([StopStrings(tokenizer, columns, stop)] if stop else [])]
    fields = {name: value for name, value in settings.items() if name not in ARGUMENTS}
    fields |= {"eos_token_id": ends or None, "pad_token_id": pad, "max_new_tokens": max(limits)}
    if prefix is not None:
        gaps = columns - mask.sum(-1).repeat_interleave(settings["num_beams"])
        arguments[str(state_argument(model))] = prefix.shifted(gaps.clamp_max(prefix.length))
    if settings.get("min_new_tokens"):
        fields["min_new_tokens"] = min(settings["min_new_tokens"], max(limits))
    try:
        config = GenerationConfig(**fields)
        out = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config, **arguments
        )
    except PemaError:
        raise
    except (ValueError, TypeError, ImportError, AssertionError, NotImplementedError) as error:
        if settings.keys() <= {"num_beams", "do_sample", "eos_token_id"}:
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        raise ConfigError(f"the model cannot generate with {given}: {error}") from error
    rows = [row[:limit] for row, limit in zip(out[:, columns:].tolist(), limits, strict=True)]
    firsts = [next((i for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    rows = [row[: first + 1] for row, first in zip(rows, firsts, strict=True)]
    if settings.get("stopping_criteria"):
        # A row that has stopped is padded until the others finish.
        rows = [row[: len(row) - _trailing(row, pad)] if pad not in ends else row for row in rows]
    return rows


def _trailing(row: Sequence[int], token: int) -> int:
    return sum(1 for _ in itertools.takewhile(lambda each: each == token, reversed(row)))


def token_limit(number: int, encoded: EncodedExample, max_length: int, max_new_tokens: int | None) -> int:
    """Return the maximum number of new tokens: `max_new_tokens`, or 2 SL + 16, within the PLM's context window.

    Args:
        number: number of the source, counted from 1, for the error message.
        encoded: the prompt.
        max_length: context window of the PLM, in tokens.
        max_new_tokens: the user's setting, or None.

    Raises:
        DataError: the prompt leaves no space for a new token.
    """
    remaining = max_length - len(encoded.prompt)
    if remaining < 1:
        raise DataError(
            f"source {number}: its prompt has {len(encoded.prompt)} tokens, and the PLM takes {max_length} including "
            "the output: shorten it."
        )
    return min(remaining, 2 * encoded.source_length + 16 if max_new_tokens is None else max_new_tokens)
