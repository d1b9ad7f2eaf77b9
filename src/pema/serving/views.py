"""The PLM as different keys see it: with its own head, or in the secretly rotated coordinates of a mask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pema.owner.contract import PLM
from pema.owner.mask import Mask, MaskedPLM
from pema.serving.policy import Key, Policy


def require_secrets(policy: Policy) -> None:
    """Read all secrets of a policy, used or not: before the server prints its address and loads the PLM.

    Raises:
        OwnerError: a mask's secret cannot be read.
    """
    for secret in {policy.mask_secret, *(key.mask_secret for key in policy.keys)} - {None}:
        Mask.read(Path(str(secret)))


class Views:
    """The views of one PLM. Keys with the same secret share a view; a view stays the same when a policy is reread.

    Args:
        plm: the PLM in its own coordinates.
    """

    def __init__(self, plm: PLM) -> None:
        self._plm = plm
        self._masked: dict[Mask, MaskedPLM] = {}

    def of(self, keys: tuple[Key, ...], policy: Policy) -> Mapping[str, PLM]:
        """Return the view of each key, by the key's name. All secrets of the policy are read, used or not.

        Raises:
            OwnerError: a mask's secret cannot be read.
            ConfigError: the PLM cannot be masked at its tap.
        """
        if policy.mask_secret is not None:
            self._view(policy.mask_secret)
        views: dict[str, PLM] = {}
        for key in keys:
            secret = key.mask_secret or policy.mask_secret
            views[key.name] = self._view(secret) if key.head == "masked" and secret is not None else self._plm
        return views

    def keep(self, views: Mapping[str, PLM]) -> None:
        """Forget the masks that none of these views has."""
        self._masked = {mask: plm for mask, plm in self._masked.items() if any(plm is view for view in views.values())}

    def _view(self, secret: str) -> MaskedPLM:
        mask = Mask.read(Path(secret))
        if mask not in self._masked:
            self._masked[mask] = MaskedPLM(self._plm, mask)
        return self._masked[mask]
