"""The accounts of a server: what one key may do, sees, has spent and keeps under way."""

from __future__ import annotations

from dataclasses import dataclass

from pema.owner.contract import PLM
from pema.serving.pending import PendingBytes
from pema.serving.policy import Key
from pema.serving.quota import Quota


@dataclass(frozen=True, eq=False)
class Account:
    """One key's account. A policy that changes the key replaces it; quota and pending bytes go on.

    Attributes:
        key: the rules.
        plm: the PLM as this key sees it: plain, or in the coordinates of its mask.
        quota: what is left.
        pending: bytes of requests and answers under way.
    """

    key: Key
    plm: PLM
    quota: Quota
    pending: PendingBytes
