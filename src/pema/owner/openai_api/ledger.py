"""Answers of an API and what they cost, in one SQLite file: nothing is asked twice, and a budget is never exceeded.

A request is entered with the most that it can cost before it is sent, and with its real cost together with its answer.
So after a kill at any moment an answer is whole or absent, and what was sent is counted.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pema.errors import OwnerError, StorageError
from pema.files import PRIVATE_FILE
from pema.owner.openai_api.config import APIConfig

SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    id INTEGER PRIMARY KEY, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID;
"""

PATIENCE = 60.0
"""Seconds that a process waits for another one that writes."""


@dataclass(frozen=True)
class Spending:
    """What was spent.

    Attributes:
        requests: number of requests.
        prompt_tokens: number of tokens of their prompts.
        completion_tokens: number of tokens of their answers.
        cost: their price; None without prices.
    """

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None

    def __sub__(self, other: Spending) -> Spending:
        """Return what was spent since `other`."""
        cost = None if self.cost is None or other.cost is None else self.cost - other.cost
        return Spending(
            self.requests - other.requests,
            self.prompt_tokens - other.prompt_tokens,
            self.completion_tokens - other.completion_tokens,
            cost,
        )

    def __str__(self) -> str:
        """Return the spending in words."""
        money = "" if self.cost is None else f", cost {self.cost:.4f}"
        return (
            f"{self.requests:,} requests with {self.prompt_tokens:,} prompt tokens and {self.completion_tokens:,} "
            f"generated tokens{money}"
        )


class Ledger:
    """The file of one API; several threads and processes may use it at the same time.

    Attributes:
        path: the file.
        repeated: number of requests of this process that were answered from the file.
    """

    def __init__(self, path: Path, config: APIConfig) -> None:
        """Open or create the file.

        Raises:
            StorageError: it cannot be opened or written, or is something else.
        """
        self.path, self._config, self._lock = path, config, threading.Lock()
        self.repeated = 0
        with self._storing():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(PRIVATE_FILE)
            # With isolation_level None no transaction begins by itself.
            self._database = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
            self._database.executescript(SCHEMA)

    def answer(self, key: str) -> Any:  # noqa: ANN401
        """Return the stored answer to a request, or None."""
        with self._lock, self._storing():
            row = self._database.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            self.repeated += row is not None
        return None if row is None else json.loads(row[0])

    def begin(self, prompt_tokens: int, completion_tokens: int) -> int:
        """Enter a request with the most tokens that it can take, and return its number.

        Raises:
            OwnerError: it could exceed the budget; nothing is entered.
            StorageError: the file cannot be written.
        """
        with self._transaction():
            self._require_budget(self._total(), prompt_tokens, completion_tokens)
            values = (prompt_tokens, completion_tokens)
            cursor = self._database.execute(
                "INSERT INTO requests (prompt_tokens, completion_tokens) VALUES (?, ?)", values
            )
            return int(cursor.lastrowid or 0)

    def end(self, number: int, prompt_tokens: int, completion_tokens: int, key: str | None, answer: Any) -> None:  # noqa: ANN401
        """Enter what a request took, and store its answer under `key`, or not at all with None."""
        with self._transaction():
            self._database.execute(
                "UPDATE requests SET prompt_tokens = ?, completion_tokens = ? WHERE id = ?",
                (prompt_tokens, completion_tokens, number),
            )
            if key is not None:
                self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(answer)))

    def cancel(self, number: int) -> None:
        """Remove a request that the API refused."""
        with self._transaction():
            self._database.execute("DELETE FROM requests WHERE id = ?", (number,))

    def spending(self) -> Spending:
        """Return what was spent in total."""
        with self._lock, self._storing():
            return self._total()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def _total(self) -> Spending:
        columns = "COUNT(*), TOTAL(prompt_tokens), TOTAL(completion_tokens)"
        row = self._database.execute(f"SELECT {columns} FROM requests").fetchone()
        requests, prompt_tokens, completion_tokens = map(int, row)
        cost = self._config.cost(prompt_tokens, completion_tokens)
        return Spending(requests, prompt_tokens, completion_tokens, cost)

    def _require_budget(self, spent: Spending, prompt_tokens: int, completion_tokens: int) -> None:
        most_requests, most_cost = self._config.max_requests, self._config.max_cost
        limit = None
        if most_requests is not None and spent.requests >= most_requests:
            limit = f"max_requests={most_requests}"
        further = self._config.cost(prompt_tokens, completion_tokens)
        if most_cost is not None and (spent.cost or 0.0) + (further or 0.0) > most_cost:
            limit = f"max_cost={most_cost}"
        if limit is not None:
            raise OwnerError(
                f"the next request to {self._config.model} could exceed the budget {limit}: so far {spent}. Raise the "
                f"limit and run the same command again: all answers are kept in {self.path}."
            )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, self._storing():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                self._database.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"the file {self.path} with the answers of {self._config.model} cannot be used: {error}. Check the "
                "disk, or name another file by `cache`."
            ) from error
