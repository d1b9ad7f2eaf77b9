"""The PLM as different keys see it: with its head as it is, or in secretly rotated coordinates."""

from __future__ import annotations

from pema.errors import ConfigError
from pema.owner.contract import PLM
from pema.serving.policy import HeadForm, Policy


def views(plm: PLM, policy: Policy) -> dict[HeadForm, PLM]:
    """The PLM for each form that its head is given out in.

    Raises:
        ConfigError: a key has a masked head, which this version cannot make.
    """
    if any(key.head == "masked" for key in policy.keys):
        raise ConfigError('a key of the policy has head = "masked", which is not there yet: use "plain" or "none".')
    return {"plain": plm, "none": plm}
