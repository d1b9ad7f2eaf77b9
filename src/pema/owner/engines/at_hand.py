"""What is at hand of a model that an engine serves: a released head bundle, a GGUF file, or a folder with the model."""

from __future__ import annotations

from pema.errors import OwnerError
from pema.owner import loading
from pema.owner.bundle import SETTINGS_FILE
from pema.owner.derivation import derive_head
from pema.owner.head import Norm
from pema.owner.llamacpp.material import Material, material
from pema.owner.sources.served import Served


def material_of(served: Served, engine: str) -> Material:
    """Read the LM head and the tokenizer.

    Args:
        served: the model; a folder with the whole model is loaded once, and only its head is kept.
        engine: what runs it, for the messages.

    Raises:
        OwnerError: the file or folder cannot be read, or the head is not supported.
    """
    folder = served.model
    if (folder / "config.json").is_file() and not (folder / SETTINGS_FILE).exists():
        return _of_model(served, engine)
    return material(served, engine)


def _of_model(served: Served, engine: str) -> Material:
    model, tokenizer, _, _ = loading.load(served.model, dtype=None, device_map=None, revision=None)
    head = derive_head(model, "head_input")
    norm: Norm | None = None
    try:
        before = derive_head(model, "norm_input")
        norm = before.norm if before.projection is None else None
    except OwnerError:  # the head does not need it
        pass
    return Material(
        name=served.name,
        fingerprint="",
        architecture=str(model.config.model_type),
        weights=f"run by {engine}",
        tokenizer=tokenizer,
        ends=loading.eos_token_ids(model, tokenizer),
        heads=(head,),
        rows=lambda tokens: head.weight[list(tokens)].float(),
        norm=norm,
        max_length=loading.max_length(model, tokenizer),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=None,
    )
