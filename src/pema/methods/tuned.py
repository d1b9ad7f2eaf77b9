"""A PLM with some trained weights; it shares the memory of the other weights with the original PLM."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pema.errors import AdapterError, MismatchError, OwnerError
from pema.files import writing
from pema.generation.batches import plain
from pema.generation.classification import Classification, choose_labels
from pema.generation.decoding import GeneratedTexts, decode
from pema.methods.contract import AdaptedModel, Job
from pema.methods.targets import encode, mean_cross_entropy, perplexity_of
from pema.owner.local import LocalPLM
from pema.tasks.example import Example
from pema.tensors import save_tensors


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Build a second model that shares the weights of `model` in memory.

    Replacing weights of one model does not affect the other. Assign new weights to `parameter.data`; never write into
    the shared ones.

    Raises:
        OwnerError: the model is spread over several devices.
    """
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise OwnerError(
            f"the weights of {type(model).__name__} are spread over several devices by accelerate, so an adapted model "
            "cannot share them: load the PLM on one device."
        )
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def save_trained(parameters: Mapping[str, nn.Parameter], path: Path) -> None:
    """Write the trained parameters to a safetensors file."""
    with writing(path) as temporary:
        save_tensors({name: p for name, p in parameters.items() if p.requires_grad}, temporary)


def load_trained(parameters: Mapping[str, nn.Parameter], path: Path) -> None:
    """Load parameters from a file written by `save_trained`.

    Raises:
        AdapterError: the file is missing or damaged.
        MismatchError: the file belongs to another model.
    """
    try:
        stored: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read ({error}): train again.") from error
    for name, value in stored.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != value.shape:
            has = "is not a weight of" if parameter is None else f"has shape {tuple(parameter.shape)} in"
            raise MismatchError(
                f"{path} was trained on another PLM: {name} {tuple(value.shape)} {has} this PLM. Use that PLM."
            )
        parameter.data = value.to(parameter.device, parameter.dtype)


class TunedModel(AdaptedModel):
    """Adapted PLM that is a separate model, so the original PLM stays unchanged.

    Attributes:
        model: the model that generates.
    """

    def __init__(
        self,
        plm: LocalPLM,
        model: Any,  # noqa: ANN401
        job: Job,
        kept: Path,
        virtual_tokens: int = 0,
    ) -> None:
        self.model = model.eval()
        self._plm, self._job, self._kept, self._virtual_tokens = plm, job, kept, virtual_tokens

    @property
    def disk_bytes(self) -> int:
        """Bytes of the file that training stored."""
        return self._kept.stat().st_size

    def generate(self, sources: Sequence[str | Example], **settings: Any) -> GeneratedTexts:  # noqa: ANN401
        """See `AdaptedModel.generate`."""
        return decode(
            self._plm,
            self.model,
            sources,
            self._job.task,
            plain,
            **dict(self._job.decoding) | settings,
            max_length=self._plm.max_length - self._virtual_tokens,
        )

    def classify(
        self,
        sources: Sequence[str | Example],
        labels: Sequence[str],
        **settings: Any,  # noqa: ANN401
    ) -> Classification:
        """See `AdaptedModel.classify`."""
        window = self._plm.max_length - self._virtual_tokens
        return choose_labels(self._plm, self.model, sources, labels, self._job.task, **settings, max_length=window)

    def perplexity(self, examples: Sequence[Example]) -> float:
        """See `AdaptedModel.perplexity`."""
        return perplexity(self._plm, self.model, self._job, examples, self._virtual_tokens)


def perplexity(
    plm: LocalPLM,
    model: Any,  # noqa: ANN401
    job: Job,
    examples: Sequence[Example],
    virtual_tokens: int = 0,
) -> float:
    """Compute the perplexity of examples under a model derived from the PLM; see `AdaptedModel.perplexity`."""
    tokens = encode(plm, job.task.template, examples, virtual_tokens)
    return perplexity_of(mean_cross_entropy(model, tokens, range(len(examples))))
