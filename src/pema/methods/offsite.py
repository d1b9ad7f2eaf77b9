"""Offsite-Tuning: training of the PLM's outer layers around a compressed substitute for its inner layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pema.adapter.config import LARGEST
from pema.methods.contract import MOST, AdaptedModel, Job, Needs, with_weights
from pema.methods.fine_tuning import FineTuning
from pema.schema import option

if TYPE_CHECKING:
    from pema.owner.contract import PLM
    from pema.owner.local import LocalPLM
    from pema.tasks.registry import Task

FILE = "adapter.safetensors"


@dataclass(frozen=True)
class OffsiteTuning(FineTuning):
    """Offsite-Tuning (Xiao, Lin and Han, arXiv 2302.04870, section 3).

    The PLM is split into [A_1, E, A_2]. Its owner hands out the adapter A_1, A_2 (the first and last layers, the
    embeddings and the LM head) and an emulator E* of the middle E, made by dropping layers evenly. The data owner
    trains the adapter in [A_1, E*, A_2]; the PLM owner puts it into [A_1, E, A_2]. The embeddings, the final norm and
    the head stay unchanged.

    Attributes:
        adapters: number of layers of A_1, and of A_2; None means 2, as in the paper, or 1 if the PLM has fewer than 8
            layers.
        keep: fraction of the middle layers that the emulator keeps, at least one; 0.4 for OPT-1.3B in the paper.
        distil_steps: number of steps of the distillation of E into E*, 0 for none. The paper distils on a large public
            corpus; here the PLM owner has the prompts of the training examples, and distils on the texts that the PLM
            itself generates from them: it sees no target.
        distil_learning_rate: peak learning rate of the distillation.
    """

    name: ClassVar[str] = "offsite"
    default_grid: ClassVar[Mapping[str, Sequence[Any]]] = {"learning_rate": (1e-4, 3e-4, 1e-3, 3e-5)}

    adapters: int | None = option(None, least=1, most=10_000)
    keep: float = option(0.5, above=0.0, most=1.0)
    distil_steps: int = option(0, least=0, most=MOST)
    distil_learning_rate: float = option(1e-4, above=0.0, most=LARGEST)

    @property
    def shared(self) -> bool:
        """True: the emulator depends on the PLM and its settings only."""
        return True

    @property
    def needs(self) -> Needs:
        """Some layers, and a substitute for the others; the targets stay with the data owner."""
        return Needs("some", targets_at_owner=False, gradients=True)

    @property
    def prepared_by(self) -> Mapping[str, Any]:
        """Settings of the emulator."""
        from pema.methods.emulator import MODEL

        names = ["adapters", "keep", "distil_steps"] + ["distil_learning_rate"] * bool(self.distil_steps)
        return {MODEL: {name: getattr(self, name) for name in names}}

    def require_suited(self, plm: PLM, task: Task) -> None:
        """See `Method.require_suited`: the PLM has enough layers."""
        from pema.methods.emulator import Plan, layers_of

        Plan.of(len(layers_of(with_weights(plm, self.name).model)), self.adapters, self.keep)

    def prepare(self, plm: PLM, job: Job, output: Path) -> None:
        """Build the emulator, at the PLM owner; it does not depend on the run's seed.

        Raises:
            ConfigError: the PLM has too few layers.
            OwnerError: the layers of the PLM cannot be identified or dropped.
            AdapterError: distillation diverged.
        """
        from pema.methods.distillation import distil
        from pema.methods.emulator import Plan, layers_of, save_emulator, shortened

        local = with_weights(plm, self.name)
        plan = Plan.of(len(layers_of(local.model)), self.adapters, self.keep)
        emulator = shortened(local.model, plan.chosen)
        if self.distil_steps:
            distil(local, emulator, plan, job, self.distil_steps, self.distil_learning_rate)
        plan.write(output)
        save_emulator(emulator, local, output)

    def source(self, job: Job, prepared: Path) -> Path:
        """Return the emulator, the only part of the PLM that the data owner sees."""
        from pema.methods.emulator import MODEL

        return prepared / MODEL

    def trainable(self, plm: LocalPLM, prepared: Path) -> tuple[Any, Callable[[Path], None]]:
        """See `FineTuning.trainable`."""
        from pema.methods.emulator import Plan, adapter_parameters
        from pema.methods.tuned import save_trained

        parameters = adapter_parameters(plm.model, Plan.read(prepared).adapters)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        return plm.model, lambda output: save_trained(parameters, output / FILE)

    def open(self, plm: PLM, job: Job, prepared: Path, trained: Path) -> AdaptedModel:
        """See `Method.open`; the adapter is put into the complete PLM."""
        from pema.methods.adapted.plugged_in import PluggedIn
        from pema.methods.emulator import Plan, adapter_parameters
        from pema.methods.tuned import load_trained, twin

        local = with_weights(plm, self.name)
        model = twin(local.model)
        load_trained(adapter_parameters(model, Plan.read(prepared).adapters), trained / FILE)
        return PluggedIn(local, model, job, trained / FILE, prepared)
