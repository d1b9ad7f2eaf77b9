"""The complete PLM with the adapter of Offsite-Tuning."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pema.methods.contract import Job
from pema.methods.emulator import Plan, adapter_parameters, load_emulator
from pema.methods.tuned import TunedModel, load_trained, perplexity
from pema.owner.local import LocalPLM


class PluggedIn(TunedModel):
    """The PLM whose outer layers were trained with the emulator."""

    def __init__(self, plm: LocalPLM, model: Any, job: Job, kept: Path, prepared: Path) -> None:  # noqa: ANN401
        """See `TunedModel`; `prepared` is the folder of the emulator."""
        super().__init__(plm, model, job, kept)
        self._prepared = prepared

    @cached_property
    def chosen(self) -> Mapping[str, Any]:
        """Perplexities on dev that show the plug-in gap: with the emulator, and after plugging into the PLM."""
        if not self._job.dev:
            return {}
        emulator = load_emulator(self._prepared, str(self.model.dtype).removeprefix("torch."))
        values = {
            "plm_perplexity": perplexity(self._plm, self._plm.model, self._job, self._job.dev),
            "emulator_alone_perplexity": perplexity(self._plm, emulator.model, self._job, self._job.dev),
        }
        load_trained(adapter_parameters(emulator.model, Plan.read(self._prepared).adapters), self._kept)
        return values | {
            "emulator_perplexity": perplexity(self._plm, emulator.model, self._job, self._job.dev),
            "plugged_in_perplexity": self.perplexity(self._job.dev),
        }
