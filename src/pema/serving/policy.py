"""The policy file: what a PLM owner allows, per key."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pema.errors import ConfigError
from pema.owner.contract import Contexts, Tap
from pema.schema import short, unknown

Endpoint = Literal["plm", "tokenizer", "head", "represent", "predict", "sessions", "metrics"]
"""The endpoints that a key may use."""

HeadForm = Literal["plain", "masked", "none"]
"""The form of the LM head that a key gets: plain, in secretly rotated coordinates, or none."""

CONTEXTS_OF: dict[Contexts, Endpoint] = {"teacher": "represent", "predicted": "predict"}
"""The endpoint that serves contexts of a mode."""

_Count = Annotated[int, Field(ge=1, le=1 << 50)]

_Seconds = Annotated[float, Field(gt=0, le=86_400.0 * 365, allow_inf_nan=False)]

EMPTY = hashlib.sha256(b"").hexdigest()
"""The hash of the empty key, which everybody has."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


T = TypeVar("T", bound=_Table)


class Limits(_Table):
    """Limits of one request, and of the server's memory."""

    body_bytes: _Count = Field(default=1 << 20, description="Largest request body.")
    sequence_tokens: _Count | None = Field(
        default=None,
        description="Longest context, prompt and steps together; by default the PLM's own window.",
    )
    batch_sequences: _Count = Field(default=256, description="Sequences in one request.")
    batch_tokens: _Count = Field(default=16384, description="Tokens in one request, steps included.")
    queue_requests: _Count = Field(
        default=256,
        description="Requests that wait for the PLM; more are refused, those of the key with the most first.",
    )
    pending_bytes: _Count = Field(
        default=1 << 27, description="Bodies that arrive and answers that are not read yet, of one key together."
    )
    heads_per_hour: _Count = Field(default=60, description="How often one key may download the LM head.")
    connections: _Count = Field(
        default=512, description="Connections; one more closes the one that has been silent for longest."
    )
    sessions: _Count = Field(default=32, description="Live decoding sessions of one key.")
    session_rows: _Count = Field(default=256, description="Rows of one session, beams included.")
    session_bytes: _Count = Field(
        default=2 << 30, description="Key-value caches of all sessions together; the longest unused go first."
    )
    session_idle_seconds: _Seconds = Field(
        default=300.0, description="Seconds after which an unused session is closed."
    )


class Batching(_Table):
    """Settings of batches of several clients' requests."""

    window_ms: float = Field(
        default=5.0,
        ge=0,
        le=60_000.0,
        allow_inf_nan=False,
        description="How long a request waits for others to share its forward pass.",
    )
    tokens: _Count = Field(default=8192, description="Tokens of one forward pass, padding included.")


class Key(_Table):
    """The rules of one API key."""

    name: str = Field(
        min_length=1, max_length=64, pattern=r"^[\w.@-]+$", description="The key's name in logs and metrics."
    )
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the key, as `pema serve-key` prints it.")
    endpoints: tuple[Endpoint, ...] = Field(
        default=("plm", "tokenizer", "head", "represent", "predict", "sessions"),
        description="What the key may use; metrics only if it is named here.",
    )
    taps: tuple[Tap, ...] = Field(default=get_args(Tap), description="Taps whose representations and head it may have.")
    contexts: tuple[Contexts, ...] = Field(
        default=get_args(Contexts), description="Context modes: teacher is represent, predicted is predict."
    )
    head: HeadForm = Field(default="plain", description="How the LM head is given out.")
    mask_secret: str | None = Field(
        default=None,
        description="File of this key's own secret, relative to the policy file, in place of the common one.",
    )
    tokens_per_minute: _Count | None = Field(default=None, description="Tokens in any 60 seconds.")
    tokens_per_day: _Count | None = Field(default=None, description="Tokens in any 24 hours.")
    requests_per_second: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="Mean rate of requests; one second's worth may come at once.",
    )

    @field_validator("sha256")
    @classmethod
    def _no_empty_key(cls, value: str) -> str:
        if value == EMPTY:
            raise ValueError("it is the hash of the empty text, which lets everybody in: use `pema serve-key`")
        return value


class Policy(_Table):
    """The content of a policy file."""

    keys: tuple[Key, ...] = Field(default=(), description="Who may send requests; without keys, everybody.")
    limits: Limits = Field(default=Limits(), description="Limits of one request, and of the server's memory.")
    batching: Batching = Field(default=Batching(), description="How requests go through the PLM together.")
    mask_secret: str | None = Field(
        default=None,
        description="File of the common mask's secret, relative to the policy file; for keys whose head is masked.",
    )

    quota_file: str | None = Field(
        default=None,
        description="File of spent quotas, relative to the policy file; servers of one machine may share it.",
    )

    @model_validator(mode="after")
    def _agrees(self) -> Policy:
        for what in ("name", "sha256"):
            values = [getattr(key, what) for key in self.keys]
            if len(set(values)) < len(values):
                twice = next(value for value in values if values.count(value) > 1)
                raise ValueError(f"two keys have the {what} {twice[:12]}: give each its own")
        for key in self.keys:
            if key.head == "masked" and key.mask_secret is None and self.mask_secret is None:
                raise ValueError(f'key {key.name} has head = "masked" and there is no mask: add mask_secret = "FILE"')
            if key.head != "masked" and key.mask_secret is not None:
                raise ValueError(
                    f'key {key.name} has a mask_secret and head = "{key.head}", which does not use it: set '
                    'head = "masked", or remove the secret'
                )
        return self

    @classmethod
    def read(cls, path: Path) -> Policy:
        """Read a policy file (TOML).

        Raises:
            ConfigError: it cannot be read, or is not a valid policy; the message names the file and the key in it.
        """
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the policy {path} cannot be read: {error}. Check the path.") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"the policy {path} is not TOML: {error}.") from error
        try:
            policy = cls.model_validate(_tuples(content))
        except ValidationError as error:
            raise ConfigError(f"the policy {path}: {_first(error, content)}") from error
        keys = tuple(_beside(path, key, "mask_secret") for key in policy.keys)
        return _beside(path, policy.model_copy(update={"keys": keys}), "mask_secret", "quota_file")


def reread(path: Path, current: Policy) -> Policy:
    """Read the policy file of a running server again.

    Args:
        path: the file.
        current: the policy in force.

    Raises:
        ConfigError: it is no valid policy, or one that cannot follow the current one.
    """
    policy = Policy.read(path)
    if current.keys and not policy.keys:
        raise ConfigError(
            f"the policy {path} has no keys any more, which would let everybody in: add a key, or stop the server."
        )
    if policy.quota_file != current.quota_file:
        raise ConfigError(
            f"the policy {path} names another quota_file, and a running server keeps the one that it counts in: start "
            "it again."
        )
    return policy


ANYBODY = Key(name="anybody", sha256="0" * 64, endpoints=get_args(Endpoint))
"""The key of all requests to a server without keys."""


def _beside(path: Path, table: T, *names: str) -> T:
    """Make the files that a table names relative to the policy file."""
    files = {name: getattr(table, name) for name in names}
    return table.model_copy(update={name: str(path.parent / file) for name, file in files.items() if file is not None})


def _tuples(value: Any) -> Any:  # noqa: ANN401 - whatever TOML holds
    # A strict model takes no list for a tuple, and TOML knows no tuples.
    if isinstance(value, dict):
        return {name: _tuples(inner) for name, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _first(error: ValidationError, content: dict[str, Any]) -> str:
    """Describe the first error by its place in the file."""
    first = error.errors(include_url=False, include_context=False)[0]
    place, of = first["loc"], ""
    if place[:1] == ("keys",) and len(place) > 1 and isinstance(place[1], int):
        entry = content["keys"][place[1]]
        name = entry.get("name") if isinstance(entry, dict) else None
        of = f"key {name}" if isinstance(name, str) else ""
    if first["type"] == "extra_forbidden":
        names = list(_MODELS.get(place[0], Policy).model_fields) if len(place) > 1 else list(Policy.model_fields)
        return unknown("setting", place[-1], names, of, _path(place[:-1]))
    message = _reason(first["type"], place, first["msg"], first["input"])
    where = _path(place) + (f" ({of})" if of else "")
    return f"{where}: {message[0].lower()}{message[1:]}." if where else f"{message}."


def _reason(kind: str, place: tuple[int | str, ...], message: str, value: object) -> str:
    """Say what is wrong with a value, in the words of TOML."""
    if place == ("keys",) or (place[:1] == ("keys",) and kind == "model_type"):
        return "each key must be a table of its own, which begins with the line [[keys]]"
    if place[-1:] == ("sha256",) and kind != "missing" and not message.startswith("Value error"):
        # The value may be the key itself, which belongs in no log.
        return "it must be the 64 hexadecimal digits that `pema serve-key` prints, not the key itself"
    if kind == "tuple_type":
        message = "it must be a list, in brackets"
    if kind in ("missing", "value_error"):
        return message.removeprefix("Value error, ")
    return f"{message.replace('Input should be', 'it must be')}, not {short(value)}"


def _path(place: tuple[int | str, ...]) -> str:
    """Return the path of a place in the file, such as keys[0].name."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")


_MODELS: dict[int | str, type[_Table]] = {"keys": Key, "limits": Limits, "batching": Batching}
