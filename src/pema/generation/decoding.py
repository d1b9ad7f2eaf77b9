"""Generation from sources: in this process or with replicas, results in the order of the sources."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

from pema.adapter.module import Adapter, require_adapter
from pema.adapter.schedule import NoAdapter, Schedule
from pema.adapter.task import require_task, task_of
from pema.cluster.replicas import Replicas
from pema.console import note, progress
from pema.errors import ConfigError, DataError
from pema.generation.batches import Batch, Decoding, Inputs, batches, plain, shared_prefix, write_batch
from pema.generation.config import GenerateConfig, with_own_ending
from pema.generation.plugin import attach_to
from pema.generation.proposed import write_proposed
from pema.generation.replicated import require_decoding, requires_alike, write_with
from pema.generation.settings import OF_THE_HISTORY, check, without_own_settings
from pema.generation.texts import FinishReason, finished
from pema.owner.contract import GivesProposals, require_open
from pema.owner.positions import PositionEncoding
from pema.schema import require
from pema.tasks.example import Example, require_sources
from pema.tasks.registry import Task, chosen_task
from pema.tasks.template import EncodedExample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pema.owner.contract import PLM, Proposer


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
    plm: PLM | Replicas,
    adapter: Adapter | None,
    sources: Sequence[str | Example],
    task: str | Task | None = None,
    schedule: Schedule | str | None = None,
    **settings: Any,  # noqa: ANN401
) -> list[str]:
    """Generate one text per source.

    A text depends on its own source only, not on the rest of its batch (except with sampling, where the seed fixes
    each batch of the call). In bfloat16 and float16 this holds up to rounding: a batch is rounded in a different order
    than a single row, so the choice between two nearly equally probable tokens may change. Load the PLM in float32, or
    use batch_size=1, where this matters. The generation settings in the PLM's folder (`generation_config.json`) are
    ignored: the default is greedy decoding without penalties, for a PLM behind a server as well.

    Args:
        plm: the PLM; or `replicas` of one on a Ray cluster, which decode the batches of this process: the texts are
            the same.
        adapter: the adapter, or None for the PLM alone.
        sources: the texts that fill the template's slot; an example stands for its source and its history.
        task: the task or its name; its template builds the prompts. None means the adapter's own task.
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
        ConfigError: a setting is below 1, unknown, or not applicable here; or no task is given. With replicas: a
            setting or schedule that cannot be sent to them, or a PLM that gives its likeliest tokens only.
        MismatchError: the adapter belongs to another PLM, task or template.
        ProcessError: sources that ended several replicas, or none is left.
    """
    return generate_counted(plm, adapter, sources, task, schedule, **settings).texts


def generate_counted(
    plm: PLM | Replicas,
    adapter: Adapter | None,
    sources: Sequence[str | Example],
    task: str | Task | None = None,
    schedule: Schedule | str | None = None,
    **settings: Any,  # noqa: ANN401
) -> GeneratedTexts:
    """Generate one text per source as `generate` does, and return the counts as well."""
    require_open(plm)
    chosen = adapters_task(adapter) if task is None else chosen_task(task)
    mixture = schedule_of(adapter, schedule, settings.pop("lambda_max", None))
    if adapter is not None:
        chosen = require_task(adapter.config, chosen, plm.tokenizer)
    ending = with_own_ending(None if adapter is None else adapter.config, settings)
    if isinstance(plm, Replicas):
        return _decode_with(plm, adapter, mixture, sources, chosen, **ending)
    with contextlib.ExitStack() as stack:
        inputs: Inputs = plain
        if isinstance(plm, GivesProposals) and plm.proposer is not None:
            return _decode_proposals(plm, plm.proposer, adapter, mixture, sources, chosen, **ending)
        if adapter is not None:
            inputs = stack.enter_context(attach_to(plm, adapter, mixture)).inputs
        return decode(plm, plm.generator, sources, chosen, inputs, **ending)


def adapters_task(adapter: Adapter | None) -> Task:
    """Return the task that an adapter was trained with.

    Raises:
        ConfigError: there is no adapter, or it does not record its task; or it is not an adapter.
    """
    if adapter is None:
        raise ConfigError(
            "without an adapter the task is unknown: give task, for example pema.get_task('translation')."
        )
    require_adapter(adapter)
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
    require_adapter(adapter)
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
    call = _Call.of(plm, sources, task, max_length, settings)
    # A model whose position encoding depends on the longest row of a batch gets rows of equal length only.
    formed = call.batches(alike=PositionEncoding(model).varies)
    with progress("Generating", len(call.prompts), "texts") as advance, without_own_settings(model):
        prefix = shared_prefix(plm, model, [prompt.prompt for prompt in call.prompts], call.decoding.settings)
        written = ((batch, write_batch(plm, model, batch, call.decoding, inputs, prefix)) for batch in formed)
        return call.texts(plm.tokenizer, written, advance)


@dataclass(frozen=True)
class _Call:
    """What a call of `decode` asks for.

    Attributes:
        prompts: the prompts.
        limits: maximum number of new tokens of each.
        config: the settings that are declared here.
        decoding: the settings of the batches.
    """

    prompts: list[EncodedExample]
    limits: list[int]
    config: GenerateConfig
    decoding: Decoding

    @classmethod
    def of(
        cls,
        plm: PLM | Replicas,
        sources: Sequence[str | Example],
        task: Task,
        max_length: int | None,
        settings: dict[str, Any],
    ) -> Self:
        """Check the settings and encode the prompts; see `decode` for the arguments and the errors."""
        config, further = GenerateConfig.split(settings)
        require("max_length", max_length, int | None, least=1)
        ends = _ends(further.get("eos_token_id", ends_of(plm, task)))
        settings = {"num_beams": config.num_beams, "do_sample": config.do_sample} | further | {"eos_token_id": ends}
        check(settings, ends)
        if config.do_sample:
            # transformers would keep the 50 most probable tokens only.
            settings = {"top_k": 0} | settings
        prompts, limits = _prompts(plm, sources, task, config, max_length)
        return cls(prompts, limits, config, Decoding(settings, config.stop or (), config.seed))

    def batches(self, *, alike: bool) -> list[Batch]:
        """Return the batches, `alike` or for settings that read padding of rows of equal length."""
        alike |= any(map(self.decoding.settings.get, OF_THE_HISTORY))
        return batches(self.prompts, self.limits, self.config.batch_size, alike=alike)

    def texts(
        self,
        tokenizer: PreTrainedTokenizerBase,
        written: Iterable[tuple[Batch, list[list[int]]]],
        advance: Callable[..., None],
    ) -> GeneratedTexts:
        """Return the texts of the tokens of all batches, which come in any order."""
        settings, count = self.decoding.settings, len(self.prompts)
        texts, reasons, tokens = [""] * count, cast("list[FinishReason]", ["length"] * count), 0
        ends, stop = settings["eos_token_id"], self.decoding.stop
        for batch, rows in written:
            for i, limit, row in zip(batch.sources, batch.limits, rows, strict=True):
                early = len(row) < limit and bool(settings.get("stopping_criteria"))
                texts[i], n, reasons[i] = finished(tokenizer, row, ends, stop, by_criterion=early)
                tokens += n
            advance(len(batch))
        return _noted(GeneratedTexts(texts, tokens, reasons), self.config)


def _decode_with(
    replicas: Replicas,
    adapter: Adapter | None,
    schedule: Schedule,
    sources: Sequence[str | Example],
    task: Task,
    *,
    max_length: int | None = None,
    **settings: Any,  # noqa: ANN401
) -> GeneratedTexts:
    """Generate with replicas of a PLM on a Ray cluster; the arguments are those of `decode`."""
    if adapter is not None:
        adapter.require(replicas.description)
    call = _Call.of(replicas, sources, task, max_length, settings)
    require_decoding(replicas)
    formed = call.batches(alike=requires_alike(replicas))
    written = write_with(replicas, adapter, schedule, formed, call.decoding)
    with progress("Generating", len(call.prompts), "texts") as advance:
        return call.texts(replicas.tokenizer, written, advance)


def _prompts(
    plm: PLM | Replicas, sources: Sequence[str | Example], task: Task, config: GenerateConfig, max_length: int | None
) -> tuple[list[EncodedExample], list[int]]:
    """Return the prompts, and the maximum number of new tokens of each."""
    prompts = task.template.encode_prompts(plm.tokenizer, require_sources(sources))
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


def ends_of(plm: PLM | Replicas, task: Task) -> list[int]:
    """Return the tokens that end a text: the PLM's, and the one that ends the targets of the task."""
    end = task.template.end(plm.tokenizer)
    return sorted({*plm.description.eos_token_ids, *([] if end is None else [end])})


def _ends(given: Any) -> list[int]:  # noqa: ANN401
    ends = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    if not all(isinstance(token, int) and token >= 0 for token in ends):
        raise ConfigError(f"eos_token_id must be a token id, or a list of token ids, not {given!r}.")
    return ends


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
