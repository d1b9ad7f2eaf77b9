"""LoRA, IA3 and prefix-tuning, with the `peft` library on the unmodified PLM."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pema.adapter.config import LARGEST, WIDEST
from pema.errors import AdapterError, ConfigError
from pema.extras import require_library
from pema.methods.contract import AdaptedModel, Job, with_weights
from pema.methods.fine_tuning import FineTuning
from pema.schema import option

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from pema.owner.contract import PLM
    from pema.owner.local import LocalPLM

FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class PeftMethod(FineTuning):
    """Method of `peft`; the stored result is a PEFT adapter that `peft` itself can load.

    Attributes:
        remedy: advice for architectures that the method does not fit.
    """

    remedy: ClassVar[str]

    def require_libraries(self) -> None:
        """See `Method.require_libraries`."""
        require_library(self.name, "peft", "peft")

    @abstractmethod
    def config(self) -> PeftConfig:
        """Return the `peft` configuration of the method."""

    def trainable(self, plm: LocalPLM, prepared: Path) -> tuple[Any, Callable[[Path], None]]:
        """See `FineTuning.trainable`."""
        peft = _peft(self.name)
        # peft writes the name into the adapter, which must not contain a path.
        plm.model.name_or_path = plm.model.config._name_or_path = plm.description.name
        try:
            model = peft.get_peft_model(plm.model, self.config())
        except ValueError as error:  # modules that the architecture does not have, or has no default for
            raise self.misfit(plm, str(error)) from error
        return model, lambda output: model.save_pretrained(output, save_embedding_layers=False)

    def misfit(self, plm: LocalPLM, why: str) -> ConfigError:
        """Build the error for an architecture that the method does not fit."""
        return ConfigError(f"{self.name} does not fit {type(plm.model).__name__} ({why.rstrip('.')}): {self.remedy}")

    def adapted(self, plm: LocalPLM, trained: Path) -> Any:  # noqa: ANN401
        """Build a model with the trained adapter that shares the PLM's weights.

        Raises:
            AdapterError: the adapter is missing, damaged or belongs to another PLM.
        """
        from pema.methods.tuned import twin

        peft, model = _peft(self.name), twin(plm.model)
        try:
            return peft.PeftModel.from_pretrained(model, str(trained), local_files_only=True)
        except Exception as error:  # peft raises OSError, ValueError, RuntimeError and safetensors' own.
            raise AdapterError(
                f"{trained} has no {self.name} adapter that fits {type(model).__name__}: {error}. Train again."
            ) from error


class _Merged:
    """Mix-in for adapters that can be merged into the weights, so that a token takes no longer than with the PLM."""

    name: ClassVar[str]
    adapted: Callable[..., Any]

    def open(self, plm: PLM, job: Job, prepared: Path, trained: Path) -> AdaptedModel:
        """See `Method.open`; the adapter is merged into a separate copy of the weights."""
        from pema.methods.tuned import TunedModel

        # Without safe_merge peft changes the weights in place, and they are shared with the PLM.
        local = with_weights(plm, self.name)
        model: PreTrainedModel = self.adapted(local, trained).merge_and_unload(safe_merge=True)
        return TunedModel(local, model, job, trained / FILE)


@dataclass(frozen=True)
class LoRA(_Merged, PeftMethod):
    """W + alpha / r B A for the weights of linear layers (Hu et al., ICLR 2022, arXiv 2106.09685, equation 3).

    B is initially zero, so training starts from the PLM.

    Attributes:
        rank: r.
        alpha: numerator of the scale alpha / r.
        dropout: dropout on the input of A.
        target_modules: names of the layers, as `peft` takes them; "all-linear" means all except the LM head.
    """

    name: ClassVar[str] = "lora"
    remedy: ClassVar[str] = "set target_modules to names of its linear layers."
    default_grid: ClassVar[Mapping[str, Sequence[Any]]] = {"learning_rate": (1e-3, 3e-4, 3e-3)}

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

    All factors are initially 1, so training starts from the PLM.

    Attributes:
        target_modules: names of the layers; None means the default of `peft`, which exists for known architectures.
        feedforward_modules: those of them whose input is multiplied instead of their output; None as above.
    """

    name: ClassVar[str] = "ia3"
    remedy: ClassVar[str] = "set target_modules and feedforward_modules to names of its linear layers."
    default_grid: ClassVar[Mapping[str, Sequence[Any]]] = {"learning_rate": (2e-2, 5e-3, 5e-2)}

    learning_rate: float = option(2e-2, above=0.0, most=LARGEST)
    target_modules: Sequence[str] | None = None
    feedforward_modules: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.target_modules is None) != (self.feedforward_modules is None):
            raise ConfigError("ia3: target_modules and feedforward_modules need each other: give both, or neither.")

    def config(self) -> PeftConfig:
        """See `PeftMethod.config`."""
        return _peft(self.name).IA3Config(
            target_modules=_modules(self.target_modules),
            feedforward_modules=_modules(self.feedforward_modules),
            task_type="CAUSAL_LM",
        )


@dataclass(frozen=True)
class PrefixTuning(PeftMethod):
    """Learned keys and values before those of each layer (Li and Liang, ACL 2021, arXiv 2101.00190, section 4).

    The prefix stays in the key-value cache during generation, so a token attends to `prefix_length` more positions.

    Attributes:
        prefix_length: number of virtual tokens.
    """

    name: ClassVar[str] = "prefix-tuning"
    remedy: ClassVar[str] = "choose lora, which needs linear layers only."
    default_grid: ClassVar[Mapping[str, Sequence[Any]]] = {"learning_rate": (5e-2, 1e-2, 2e-3)}

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
        import torch

        if _slides(plm.model):
            raise self.misfit(plm, "its sliding-window attention does not reach the prefix")
        model, keep = super().trainable(plm, prepared)
        try:
            with torch.no_grad():
                model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
        except Exception as error:  # the type depends on how the architecture handles foreign keys and values
            raise self.misfit(plm, str(error)) from error
        return model, keep

    def open(self, plm: PLM, job: Job, prepared: Path, trained: Path) -> AdaptedModel:
        """See `Method.open`."""
        from pema.methods.tuned import TunedModel

        local = with_weights(plm, self.name)
        return TunedModel(local, _by_state(self.adapted(local, trained)), job, trained / FILE, self.prefix_length)


def _by_state(model: Any) -> Any:  # noqa: ANN401
    """Pass the prefix under the name that the model's `forward` uses for its state.

    peft reads the cache from, and writes the prefix to, `past_key_values`. A model whose state is called `cache` would
    receive both and use its own empty cache, so that the prefix would have no effect on generation.
    """
    from pema.owner.causal_lm import state_argument

    name = state_argument(model.get_base_model())
    if name not in (None, "past_key_values"):
        model.base_model_prepare_inputs_for_generation = _renaming(
            model.base_model_prepare_inputs_for_generation, name, "past_key_values"
        )
        model.prepare_inputs_for_generation = _renaming(model.prepare_inputs_for_generation, "past_key_values", name)
    return model


def _renaming(prepare: Callable[..., dict[str, Any]], before: str, after: str) -> Callable[..., dict[str, Any]]:
    """Wrap `prepare` so that one of the arguments that it returns is renamed."""

    def prepared(*args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401
        arguments = prepare(*args, **kwargs)
        if before in arguments:
            arguments[after] = arguments.pop(before)
        return arguments

    return prepared


def _slides(model: PreTrainedModel) -> bool:
    """Return whether some layer attends to a window of the last tokens only."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


def _modules(names: str | Sequence[str] | None) -> str | list[str] | None:
    return names if names is None or isinstance(names, str) else list(names)


def _peft(method: str) -> Any:  # noqa: ANN401
    require_library(method, "peft", "peft")
    import peft

    return peft
