"""The PLM as different keys see it: with its head as it is, or in secretly rotated coordinates."""

from __future__ import annotations

from pathlib import Path

from pema.owner.contract import PLM
from pema.owner.mask import Mask, MaskedPLM
from pema.serving.policy import HeadForm, Policy


def views(plm: PLM, policy: Policy) -> dict[HeadForm, PLM]:
    """The PLM for each form that its head is given out in.

    Raises:
        OwnerError: the mask's secret cannot be read.
        ConfigError: the PLM cannot be masked at its tap.
    """
    found: dict[HeadForm, PLM] = {"plain": plm, "none": plm}
    if policy.mask_secret is not None:
        # One for all keys, so that their requests still share forward passes.
        found["masked"] = MaskedPLM(plm, Mask.read(Path(policy.mask_secret)))
    return found
