"""Generation with a PLM whose model is not in this process: `generate` of transformers decodes in its sessions."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pema.owner.contract import PLM


class DecodesInSessions:
    """Base of such PLMs (`contract.PLM`)."""

    @cached_property
    def model(self) -> PreTrainedModel:
        """Model of transformers whose `generate` decodes in sessions of this PLM."""
        from pema.owner.session_model import SessionModel

        return SessionModel(cast("PLM", self))

    @property
    def generator(self) -> PreTrainedModel:
        """The same as `model`."""
        return self.model
