"""The training log: one JSON object per line, and TensorBoard on request."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from pema.errors import StorageError
from pema.extras import require_library
from pema.files import sync


class Log:
    """Writer of `training.jsonl`; a resumed run first removes incomplete lines and lines after its checkpoint."""

    def __init__(self, folder: Path, keep_bytes: int, tensorboard: bool, step: int) -> None:
        """Open the log.

        Args:
            folder: the adapter's folder.
            keep_bytes: number of bytes of an existing log that belong to this run.
            tensorboard: whether to write for TensorBoard as well, into `folder / "tensorboard"`.
            step: current step of the run.

        Raises:
            ConfigError: TensorBoard is not installed.
            StorageError: the log cannot be written.
        """
        self.path = folder / "training.jsonl"
        self.board: Any = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            with self.path.open("r+b") as file:
                # After a power cut the log may be shorter than the checkpoint says, or end in an incomplete line.
                kept = file.read(keep_bytes).partition(b"\0")[0]
                self.bytes = kept.rfind(b"\n") + 1
                file.truncate(self.bytes)
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror or error}.") from error
        if tensorboard:
            require_library("--tensorboard", "tensorboard", "tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Append one event with its values, rounded to seven digits.

        Raises:
            StorageError: writing failed.
        """
        rounded = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in values.items()}
        line = (json.dumps({"event": event, "step": step} | rounded) + "\n").encode()
        try:
            with self.path.open("ab") as file:
                file.write(line)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self.bytes)
            raise StorageError(f"cannot write {self.path}: {error.strerror or error}.") from error
        self.bytes += len(line)
        if self.board is not None:
            for name, value in rounded.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(f"{event}/{name}", value, step)

    def sync(self) -> None:
        """Flush the log to the disk, before a checkpoint refers to it.

        Raises:
            StorageError: writing failed.
        """
        try:
            sync(self.path)
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror or error}.") from error

    def close(self) -> None:
        """Flush and close the TensorBoard writer."""
        if self.board is not None:
            self.board.close()


class NoLog(Log):
    """Log of one of several processes of which another writes."""

    def __init__(self) -> None:
        self.bytes, self.board = 0, None

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing."""
