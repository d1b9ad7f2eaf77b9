"""What a PLM owner allows: the policy file, one key at a time."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pema.errors import ConfigError
from pema.owner.contract import Contexts, Tap
from pema.schema import unknown

Endpoint = Literal["plm", "tokenizer", "head", "represent", "predict", "sessions", "metrics"]
"""What a key may be let into."""

HeadForm = Literal["plain", "masked", "none"]
"""How the LM head is given out: as it is, in secretly rotated coordinates, or not at all."""

_Count = Annotated[int, Field(ge=1, le=1 << 50)]

_Seconds = Annotated[float, Field(gt=0, le=86_400.0 * 365, allow_inf_nan=False)]

EMPTY = hashlib.sha256(b"").hexdigest()
"""The hash of the empty key, which everybody has."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Limits(_Table):
    """Bounds on one request and on what the server holds."""

    body_bytes: _Count = Field(default=1 << 20, description="Largest request body.")
    sequence_tokens: _Count | None = Field(
        default=None,
        description="Longest context, a prompt and its steps together; by default the PLM's own window.",
    )
    batch_sequences: _Count = Field(default=256, description="Sequences in one request.")
    batch_tokens: _Count = Field(default=16384, description="Tokens in one request, steps among them.")
    queue_requests: _Count = Field(
        default=256,
        description="Requests that wait for the PLM; more are turned away, those of the key with the most first.",
    )
    pending_bytes: _Count = Field(
        default=1 << 27, description="Bodies that come and answers that are not yet read, of one key together."
    )
    heads_per_hour: _Count = Field(default=60, description="How often one key is given the LM head.")
    connections: _Count = Field(
        default=512, description="Connections; one more closes the one that has been silent for longest."
    )
    sessions: _Count = Field(default=32, description="Live decoding sessions of one key.")
    session_rows: _Count = Field(default=256, description="Rows of one session, beams among them.")
    session_bytes: _Count = Field(
        default=2 << 30, description="Key-value caches of all sessions together; the longest unused go first."
    )
    session_idle_seconds: _Seconds = Field(
        default=300.0, description="A session that is not used for so long is closed."
    )


class Batching(_Table):
    """How requests of several clients go through the PLM together."""

    window_ms: float = Field(
        default=5.0,
        ge=0,
        le=60_000.0,
        allow_inf_nan=False,
        description="How long a request waits for others to share its forward pass.",
    )
    tokens: _Count = Field(default=8192, description="Tokens of one forward pass, padding among them.")


class Key(_Table):
    """What one API key may do."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.@-]+$", description="Stands in logs for the key.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the key, as `pema serve-key` prints it.")
    endpoints: tuple[Endpoint, ...] = Field(
        default=("plm", "tokenizer", "head", "represent", "predict", "sessions"),
        description="What the key is let into; metrics only where it is named here.",
    )
    taps: tuple[Tap, ...] = Field(default=get_args(Tap), description="Taps whose representations and head it may have.")
    contexts: tuple[Contexts, ...] = Field(
        default=get_args(Contexts), description="Context modes: teacher is represent, predicted is predict."
    )
    head: HeadForm = Field(default="plain", description="How the LM head is given out.")
    tokens_per_minute: _Count | None = Field(default=None, description="Tokens in any 60 seconds.")
    tokens_per_day: _Count | None = Field(default=None, description="Tokens in any 24 hours.")
    requests_per_second: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="Mean rate of requests; a second's worth may come at once.",
    )

    @field_validator("sha256")
    @classmethod
    def _no_empty_key(cls, value: str) -> str:
        if value == EMPTY:
            raise ValueError("it is the hash of the empty text, which lets everybody in: use `pema serve-key`")
        return value


class Policy(_Table):
    """Everything that a policy file says."""

    keys: tuple[Key, ...] = Field(default=(), description="Who may call; without keys, whoever reaches the server.")
    limits: Limits = Field(default=Limits(), description="Bounds on one request and on what the server holds.")
    batching: Batching = Field(default=Batching(), description="How requests go through the PLM together.")
    mask_secret: str | None = Field(
        default=None,
        description="File of the mask's secret, as seen from the policy file; for keys whose head is masked.",
    )

    @model_validator(mode="after")
    def _agrees(self) -> Policy:
        for what in ("name", "sha256"):
            values = [getattr(key, what) for key in self.keys]
            if len(set(values)) < len(values):
                twice = next(value for value in values if values.count(value) > 1)
                raise ValueError(f"two keys have the {what} {twice[:12]}: give each its own")
        masked = [key.name for key in self.keys if key.head == "masked"]
        if masked and self.mask_secret is None:
            raise ValueError(f'key {masked[0]} has head = "masked" and there is no mask: add mask_secret = "FILE"')
        return self

    @classmethod
    def read(cls, path: Path) -> Policy:
        """Read a policy file (TOML).

        Raises:
            ConfigError: it cannot be read, or holds what is no policy; names the file and the key in it.
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
        if policy.mask_secret is None:
            return policy
        return policy.model_copy(update={"mask_secret": str(path.parent / policy.mask_secret)})


ANYBODY = Key(name="anybody", sha256="0" * 64, endpoints=get_args(Endpoint))
"""Whoever calls a server without keys."""


def _tuples(value: Any) -> Any:  # noqa: ANN401 - whatever TOML holds
    # A strict model takes no list for a tuple, and TOML knows no tuples.
    if isinstance(value, dict):
        return {name: _tuples(inner) for name, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _first(error: ValidationError, content: dict[str, Any]) -> str:
    """The first thing that is wrong, by its place in the file."""
    first = error.errors(include_url=False, include_context=False)[0]
    place, of = first["loc"], ""
    if place[:1] == ("keys",) and len(place) > 1 and isinstance(place[1], int):
        entry = content["keys"][place[1]]
        name = entry.get("name") if isinstance(entry, dict) else None
        of = f"key {name}" if isinstance(name, str) else ""
    if first["type"] == "extra_forbidden":
        names = list(_MODELS.get(place[0], Policy).model_fields) if len(place) > 1 else list(Policy.model_fields)
        return unknown("setting", place[-1], names, of, _path(place[:-1]))
    message = first["msg"].removeprefix("Value error, ")
    where = _path(place) + (f" ({of})" if of else "")
    return f"{where}: {message[0].lower()}{message[1:]}." if where else f"{message}."


def _path(place: tuple[int | str, ...]) -> str:
    """Return the path of a place in the file, such as keys[0].name."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")


_MODELS: dict[int | str, type[_Table]] = {"keys": Key, "limits": Limits, "batching": Batching}
