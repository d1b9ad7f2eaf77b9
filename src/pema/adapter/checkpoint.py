"""Checkpoints: a resumed training gives bit for bit the result of an uninterrupted one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pema.adapter.config import MOST, TrainConfig
from pema.errors import AdapterError, ConfigError, DataError, MismatchError
from pema.files import parse_json, remove, writing
from pema.schema import from_json, option, short
from pema.tensors import is_finite, read_header, save_tensors

FORMAT = 1
FREE = ("device", "checkpoint_every", "log_every", "fit_rank")
"""Settings that a resumed run may change: the result does not depend on them."""


@dataclass
class State:
    """State of the training, except tensors. Dropout masks and batch orders follow from the seed and these counts.

    Attributes:
        epoch: number of finished epochs.
        batch: number of finished batches of the current epoch.
        step: number of finished optimizer steps.
        lowest: lowest held-out loss so far; None if nothing is held out.
        best_epoch: the epoch of that loss; 0 is the start.
        since: number of epochs since then.
        sums: [pairs, total, reconstruction, prediction], each loss times pairs, over the current epoch.
        seconds: training time without reconstruction.
        log_bytes: length of the log in bytes.
        figures: measured figures so far.
        stopped: whether training has ended.
    """

    epoch: int = option(0, least=0, most=MOST)
    batch: int = option(0, least=0)
    step: int = option(0, least=0)
    lowest: float | None = None
    best_epoch: int = option(0, least=0, most=MOST)
    since: int = option(0, least=0, most=MOST)
    sums: tuple[float, ...] = option((0.0,) * 4, longest=4, least=-1e38, most=1e38)
    seconds: float = option(0.0, least=0.0)
    log_bytes: int = option(0, least=0)
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    stopped: bool = False

    def __post_init__(self) -> None:
        if len(self.sums) != 4:
            raise ConfigError(f"sums has {len(self.sums)} items, not 4.")


@dataclass(frozen=True)
class _Stored:
    """The JSON in a checkpoint's header."""

    config: Mapping[str, Any]
    memory: str
    state: State


class Checkpoint:
    """One safetensors file, replaced atomically: tensors, and the rest as JSON in its header.

    It is one file, so that a kill at any moment leaves either the old state or the new one, never parts of both.
    """

    def __init__(self, output: Path, config: TrainConfig, memory: str) -> None:
        """Tie the checkpoint to the run that it belongs to.

        Args:
            output: the adapter's folder.
            config: settings of the run.
            memory: digest of the memory.
        """
        self.folder = output / "checkpoint"
        self.file = self.folder / "state.safetensors"
        self.config, self.memory = config, memory

    def exists(self) -> bool:
        """Return whether there is a checkpoint."""
        return self.file.exists()

    def save(self, state: State, tensors: Mapping[str, Tensor]) -> None:
        """Replace the checkpoint.

        Raises:
            StorageError: writing failed; the previous checkpoint is unchanged.
        """
        values = {"format": FORMAT, "config": self.config.to_dict(), "memory": self.memory, "state": asdict(state)}
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        header = {"checkpoint": json.dumps(values)}
        # Only its owner may read it: with differential privacy it contains the key of the noise.
        with writing(self.file, private=True) as temporary:
            save_tensors(stored, temporary, header | {"digest": _digest(stored, header["checkpoint"])})

    def load(
        self, wanted: Mapping[str, Iterable[int]], optional: Mapping[str, Iterable[int]]
    ) -> tuple[State, dict[str, Tensor]]:
        """Read the checkpoint.

        Args:
            wanted: shapes of the tensors that it must contain, by name.
            optional: shapes of tensors that it may contain; those with the same prefix (to the last dot) only together.

        Raises:
            AdapterError: it is damaged or has another format.
            MismatchError: it belongs to other settings or another memory; the message names the first that differs.
        """
        remedy = f"remove {self.folder} and train without --resume."
        try:
            header = read_header(self.file)
            values = parse_json(header.texts["checkpoint"].encode(), "its header")
            version = values.pop("format", None)
            if version != FORMAT:
                raise AdapterError(f"the checkpoint {self.file} has format {short(version)}, not {FORMAT}: {remedy}")
            stored = from_json(_Stored, values)
            _require_shapes({name: place.shape for name, place in header.places.items()}, wanted, optional)
            with safe_open(self.file, framework="pt") as opened:
                # Copies, so that every tensor is aligned as in an uninterrupted run: products may depend on it.
                tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
            if header.texts.get("digest") != _digest(tensors, header.texts["checkpoint"]):
                raise DataError("its digest does not match")
            for name, tensor in tensors.items():
                if not is_finite(tensor):
                    raise DataError(f"{name} contains NaN or infinity")
        except (SafetensorError, OSError, KeyError, ConfigError, DataError) as error:
            raise AdapterError(f"the checkpoint {self.file} is damaged ({error}): {remedy}") from error
        require_same_run(stored.config, stored.memory, self.config, self.memory, f"the checkpoint {self.folder}")
        return stored.state, tensors

    def remove(self) -> None:
        """Remove the checkpoint, after the training has ended."""
        remove(self.folder)


def _require_shapes(
    stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Iterable[int]], optional: Mapping[str, Iterable[int]]
) -> None:
    groups = {name.rpartition(".")[0] or name for name in stored.keys() & optional.keys()}
    due = set(wanted) | {name for name in optional if (name.rpartition(".")[0] or name) in groups}
    if set(stored) != due:
        raise DataError(f"it has the tensors {', '.join(map(short, sorted(stored)))}, not {', '.join(sorted(due))}")
    for name, shape in ({**wanted, **optional}).items():
        if name in stored and stored[name] != tuple(shape):
            raise DataError(f"{name} has the shape {stored[name]}, not {tuple(shape)}")


def require_same_run(
    settings: Mapping[str, Any], memory: str | None, config: TrainConfig, here: str, what: str
) -> None:
    """Refuse the files of a run with other settings or another memory.

    Args:
        settings: the settings stored in `what`.
        memory: the memory's digest stored in `what`.
        config: the settings of this run.
        here: the digest of this run's memory.
        what: name of the files, for the message.

    Raises:
        MismatchError: they differ; the message names the first setting that differs, or the memory.
    """
    remedy = "resume with the same settings and memory, or train into another folder."
    current = config.to_dict()
    # A setting of a later version of pema has its default in files that lack it.
    settings = {field.name: field.default for field in dataclasses.fields(TrainConfig)} | dict(settings)
    for name in [n for n in {**current, **settings} if n not in FREE]:
        if settings.get(name) != current.get(name):
            raise MismatchError(
                f"{what} was made with {short(name)[1:-1]}={short(settings.get(name))}, this run has "
                f"{short(name)[1:-1]}={current.get(name)!r}: {remedy}"
            )
    if memory != here:
        raise MismatchError(f"{what} was made with another memory ({short(memory)[1:13]}, not {here[:12]}): {remedy}")


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the optimizer's moments and step counts by name: "optimizer.A.exp_avg" and so on."""
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def optimizer_shapes(parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that `optimizer_tensors` returns after a step."""
    moments = ("exp_avg", "exp_avg_sq")
    shapes = {f"optimizer.{name}.{key}": tuple(p.shape) for name, p in parameters.items() for key in moments}
    return shapes | {f"optimizer.{name}.step": () for name in parameters}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Restore the state that `optimizer_tensors` returned."""
    for name, parameter in parameters.items():
        prefix = f"optimizer.{name}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if state:
            # Adam keeps its step count on the CPU, or on the parameter's device if it is fused.
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}


def _digest(tensors: Mapping[str, Tensor], header: str) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
