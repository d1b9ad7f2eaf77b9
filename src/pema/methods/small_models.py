"""Small LMs beside a PLM: made from its parts, loaded, and their distributions mixed with the PLM's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pema.devices import device_named
from pema.errors import ConfigError, MismatchError
from pema.generation.mixture import log_weights, mix_logits
from pema.methods.contract import Job
from pema.methods.emulator import layers_of, shortened
from pema.methods.tuned import load_trained, twin
from pema.owner.causal_lm import output_embedding
from pema.owner.contract import PLM
from pema.owner.loading import tokenizer_fingerprint
from pema.owner.local import LocalPLM
from pema.tasks.registry import Task


def first_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """Build a twin of the model with only its first layers.

    Raises:
        ConfigError: the model has fewer layers.
        OwnerError: the layers cannot be identified.
    """
    require_layers(model, count)
    return shortened(model, range(count))


def require_layers(model: PreTrainedModel, count: int) -> None:
    """Refuse a model with fewer layers; see `first_layers`."""
    layers = len(layers_of(model))
    if count > layers:
        raise ConfigError(
            f"small-lm: layers={count} is too large: the PLM has {layers} layers. Choose a smaller value."
        )


def with_random_layers(model: PreTrainedModel) -> PreTrainedModel:
    """Build a model of the same shape with random weights; LM head and input embeddings are the head of `model`.

    Input embeddings of another shape than the head's stay random.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: PreTrainedModel = type(model)(copy.deepcopy(model.config)).to(model.device)
    for parameter in made.parameters():
        # Buffers (frequencies of rotary positions) are float32 in a loaded model of any dtype.
        parameter.data = parameter.data.to(model.dtype)
    head, embeddings = output_embedding(made), made.get_input_embeddings()
    head.load_state_dict(output_embedding(model).state_dict())
    if embeddings.weight.shape == head.weight.shape:
        embeddings.weight.data.copy_(head.weight)
    return made.eval().requires_grad_(False)


def load_small(source: str | Path, plm: PLM, job: Job) -> LocalPLM:
    """Load the untuned small LM in the PLM's precision and on its device; beside a PLM elsewhere, in the job's.

    Raises:
        MismatchError: it tokenises texts or writes prompts in another way than the PLM.
        OwnerError: it cannot be loaded.
    """
    here = isinstance(plm, LocalPLM)
    dtype = str(plm.model.dtype).removeprefix("torch.") if here else job.plm_dtype
    small = LocalPLM.load(source, dtype=dtype)
    require_same_prompts(small.description.name, small.tokenizer, plm, job.task)
    small.model.to(plm.model.device if here else device_named(job.device))
    return small


def require_same_prompts(name: str, tokenizer: PreTrainedTokenizerBase, plm: PLM, task: Task) -> None:
    """Refuse a small LM that tokenises texts or writes prompts in another way than the PLM; see `load_small`."""
    ours, template = plm.description, task.template
    if ours.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
        raise MismatchError(
            f"small-lm: {name} and {ours.name} have different tokenizers, so their probabilities of the next token "
            "cannot be mixed: choose a small LM of the PLM's own family."
        )
    if template.record(plm.tokenizer) != template.record(tokenizer):
        raise MismatchError(
            f"small-lm: {name} and {ours.name} have different chat templates, so their prompts differ: set chat = "
            "false, or choose a small LM with the PLM's chat template."
        )


def load_tuned(untuned: LocalPLM, path: Path) -> LocalPLM:
    """Build the tuned small LM beside the untuned one, from the weights that training stored.

    Raises:
        AdapterError: the file is missing or damaged.
        MismatchError: the file belongs to another small LM.
    """
    model = twin(untuned.model)
    load_trained(dict(model.named_parameters()), path)
    # The head is read from the model, so it is derived after the weights are replaced.
    return LocalPLM(model, untuned.tokenizer, name=f"{untuned.description.name}, tuned")


def combine(plm: Tensor, others: Sequence[Tensor], weight: float) -> Tensor:
    """Compute the logits of the combined distribution.

    Args:
        plm: (n, V), the PLM's logits.
        others: (n, V'), the logits of the tuned small LM, whose distribution is mixed with the PLM's; or those of the
            tuned and of the untuned one, whose difference is added. Models of a family pad the vocabulary differently:
            the rows between V and V' belong to no token.
        weight: w.

    Returns:
        (n, V) float32.
    """
    size = plm.shape[-1]
    if len(others) == 1:
        small = _resized(others[0].to(plm.device).float(), size, -torch.inf)
        rest, own = log_weights(torch.full((len(plm), 1, 1), weight, device=plm.device)).unbind(-1)
        return mix_logits(torch.stack((plm.float(), small), dim=1), rest, own)[:, 0]
    tuned, untuned = (each.to(plm.device).float() for each in others)
    # In a row that has ended both are -inf.
    return plm.float() + weight * _resized((tuned - untuned).nan_to_num(), size, 0.0)


def _resized(logits: Tensor, size: int, value: float) -> Tensor:
    return functional.pad(logits, (0, size - logits.shape[-1]), value=value)
