"""LoRA, IA3 and prefix-tuning, by the `peft` library on the unmodified PLM."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from pema.adapter.config import LARGEST, WIDEST
from pema.errors import AdapterError, ConfigError
from pema.methods.contract import Adapted, Job
from pema.methods.fine_tuning import FineTuning
from pema.methods.tuned import Tuned, twin
from pema.owner.causal_lm import state_argument
from pema.owner.local import LocalPLM
from pema.schema import option

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class PeftMethod(FineTuning):
    """A method of `peft`; what is kept is a PEFT adapter, which `peft` itself loads too.

    Attributes:
        remedy: what to do where it does not fit an architecture.
    """

    remedy: ClassVar[str]

    @abstractmethod
    def config(self) -> PeftConfig:
        """The method in `peft`'s own terms."""

    def trainable(self, plm: LocalPLM, prepared: Path) -> tuple[Any, Callable[[Path], None]]:
        """See `FineTuning.trainable`."""
        peft = _peft(self.name)
        # peft writes it into the adapter, which is to hold no path.
        plm.model.name_or_path = plm.model.config._name_or_path = plm.description.name
        try:
            model = peft.get_peft_model(plm.model, self.config())
        except ValueError as error:  # modules that the architecture does not have, or has no default for
            raise self.misfit(plm, str(error)) from error
        return model, lambda output: model.save_pretrained(output, save_embedding_layers=False)

    def misfit(self, plm: LocalPLM, why: str) -> ConfigError:
        """The error for an architecture that the method cannot be used with."""
        return ConfigError(f"{self.name} does not fit {type(plm.model).__name__} ({why.rstrip('.')}): {self.remedy}")

    def adapted(self, plm: LocalPLM, trained: Path) -> Any:  # noqa: ANN401
        """A model beside the PLM with the trained adapter in it.

        Raises:
            AdapterError: the adapter is missing, damaged or of another PLM.
        """
        peft, model = _peft(self.name), twin(plm.model)
        try:
            return peft.PeftModel.from_pretrained(model, str(trained), local_files_only=True)
        except Exception as error:  # peft raises OSError, ValueError, RuntimeError and safetensors' own.
            raise AdapterError(
                f"{trained} holds no {self.name} adapter that fits {type(model).__name__}: {error}. Train again."
            ) from error


class _Merged:
    """Opening an adapter that can be multiplied into the weights: a token then takes the time that it takes the PLM."""

    adapted: Callable[..., Any]

    def open(self, plm: LocalPLM, job: Job, prepared: Path, trained: Path) -> Adapted:
        """See `Method.open`; the adapter is merged into weights of the adapted model's own."""
        # Without safe_merge peft adds to the weights in place, and those are the PLM's too.
        model: PreTrainedModel = self.adapted(plm, trained).merge_and_unload(safe_merge=True)
        return Tuned(plm, model, job, trained / FILE)


@dataclass(frozen=True)
class LoRA(_Merged, PeftMethod):
    """W + alpha / r B A for the weight of linear layers (Hu et al., ICLR 2022, arXiv 2106.09685, equation 3).

    B is zero at the start, so training starts from the PLM.

    Attributes:
        rank: r.
        alpha: of the scale alpha / r.
        dropout: on the input of A.
        target_modules: names of the layers, as `peft` takes them; "all-linear" is every one but the LM head.
    """

    name: ClassVar[str] = "lora"
    remedy: ClassVar[str] = "give target_modules that it has."

    rank: int = option(16, least=1, most=WIDEST)
    alpha: float = option(32.0, above=0.0, most=1e6)
    dropout: float = option(0.05, least=0.0, below=1.0)
    target_modules: str | Sequence[str] = "all-linear"

    def config(self) -> PeftConfig:
        """See `PeftMethod.config`."""
        return _peft(self.name).LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=_modules(self.target_modules),
            task_type="CAUSAL_LM",
        )


@dataclass(frozen=True)
class IA3(_Merged, PeftMethod):
    """Learned factors on keys, values and the feed-forward layer (Liu et al., NeurIPS 2022, arXiv 2205.05638).

    All factors are 1 at the start, so training starts from the PLM.

    Attributes:
        target_modules: names of the layers; None is `peft`'s choice, which it has for known architectures.
        feedforward_modules: those of them whose input is multiplied instead of their output; None as above.
    """

    name: ClassVar[str] = "ia3"
    remedy: ClassVar[str] = "give target_modules and feedforward_modules, names of its linear layers."

    learning_rate: float = option(2e-2, above=0.0, most=LARGEST)
    target_modules: Sequence[str] | None = None
    feedforward_modules: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.target_modules is None) != (self.feedforward_modules is None):
            raise ConfigError("ia3: target_modules and feedforward_modules belong together: give both or neither.")

    def config(self) -> PeftConfig:
        """See `PeftMethod.config`."""
        return _peft(self.name).IA3Config(
            target_modules=_modules(self.target_modules),
            feedforward_modules=_modules(self.feedforward_modules),
            task_type="CAUSAL_LM",
        )


@dataclass(frozen=True)
class PrefixTuning(PeftMethod):
    """Learned keys and values in front of every layer's own (Li and Liang, ACL 2021, arXiv 2101.00190, section 4).

    The prefix stays in the key-value cache when generating, so a token attends to `prefix_length` positions more.

    Attributes:
        prefix_length: virtual tokens.
    """

    name: ClassVar[str] = "prefix-tuning"
    remedy: ClassVar[str] = "choose lora, which asks only for linear layers."

    learning_rate: float = option(5e-2, above=0.0, most=LARGEST)
    prefix_length: int = option(20, least=1, most=1 << 20)

    @property
    def virtual_tokens(self) -> int:
        """See `FineTuning.virtual_tokens`."""
        return self.prefix_length

    def config(self) -> PeftConfig:
        """See `PeftMethod.config`."""
        return _peft(self.name).PrefixTuningConfig(num_virtual_tokens=self.prefix_length, task_type="CAUSAL_LM")

    def trainable(self, plm: LocalPLM, prepared: Path) -> tuple[Any, Callable[[Path], None]]:
        """See `FineTuning.trainable`."""
        if _slides(plm.model):
            raise self.misfit(plm, "its attention slides past the prefix")
        model, keep = super().trainable(plm, prepared)
        try:
            with torch.no_grad():
                model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
        except Exception as error:  # whatever the architecture makes of keys and values that are not its own
            raise self.misfit(plm, str(error)) from error
        return model, keep

    def open(self, plm: LocalPLM, job: Job, prepared: Path, trained: Path) -> Adapted:
        """See `Method.open`."""
        return Tuned(plm, _by_state(self.adapted(plm, trained)), job, trained / FILE, self.prefix_length)


def _by_state(model: Any) -> Any:  # noqa: ANN401
    """Hand the prefix on by the name that the model's `forward` has for its state.

    peft looks for the cache and puts the prefix under `past_key_values`. A model whose state is called `cache` is given
    both and takes its own empty one, so that the prefix has no part in what it generates.
    """
    name = state_argument(model.get_base_model())
    if name not in (None, "past_key_values"):
        model.base_model_prepare_inputs_for_generation = _renaming(
            model.base_model_prepare_inputs_for_generation, name, "past_key_values"
        )
        model.prepare_inputs_for_generation = _renaming(model.prepare_inputs_for_generation, "past_key_values", name)
    return model


def _renaming(prepare: Callable[..., dict[str, Any]], before: str, after: str) -> Callable[..., dict[str, Any]]:
    """`prepare` with one of the arguments that it returns renamed."""

    def prepared(*args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401
        arguments = prepare(*args, **kwargs)
        if before in arguments:
            arguments[after] = arguments.pop(before)
        return arguments

    return prepared


def _slides(model: PreTrainedModel) -> bool:
    """Whether some layer attends to a window of the last tokens only."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


def _modules(names: str | Sequence[str] | None) -> str | list[str] | None:
    return names if names is None or isinstance(names, str) else list(names)


def _peft(method: str) -> Any:  # noqa: ANN401
    try:
        import peft
    except ImportError:
        raise ConfigError(f"{method} needs the peft library: pip install 'pema[peft]'.") from None
    return peft
