"""Full fine-tuning: all weights of the PLM are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pema.adapter.config import LARGEST
from pema.methods.contract import AdaptedModel, Job, with_weights
from pema.methods.fine_tuning import FineTuning
from pema.schema import option

if TYPE_CHECKING:
    from pema.owner.contract import PLM
    from pema.owner.local import LocalPLM

FILE = "model.safetensors"


@dataclass(frozen=True)
class FullFineTuning(FineTuning):
    """Full fine-tuning of all weights, including embeddings and LM head; the stored result is a complete model."""

    name: ClassVar[str] = "full"

    default_grid: ClassVar[Mapping[str, Sequence[Any]]] = {"learning_rate": (1e-4, 3e-5, 3e-4, 1e-5)}

    learning_rate: float = option(1e-4, above=0.0, most=LARGEST)

    def trainable(self, plm: LocalPLM, prepared: Path) -> tuple[Any, Callable[[Path], None]]:
        """See `FineTuning.trainable`."""
        from pema.methods.tuned import save_trained

        plm.model.requires_grad_(True)
        return plm.model, lambda output: save_trained(dict(plm.model.named_parameters()), output / FILE)

    def open(self, plm: PLM, job: Job, prepared: Path, trained: Path) -> AdaptedModel:
        """See `Method.open`."""
        from pema.methods.tuned import TunedModel, load_trained, twin

        local = with_weights(plm, self.name)
        model = twin(local.model)
        load_trained(dict(model.named_parameters()), trained / FILE)
        return TunedModel(local, model, job, trained / FILE)
