"""The rules of an API key, as the server announces them, and what they mean for a build."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pema.errors import OwnerError
from pema.owner.contract import Contexts

WAITED = 120.0
"""Seconds of the windows that a client waits for; longer ones end a build, which is continued later."""

_ENDPOINTS: dict[Contexts, str] = {"teacher": "represent", "predicted": "predict"}
_NAMES = {60.0: "minute", 3600.0: "hour", 86400.0: "day"}
_MOST = 1 << 53


@dataclass(frozen=True)
class TokenQuota:
    """A maximum of tokens in a rolling window.

    Attributes:
        seconds: length of the window.
        limit: maximum of tokens in it.
        left: number of tokens that may be requested now.
    """

    seconds: float
    limit: int
    left: int

    @property
    def text(self) -> str:
        """The quota in words."""
        return f"{self.limit:,} tokens per {_NAMES.get(self.seconds, f'{self.seconds:,.0f} s')}"


@dataclass(frozen=True)
class KeyRules:
    """Permissions and limits of a key on a server.

    Attributes:
        where: address of the server.
        contexts: modes of contexts.
        endpoints: names of the endpoints; None if the server does not say.
        head: form of the LM head, "none" if it is withheld.
        batch_tokens: maximum tokens of a request.
        batch_sequences: maximum sequences of a request.
        quotas: quotas of tokens; empty if there are none, or the server does not say.
    """

    where: str
    contexts: tuple[str, ...]
    endpoints: tuple[str, ...] | None
    head: str
    batch_tokens: int
    batch_sequences: int
    quotas: tuple[TokenQuota, ...]

    @classmethod
    def of(cls, about: dict[str, Any], where: str) -> KeyRules:
        """Parse the answer to GET /v1/plm, which is untrusted input.

        Raises:
            ValueError, KeyError, TypeError, OverflowError: a value is missing or impossible.
        """
        limits = {name: int(about["limits"][name]) for name in ("batch_tokens", "batch_sequences")}
        if min(limits.values()) < 1:
            raise ValueError("its limits allow no request.")
        endpoints = about.get("endpoints")
        quotas = []
        for values in about.get("quotas", [])[:16]:
            quota = TokenQuota(float(values["seconds"]), int(values["limit"]), int(values["left"]))
            if not (0 < quota.seconds < math.inf and 0 <= quota.left <= quota.limit <= _MOST and quota.limit > 0):
                raise ValueError("a quota is impossible.")
            if values["unit"] == "tokens":
                quotas.append(quota)
        return cls(
            where,
            tuple(map(str, about["contexts"])),
            None if endpoints is None else tuple(map(str, endpoints)),
            str(about.get("head", "")),
            limits["batch_tokens"],
            limits["batch_sequences"],
            tuple(quotas),
        )

    @property
    def request_tokens(self) -> int:
        """Maximum tokens of a request: little of a quota may be left over because a request does not fit into it."""
        return min([self.batch_tokens, *(max(1, quota.limit // 4) for quota in self.quotas)])

    def require_contexts(self, mode: Contexts) -> None:
        """Refuse contexts that the server does not offer to this key.

        Raises:
            OwnerError: says what the key may have, and what to ask the owner for.
        """
        if mode not in self.contexts or not self._may(_ENDPOINTS[mode]):
            offered = [each for each in _ENDPOINTS if each in self.contexts and self._may(_ENDPOINTS[each])]
            use = f"Build with {' or '.join(offered)} contexts, or ask" if offered else "Ask"
            raise OwnerError(
                f"{self.where} does not offer {mode} contexts to this key, so nothing was sent. {use} the PLM's owner "
                f'for a key with "{mode}" among its contexts and "{_ENDPOINTS[mode]}" among its endpoints.'
            )

    def require_sessions(self) -> None:
        """Refuse to generate with a key that may not open sessions.

        Raises:
            OwnerError: says what to ask the owner for.
        """
        if not self._may("sessions"):
            raise OwnerError(
                f"{self.where} does not let this key open sessions, which generation and inspection need, so nothing "
                'was sent: ask the PLM\'s owner for a key with "sessions" among its endpoints.'
            )

    def require_head(self) -> None:
        """Refuse work that needs the LM head with a key that does not get it.

        Raises:
            OwnerError: says what to ask the owner for.
        """
        if self.head == "none" or not self._may("head"):
            raise OwnerError(
                f"{self.where} withholds the LM head from this key, and a memory contains it, so nothing was sent: ask "
                'the PLM\'s owner for a key with head = "plain" or "masked" and "head" among its endpoints.'
            )

    def forecast(self, contexts: Contexts, lengths: Sequence[int]) -> list[str]:
        """Check a build, and say what the user should know before it; see `contract.Metered`.

        Raises:
            OwnerError: this key can never do it.
        """
        self.require_contexts(contexts)
        self.require_head()
        total, longest = sum(lengths), max(lengths, default=0)
        for quota in self.quotas:
            if longest > quota.limit:
                raise OwnerError(
                    f"an example needs {longest:,} tokens at once, and this key has {quota.text} at {self.where}, so "
                    "nothing was sent: leave out long examples, or ask the PLM's owner for a larger quota."
                )
        notes = [self._note(quota, total) for quota in self.quotas if total > quota.left]
        if not self._may("sessions"):
            notes.append(
                "This key can build and not generate: generation needs sessions. Ask the PLM's owner for a key with "
                '"sessions" among its endpoints.'
            )
        return notes

    def _note(self, quota: TokenQuota, total: int) -> str:
        begin = f"This build requests {total:,} tokens; {quota.left:,} of this key's {quota.text} are left."
        windows = math.ceil((total - quota.left) / quota.limit)
        if quota.seconds <= WAITED:
            return f"{begin} The build waits for the quota: it takes at least {windows * quota.seconds / 60:,.0f} min."
        span = _NAMES.get(quota.seconds, f"{quota.seconds:,.0f} s")
        return (
            f"{begin} The build stops when they are spent and keeps every answer; the same command continues it, "
            f"for at least {windows:,} more {span}{'s' if windows > 1 and quota.seconds in _NAMES else ''}."
        )

    def _may(self, endpoint: str) -> bool:
        return self.endpoints is None or endpoint in self.endpoints
