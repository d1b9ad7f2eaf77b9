"""The short interface: open a PLM, adapt it to examples, generate texts."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from pema.adapter.config import TrainConfig
from pema.adapter.module import Adapter, require_adapter
from pema.adapter.presets import preset
from pema.adapter.task import require_task, task_of
from pema.errors import ConfigError
from pema.generation.classification import Classification, choose_labels, classify
from pema.generation.config import GenerateConfig, with_own_ending
from pema.generation.decoding import (
    GeneratedTexts,
    adapters_task,
    decode,
    generate_counted,
    schedule_of,
)
from pema.generation.plugin import AttachedAdapter, attach
from pema.generation.rounds import adapt
from pema.memory.config import BuildConfig
from pema.owner.contract import BATCH_TOKENS, GivesProposals, Metered, SharesPrefix, suited_tokens
from pema.owner.opening import open_plm
from pema.schema import known, short
from pema.storage.address import name_of
from pema.tasks.registry import Task, chosen_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pema.adapter.schedule import Schedule
    from pema.owner import contract
    from pema.owner.contract import ContextRepresentations, Contexts, PLMDescription, PromptPrefix, Proposer, Session
    from pema.owner.head import Head
    from pema.tasks.example import Example


class PLM:
    """A frozen language model, in this process or on its owner's server, with the methods to adapt and use it.

    The step-by-step functions (`build_memory`, `generate`, ...) accept it wherever they accept a PLM.
    """

    def __init__(self, plm: contract.PLM) -> None:
        """Wrap an open PLM: a `LocalPLM`, a `RemotePLM`, a masked one."""
        self._plm = plm
        self._used: _Used | None = None

    def __repr__(self) -> str:
        about = self.description
        return f"PLM({about.name!r}: {about.architecture}, d={about.d}, V={about.vocabulary_size:,}, tap={about.tap!r})"

    @classmethod
    def from_pretrained(cls, name_or_address: str | Path, **settings: Any) -> Self:  # noqa: ANN401
        """Open a PLM.

        Args:
            name_or_address: name of a packaged PLM, a local folder, a GGUF file, a hub name, `llamacpp:FILE`, the
                address of a server, or a TOML file that describes an API; see `open_plm`. "embedded" is bundled for
                tests.
            settings: fields of `LoadConfig`: tap, dtype, device_map, revision, mask_secret.

        Raises:
            OwnerError: it cannot be loaded or reached, its head is not supported, or the secret cannot be read.
            ConfigError: an unknown or invalid setting.
        """
        return cls(open_plm(name_or_address, **settings))

    def adapt(
        self,
        examples: Iterable[Example],
        task: str | Task = "translation",
        config: str | TrainConfig = "best",
        output: str | Path | None = None,
        *,
        rounds: int = 0,
        **building: Any,  # noqa: ANN401
    ) -> Adapter:
        """Train an adapter on examples: build the external memory, train on it, fit the schedule.

        The same as `build_memory` and `train` one after the other, and as `pema adapt`.

        Args:
            examples: the pairs of texts to adapt to.
            task: its name, or a task of your own.
            config: a preset's name, or the settings of the training.
            output: folder for `memory` and `adapter`, or its address in object storage. The same call resumes one that
                was killed, and returns the adapter of one that ended. With None nothing is kept on the disk.
            rounds: number of on-policy rounds; see `pema.generation.rounds`.
            building: fields of `BuildConfig`, such as contexts="predicted".

        Returns:
            The adapter, with its task, template and schedule.

        Raises:
            ConfigError: an unknown or invalid setting.
            DataError: no examples, or one that cannot be used.
            PemaError: as `build_memory` and `train`.
        """
        training = [name for name in building if name in TrainConfig.__dataclass_fields__]
        if training:
            raise ConfigError(
                f"{training[0]} is a setting of the training: give config=pema.preset('best', {training[0]}=...)."
            )
        known(BuildConfig, building)
        build = BuildConfig(**building)
        chosen = chosen_task(task)
        settings = preset(config) if isinstance(config, str) else config
        if not isinstance(settings, TrainConfig):
            raise ConfigError(f"config={short(config)} must be a preset's name or a TrainConfig.")
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pema-")) if output is None else output
            adapter, _ = adapt(self, examples, chosen, folder, settings, build, rounds)
            adapter.name = "" if output is None else name_of(output)
        return adapter

    @contextlib.contextmanager
    def use(
        self, adapter: Adapter, schedule: Schedule | str | None = None, *, lambda_max: float | None = None
    ) -> Iterator[AttachedAdapter]:
        """Plug an adapter into `model` for as long as the block runs: its own `generate` and pipelines mix.

        Args:
            adapter: what `adapt` returned or `Adapter.from_pretrained` read.
            schedule: the adapter's weight per step, or a schedule's name; None is the adapter's own.
            lambda_max: the weight that a named schedule, or the adapter's own, begins with.

        Raises:
            ConfigError: a schedule that cannot be, not an adapter, or one is in use already.
            MismatchError: the adapter belongs to another PLM or chat template.
        """
        require_adapter(adapter)
        mixture = schedule_of(adapter, schedule, lambda_max)
        prompt_overhead_tokens = None
        if adapter.config.template is not None:
            template = require_task(adapter.config, task_of(adapter.config), self.tokenizer).template
            prompt_overhead_tokens = template.prompt_overhead_tokens(self.tokenizer)
        with attach(
            self.model,
            adapter,
            self.head(),
            mixture,
            prompt_overhead_tokens=prompt_overhead_tokens,
            description=self.description,
            tokenizer=self.tokenizer,
        ) as attached:
            self._used = _Used(adapter, mixture, attached)
            try:
                yield attached
            finally:
                self._used = None

    def generate(
        self,
        sources: Sequence[str | Example],
        adapter: Adapter | None = None,
        *,
        task: str | Task | None = None,
        schedule: Schedule | str | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> list[str]:
        """Generate a text for each source; see `pema.generate`.

        Args:
            sources: what fills the template's slot; an example stands for its source and its history.
            adapter: the adapter; None is the one in `use`, or the PLM alone.
            task: its name, or a task of your own; None is the adapter's.
            schedule: the adapter's weight per step, or a schedule's name; None is the adapter's own.
            settings: fields of `GenerateConfig`, and further settings of the model's `generate`.

        Raises:
            DataError: a source is blank, or too long for the PLM.
            ConfigError: an invalid setting; neither adapter nor task.
            MismatchError: the adapter belongs to another PLM, task or template.
        """
        return self.generate_counted(sources, adapter, task=task, schedule=schedule, **settings).texts

    def generate_counted(
        self,
        sources: Sequence[str | Example],
        adapter: Adapter | None = None,
        *,
        task: str | Task | None = None,
        schedule: Schedule | str | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> GeneratedTexts:
        """Generate as `generate` does, and return counts with the texts."""
        chosen = None if task is None else chosen_task(task)
        used = self._used
        if used is None or adapter not in (None, used.adapter):
            return generate_counted(self, adapter, sources, chosen, schedule, **settings)
        _require_own_schedule(schedule, settings.get("lambda_max"))
        if self.generator is not self.model:
            return generate_counted(self, used.adapter, sources, chosen, used.schedule, **settings)
        task = require_task(used.adapter.config, chosen or adapters_task(used.adapter), self.tokenizer)
        settings = with_own_ending(used.adapter.config, settings)
        return decode(self, self.generator, sources, task, used.attached.inputs, **settings)

    def classify(
        self,
        sources: Sequence[str | Example],
        labels: Sequence[str],
        adapter: Adapter | None = None,
        *,
        task: str | Task | None = None,
        schedule: Schedule | str | None = None,
        lambda_max: float | None = None,
        batch_size: int = GenerateConfig.batch_size,
        probabilities: bool = True,
    ) -> Classification:
        """Choose the most probable label of each source; see `pema.classify`.

        Args:
            sources: what fills the template's slot; an example stands for its source and its history.
            labels: the labels to choose from, as they are written in the targets of training.
            adapter: the adapter; None is the one in `use`, or the PLM alone.
            task: its name, or a task of your own; None is the adapter's.
            schedule: the adapter's weight per step, or a schedule's name; None is the adapter's own.
            lambda_max: the weight that a named schedule, or the adapter's own, begins with.
            batch_size: maximum number of sources per batch.
            probabilities: whether to compute the probability of every label; without, the choice is several times
                faster with many labels.

        Returns:
            The choices, and the probability of every label.

        Raises:
            DataError: a source is blank, or too long for the PLM; or a label cannot be a target.
            ConfigError: no labels, a label that is blank or given twice, an invalid setting; neither adapter nor task.
            MismatchError: the adapter belongs to another PLM, task or template.
        """
        chosen = None if task is None else chosen_task(task)
        settings: dict[str, Any] = {"batch_size": batch_size, "probabilities": probabilities}
        used = self._used
        if used is None or adapter not in (None, used.adapter):
            return classify(self, adapter, sources, labels, chosen, schedule, lambda_max=lambda_max, **settings)
        _require_own_schedule(schedule, lambda_max)
        if self.generator is not self.model:
            return classify(self, used.adapter, sources, labels, chosen, used.schedule, **settings)
        task = require_task(used.adapter.config, chosen or adapters_task(used.adapter), self.tokenizer)
        return choose_labels(self, self.generator, sources, labels, task, used.attached.inputs, **settings)

    @property
    def description(self) -> PLMDescription:
        """Description of the PLM."""
        return self._plm.description

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The PLM's tokenizer."""
        return self._plm.tokenizer

    @property
    def model(self) -> PreTrainedModel:
        """A causal language model of transformers whose `generate` decodes with this PLM."""
        return self._plm.model

    @property
    def generator(self) -> PreTrainedModel:
        """The causal language model whose `generate` does not depend on the other rows of a batch."""
        return self._plm.generator

    def head(self) -> Head:
        """Return the head."""
        return self._plm.head()

    def represent(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        batch_tokens: int = BATCH_TOKENS,
        skip: frozenset[int] = frozenset(),
    ) -> Iterator[ContextRepresentations]:
        """Return representations of `teacher` contexts; see `pema.owner.contract.PLM.represent`."""
        return self._plm.represent(sequences, starts, batch_tokens=batch_tokens, skip=skip)

    def predict(
        self,
        prompts: Sequence[Sequence[int]],
        steps: Sequence[int],
        *,
        batch_tokens: int = BATCH_TOKENS,
        skip: frozenset[int] = frozenset(),
    ) -> Iterator[ContextRepresentations]:
        """Return representations of `predicted` contexts; see `pema.owner.contract.PLM.predict`."""
        return self._plm.predict(prompts, steps, batch_tokens=batch_tokens, skip=skip)

    @property
    def batch_tokens(self) -> int:
        """Maximum tokens of a batch suited to the PLM's device."""
        return suited_tokens(self._plm)

    def forecast(self, contexts: Contexts, lengths: Sequence[int]) -> list[str]:
        """Check the requests of a build against the owner's limits; see `pema.owner.contract.Metered.forecast`."""
        return self._plm.forecast(contexts, lengths) if isinstance(self._plm, Metered) else []

    def prompt_prefix(self, prompts: Sequence[Sequence[int]]) -> PromptPrefix | None:
        """Encode the common prefix of prompts; see `pema.owner.contract.SharesPrefix.prompt_prefix`."""
        return self._plm.prompt_prefix(prompts) if isinstance(self._plm, SharesPrefix) else None

    @property
    def proposer(self) -> Proposer | None:
        """The side of an API that gives its likeliest tokens only; None if the PLM decodes itself."""
        return self._plm.proposer if isinstance(self._plm, GivesProposals) else None

    def open_session(self, prompts: Sequence[Sequence[int]]) -> Session:
        """Open a decoding session; see `pema.owner.contract.PLM.open_session`."""
        return self._plm.open_session(prompts)


class _Used(NamedTuple):
    """The adapter of a `use` block."""

    adapter: Adapter
    schedule: Schedule
    attached: AttachedAdapter


def _require_own_schedule(schedule: Schedule | str | None, lambda_max: float | None) -> None:
    if schedule is not None or lambda_max is not None:
        raise ConfigError("inside `use` the schedule is the one that `use` was given: give it there.")
