"""The emulator of Offsite-Tuning: a PLM with fewer middle layers, which the PLM owner may hand out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from pema.errors import ConfigError, DataError, OwnerError
from pema.files import read_json, write_json
from pema.methods.tuned import twin
from pema.owner.local import LocalPLM
from pema.schema import from_json

MODEL, PLAN = "emulator", "emulator.json"
TOLERANCE = 1e-3
"""Largest relative difference between the logits of the emulator and of its reloaded copy."""


@dataclass(frozen=True)
class Plan:
    """Selection of the PLM's layers for the emulator.

    Attributes:
        layers: number of layers of the PLM.
        adapters: number of first layers, and of last layers, that form the adapter.
        kept: indices of the middle layers that the emulator keeps, ascending.
    """

    layers: int
    adapters: int
    kept: tuple[int, ...]

    @classmethod
    def of(cls, layers: int, adapters: int | None, keep: float) -> Plan:
        """Keep the fraction `keep` of the middle layers, evenly spread, including their first and last.

        Raises:
            ConfigError: the PLM has too few layers for this number of adapter layers.
        """
        if adapters is None:
            adapters = 2 if layers >= 8 else 1
        middle = layers - 2 * adapters
        if middle < 1:
            raise ConfigError(
                f"offsite: the PLM has {layers} layers, so adapters={adapters} at each end leave no middle layer to "
                "compress: choose a smaller value of adapters, or a deeper PLM."
            )
        count = max(1, round(keep * middle))
        # A single layer is the central one.
        places = [(middle - 1) / 2] if count == 1 else [i * (middle - 1) / (count - 1) for i in range(count)]
        return cls(layers, adapters, tuple(adapters + round(place) for place in places))

    @property
    def chosen(self) -> list[int]:
        """Indices of all layers of the emulator, ascending."""
        ends = range(self.adapters), range(self.layers - self.adapters, self.layers)
        return [*ends[0], *self.kept, *ends[1]]

    def write(self, folder: Path) -> None:
        """Write the plan next to the emulator."""
        write_json(folder / PLAN, {"layers": self.layers, "adapters": self.adapters, "kept": list(self.kept)})

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """Read a plan written by `write`.

        Raises:
            DataError: the plan is missing or damaged.
        """
        try:
            return from_json(cls, read_json(folder / PLAN))
        except ConfigError as error:
            raise DataError(f"{folder / PLAN} is not a valid emulator plan: {error} Prepare it again.") from error


def decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """Return the module that holds the decoder's layers, and the name of their list: `getattr(module, name)`.

    The layers are the longest list of modules of one class that is not inside another list.

    Raises:
        OwnerError: there is no such list.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {
        name: layers
        for name, layers in lists.items()
        if len({type(layer) for layer in layers}) == 1 and not any(name.startswith(f"{other}.") for other in lists)
    }
    if not outer:
        raise OwnerError(
            f"{type(model).__name__} cannot be shortened: it has no list of layers of one class. Choose another method."
        )
    parent, _, name = max(outer, key=lambda each: len(outer[each])).rpartition(".")
    return model.get_submodule(parent), name


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder's layers; see `decoder_layers`."""
    layers: nn.ModuleList = getattr(*decoder_layers(model))
    return layers


def adapter_parameters(model: PreTrainedModel, adapters: int) -> dict[str, nn.Parameter]:
    """Return the weights of the first and last layers, under names that are the same in the PLM and the emulator."""
    layers = layers_of(model)
    positions = {f"first.{i}": layers[i] for i in range(adapters)}
    positions |= {f"last.{i}": layers[len(layers) - adapters + i] for i in range(adapters)}
    return {f"{position}.{name}": p for position, layer in positions.items() for name, p in layer.named_parameters()}


def shortened(model: PreTrainedModel, chosen: Sequence[int]) -> PreTrainedModel:
    """Build a twin of the model with only the chosen layers, and the matching configuration."""
    short = twin(model)
    parent, name = decoder_layers(short)
    layers = getattr(parent, name)
    count = len(layers)
    setattr(parent, name, nn.ModuleList([layers[i] for i in chosen]))
    for number, layer in enumerate(getattr(parent, name)):
        for module in layer.modules():
            # The index of the layer's keys and values in the cache.
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number
    config = short.config.get_text_config()
    for field, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(config, field, [value[i] for i in chosen])
    config.num_hidden_layers = len(chosen)
    return short


def save_emulator(model: PreTrainedModel, plm: LocalPLM, folder: Path) -> None:
    """Write the emulator as a PLM that transformers can load, and verify that the loaded model is the same.

    Raises:
        OwnerError: the configuration does not fully describe the shortened model.
    """
    model.save_pretrained(folder / MODEL)
    plm.tokenizer.save_pretrained(folder / MODEL)
    # On the same device: products on different devices round differently.
    loaded = load_emulator(folder, str(model.dtype).removeprefix("torch.")).model.to(model.device)
    tokens = torch.arange(12)[None] % plm.head().vocabulary_size
    with torch.no_grad():
        expected, got = (each(input_ids=tokens.to(each.device)).logits.float().cpu() for each in (model, loaded))
    if not (expected - got).abs().max() <= TOLERANCE * expected.abs().max():
        raise OwnerError(
            f"{type(model).__name__} with {len(layers_of(model))} of its layers gives other logits after it is saved "
            "and loaded: this architecture cannot be shortened. Choose another method."
        )


def load_emulator(folder: Path, dtype: str) -> LocalPLM:
    """Load an emulator written by `save_emulator`."""
    return LocalPLM.load(folder / MODEL, dtype=dtype)
