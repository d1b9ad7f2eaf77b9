"""The state that all processes of one service share: spent quotas, rereads of the policy, live replicas.

It is an SQLite database: in memory for a server by itself, or a file (`quota_file`), which outlives the server and
which several processes of one machine use at the same time. Every charge is one transaction, so two processes never
spend the same tokens, and a process that is killed leaves what it had charged and nothing half done.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pema.errors import ConfigError
from pema.files import PRIVATE_FILE
from pema.serving.refusal import Refusal

logger = logging.getLogger(__name__)

APPLICATION, VERSION = 0x70656D61, 1
"""What an SQLite file says it is, in its header: `pema` in ASCII, and the version of the tables."""

PATIENCE = 2.0
"""Maximum seconds that a request waits for the transactions of others, each of which takes less than a millisecond."""

LIVE_SECONDS = 10.0
"""Seconds after which a replica that was not heard of counts as ended."""

SCHEMA = (
    "CREATE TABLE spent (key TEXT, window TEXT, leaves REAL, amount INTEGER NOT NULL CHECK (amount >= 0), "
    "PRIMARY KEY (key, window, leaves)) WITHOUT ROWID",
    "CREATE TABLE rates (key TEXT PRIMARY KEY, taken REAL NOT NULL, at REAL NOT NULL) WITHOUT ROWID",
    "CREATE TABLE replicas (name TEXT PRIMARY KEY, plm TEXT NOT NULL, called TEXT NOT NULL, seen REAL NOT NULL) "
    "WITHOUT ROWID",
    "CREATE TABLE rereads (number INTEGER NOT NULL)",
    "INSERT INTO rereads VALUES (0)",
    f"PRAGMA user_version = {VERSION}",
    f"PRAGMA application_id = {APPLICATION}",
)


class Store:
    """An open store; used by one thread at a time.

    Args:
        path: the file; None keeps the state in memory, for this process only.
        clock: returns the time of day in seconds, which all processes and restarts share.

    Attributes:
        path: the file, or None.
        clock: see above.

    Raises:
        ConfigError: the file cannot be used, or is something else.
    """

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self.path, self.clock = path, clock
        try:
            if path is not None:
                path.touch(PRIVATE_FILE)
                path.chmod(PRIVATE_FILE)  # SQLite gives its two companions the mode of the file.
            # With isolation_level None no transaction begins by itself.
            self._database = sqlite3.connect(
                path or ":memory:", timeout=PATIENCE, isolation_level=None, check_same_thread=False
            )
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(str(error)) from error
        try:
            self._open()
        except sqlite3.Error as error:
            self.close()
            raise self._unusable(str(error)) from error
        except BaseException:
            self.close()
            raise

    def execute(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Execute one statement and return its rows; what belongs together goes into a `transaction`."""
        return self._database.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[float]:
        """Run the block as one transaction, alone of all processes, and yield the time.

        Raises:
            Refusal: 503, the file cannot be read or written: what cannot be counted is not given out.
        """
        with self._available(), self._transaction():
            yield self.clock()

    def rereads(self) -> int:
        """Return how often a reread of the policy was requested; other processes do that too."""
        with self._available():
            return int(self.execute("SELECT number FROM rereads")[0][0])

    def request_reread(self) -> None:
        """Request all processes to reread the policy."""
        with self.transaction():
            self.execute("UPDATE rereads SET number = number + 1")

    def join(self, name: str, plm: str, called: str) -> None:
        """Note that a replica is alive, whose answers must be those of the others.

        Args:
            name: name of the replica.
            plm: identity of its PLM; see `wire.identity`.
            called: the PLM's name, for the message.

        Raises:
            ConfigError: a live replica has another PLM.
        """
        with self.transaction() as now:
            live = self.execute("SELECT plm, called FROM replicas WHERE seen > ?", (now - LIVE_SECONDS,))
            others = [name for identity, name in live if identity != plm]
            if others:
                raise ConfigError(
                    f"a live server that counts in {self.path} has the PLM {others[0]}, and this one has {called}, or "
                    "the same at another tap or in another precision: servers that share a quota file have one PLM. "
                    "Stop the other first, or name another quota_file in the policy."
                )
            self.execute("DELETE FROM replicas WHERE seen <= ?", (now - LIVE_SECONDS,))
            self.execute("INSERT OR REPLACE INTO replicas VALUES (?, ?, ?, ?)", (name, plm, called, now))

    def leave(self, name: str) -> None:
        """Remove a replica that ends."""
        with self.transaction():
            self.execute("DELETE FROM replicas WHERE name = ?", (name,))

    def replicas(self) -> int:
        """Return the number of live replicas."""
        with self._available():
            return len(self.execute("SELECT name FROM replicas WHERE seen > ?", (self.clock() - LIVE_SECONDS,)))

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _open(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:  # SQLite does not wait for the lock that this change needs, and processes start together.
            try:
                (mode,) = self.execute("PRAGMA journal_mode = WAL")[0]
                break
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        if self.path is not None and mode != "wal":
            raise self._unusable("processes cannot share memory on its file system, as on those of networks")
        # A killed process loses nothing. A machine that loses power may lose the last moments, and never its order.
        self.execute("PRAGMA synchronous = NORMAL")
        with self._transaction():
            kind, version, tables = (
                self.execute(f"SELECT * FROM {what}")[0][0]
                for what in ("pragma_application_id", "pragma_user_version", "(SELECT COUNT(*) FROM sqlite_schema)")
            )
            if (kind, version, tables) == (0, 0, 0):
                for statement in SCHEMA:
                    self.execute(statement)
            elif (kind, version) != (APPLICATION, VERSION):
                raise self._unusable("it is another database, or of another version of pema")
        (checked,) = self.execute("PRAGMA quick_check(1)")[0]
        if checked != "ok":
            raise self._unusable("it is damaged")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            # After some errors, such as a full disk, SQLite has rolled back by itself.
            if self._database.in_transaction:
                self.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _available(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            logger.error("the quotas cannot be counted", extra={"fields": {"why": str(error)}})
            message = "The server cannot count what this key spends."
            raise Refusal(503, "no_quotas", message, "Try again in a moment.", retry_after=1) from error

    def _unusable(self, why: str) -> ConfigError:
        return ConfigError(
            f"the quota file {self.path} cannot be used: {why}. If it is of an earlier version or damaged, remove it "
            "to start with full quotas, or name another file on a disk of this machine in the policy (quota_file)."
        )
