"""The emulator of Offsite-Tuning: a PLM with fewer layers in its middle, which its owner may hand out."""

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
"""Largest difference of logits, as a share of their size, between the emulator and what is loaded of it."""


@dataclass(frozen=True)
class Plan:
    """Which layers of the PLM the emulator has.

    Attributes:
        layers: of the PLM.
        adapters: how many of its first layers, and of its last ones, are the adapter.
        kept: numbers of the layers between them that the emulator keeps, rising.
    """

    layers: int
    adapters: int
    kept: tuple[int, ...]

    @classmethod
    def of(cls, layers: int, adapters: int | None, keep: float) -> Plan:
        """Keep the share `keep` of the middle layers, evenly spread, its first and last among them.

        Raises:
            ConfigError: the PLM has too few layers for so many adapters.
        """
        if adapters is None:
            adapters = 2 if layers >= 8 else 1
        middle = layers - 2 * adapters
        if middle < 1:
            raise ConfigError(
                f"offsite: the PLM has {layers} layers, so adapters={adapters} at either end leave none between them "
                "to compress: choose fewer adapters, or a deeper PLM."
            )
        count = max(1, round(keep * middle))
        # One layer alone is the one in the middle.
        places = [(middle - 1) / 2] if count == 1 else [i * (middle - 1) / (count - 1) for i in range(count)]
        return cls(layers, adapters, tuple(adapters + round(place) for place in places))

    @property
    def chosen(self) -> list[int]:
        """Numbers of all layers of the emulator, rising."""
        ends = range(self.adapters), range(self.layers - self.adapters, self.layers)
        return [*ends[0], *self.kept, *ends[1]]

    def write(self, folder: Path) -> None:
        """Store it beside the emulator."""
        write_json(folder / PLAN, {"layers": self.layers, "adapters": self.adapters, "kept": list(self.kept)})

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """The plan that `write` stored.

        Raises:
            DataError: there is none, or it is damaged.
        """
        try:
            return from_json(cls, read_json(folder / PLAN))
        except ConfigError as error:
            raise DataError(f"{folder / PLAN} is no plan of an emulator: {error} Prepare it again.") from error


def decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that holds the decoder's layers, and the name of their list in it: `getattr(module, name)`.

    The layers are the longest list of modules of one class that lies in no other list.

    Raises:
        OwnerError: there is none.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {
        name: found
        for name, found in lists.items()
        if len({type(layer) for layer in found}) == 1 and not any(name.startswith(f"{other}.") for other in lists)
    }
    if not outer:
        raise OwnerError(
            f"{type(model).__name__} is not understood: it has no list of layers of one kind, so none can be left out."
        )
    parent, _, name = max(outer, key=lambda each: len(outer[each])).rpartition(".")
    return model.get_submodule(parent), name


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers; see `decoder_layers`."""
    found: nn.ModuleList = getattr(*decoder_layers(model))
    return found


def adapter_parameters(model: PreTrainedModel, adapters: int) -> dict[str, nn.Parameter]:
    """The weights of the first and the last layers, under names that the PLM's and the emulator's have in common."""
    layers = layers_of(model)
    places = {f"first.{i}": layers[i] for i in range(adapters)}
    places |= {f"last.{i}": layers[len(layers) - adapters + i] for i in range(adapters)}
    return {f"{place}.{name}": p for place, layer in places.items() for name, p in layer.named_parameters()}


def shortened(model: PreTrainedModel, chosen: Sequence[int]) -> PreTrainedModel:
    """A twin of the model that has some of its layers only, with the configuration that goes with them."""
    found = twin(model)
    parent, name = decoder_layers(found)
    layers = getattr(parent, name)
    count = len(layers)
    setattr(parent, name, nn.ModuleList([layers[i] for i in chosen]))
    for number, layer in enumerate(getattr(parent, name)):
        for module in layer.modules():
            # Where a layer's keys and values lie in the cache.
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number
    config = found.config.get_text_config()
    for field, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(config, field, [value[i] for i in chosen])
    config.num_hidden_layers = len(chosen)
    return found


def save_emulator(model: PreTrainedModel, plm: LocalPLM, folder: Path) -> None:
    """Write the emulator as a PLM that transformers loads, and make sure that it is what will be loaded.

    Raises:
        OwnerError: the configuration does not tell how the shortened model is built.
    """
    model.save_pretrained(folder / MODEL)
    plm.tokenizer.save_pretrained(folder / MODEL)
    loaded = load_emulator(folder, str(model.dtype).removeprefix("torch.")).model
    tokens = torch.arange(12)[None] % plm.head().vocabulary_size
    with torch.no_grad():
        wanted, got = (each(input_ids=tokens.to(each.device)).logits.float().cpu() for each in (model, loaded))
    if not (wanted - got).abs().max() <= TOLERANCE * wanted.abs().max():
        raise OwnerError(
            f"{type(model).__name__} with {len(layers_of(model))} of its layers is not what its configuration makes of "
            "it: Offsite-Tuning is not supported for this architecture."
        )


def load_emulator(folder: Path, dtype: str) -> LocalPLM:
    """The emulator that `save_emulator` wrote."""
    return LocalPLM.load(folder / MODEL, dtype=dtype)
