"""The accounts of a server: what a key may do, sees, has spent and has pending."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pema.owner.contract import PLM
from pema.owner.wire import identity
from pema.serving.pending import PendingBytes
from pema.serving.policy import Key
from pema.serving.quota import Quota


@dataclass(frozen=True, eq=False)
class Account:
    """One key's account. A policy that changes the key replaces it; quota and pending bytes continue.

    Attributes:
        key: the rules.
        plm: the PLM as this key sees it: plain, or in the coordinates of its mask.
        quota: what is left.
        pending: its pending bytes.
    """

    key: Key
    plm: PLM
    quota: Quota
    pending: PendingBytes

    @cached_property
    def identity(self) -> str:
        """Identity of the PLM as this key sees it; see `wire.identity`."""
        return identity(self.plm.description)
