"""The log-probabilities of all tokens that a recovery has received, on the disk until the head is recovered.

Each answer is a file of its own, so that a kill loses none that was paid for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pema.errors import DataError, MismatchError, OwnerError, StorageError
from pema.files import TEMPORARY, clear_below, read_json, seal, unseal, write_json

PLAN = "plan.json"
FORMAT = 1
LONGEST = 16
"""Maximum number of random tokens in a context."""

_NAME = "log_probabilities"


def random_contexts(tokens: Sequence[int], begin: Sequence[int], count: int, seed: int) -> list[list[int]]:
    """Return contexts of 1 to `LONGEST` random tokens; a larger `count` adds contexts at the end.

    Args:
        tokens: the tokens to draw from.
        begin: the tokens that begin every text.
        count: number of contexts.
        seed: seed of the draw.
    """
    drawn = random.Random(seed)
    return [[*begin, *drawn.choices(tokens, k=drawn.randint(1, LONGEST))] for _ in range(count)]


class Answers:
    """Rows of log-probabilities of all tokens, in a folder."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """Open the folder, or create it.

        Args:
            folder: the folder.
            identity: what identifies the model and the contexts; answers to others are refused.

        Raises:
            MismatchError: it has answers of another model, tokenizer or seed.
            OwnerError: its plan cannot be read.
        """
        self._folder = folder
        plan = {"format": FORMAT, **identity}
        if (folder / PLAN).exists():
            clear_below(folder)
            try:
                stored = unseal(read_json(folder / PLAN))
            except DataError as error:
                raise OwnerError(f"{folder / PLAN} cannot be used: {error} Remove {folder}, and begin anew.") from error
            if stored != plan:
                name = next(name for name in plan if stored.get(name) != plan[name])
                raise MismatchError(
                    f"{folder} has answers for another {name}: {stored.get(name)}, expected {plan[name]}. Choose "
                    "another output, or remove that folder."
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / PLAN, seal(plan), private=True)
        self._count = len(list(folder.glob("answer-*.safetensors")))
        self._means: list[Tensor] = [self._row(i).mean() for i in range(self._count)]

    def __len__(self) -> int:
        return self._count

    def add(self, log_probabilities: Tensor) -> None:
        """Store the (V,) answer to the next context."""
        row = log_probabilities.float()
        path = self._path(self._count)
        partial = path.with_suffix(TEMPORARY)
        # Without waiting for the disk, which takes longer than an answer: what a loss of power damages can be requested
        # again, and a kill damages nothing.
        try:
            save_file({_NAME: row.contiguous()}, partial)
            partial.replace(path)
        except (SafetensorError, OSError) as error:
            raise StorageError(f"cannot write {path}: {error}. What was answered before is kept.") from error
        self._means.append(row.double().mean())
        self._count += 1

    def columns(self, rows: Sequence[int], start: int, stop: int) -> Tensor:
        """Return centred log-probabilities of a range of tokens, (len(rows), stop - start) float64."""
        result = torch.empty(len(rows), stop - start, dtype=torch.float64)
        for place, row in enumerate(rows):
            with safe_open(self._path(row), framework="pt") as opened:
                result[place] = opened.get_slice(_NAME)[start:stop].double() - self._means[row]
        return result

    def _row(self, row: int) -> Tensor:
        try:
            with safe_open(self._path(row), framework="pt") as opened:
                values: Tensor = opened.get_tensor(_NAME)
                return values.double()
        except (SafetensorError, OSError) as error:
            raise OwnerError(
                f"{self._path(row)} cannot be read: {error}. Remove it and the answers after it: they are requested "
                "again."
            ) from error

    def _path(self, row: int) -> Path:
        return self._folder / f"answer-{row:06d}.safetensors"
