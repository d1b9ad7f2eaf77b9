"""A small LM that the data owner fine-tunes and mixes with the PLM: needs the PLM's probabilities, not its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pema.adapter.config import LARGEST
from pema.errors import ConfigError
from pema.methods.contract import AdaptedModel, Job, Needs, Requirement, with_weights
from pema.methods.fine_tuning import FineTuning
from pema.schema import option

if TYPE_CHECKING:
    from pema.owner.contract import PLM
    from pema.owner.local import LocalPLM
    from pema.tasks.registry import Task

FILE = "model.safetensors"


@dataclass(frozen=True)
class SmallLM(FineTuning):
    """P = w P_small + (1 - w) P_PLM, with all weights of a small LM fine-tuned (CombLM, arXiv 2305.16876).

    With `mixture = "logits"` the change that fine-tuning makes to the small LM's logits is added to the PLM's
    (proxy-tuning, arXiv 2401.08565): softmax(s_PLM + w (s_tuned - s_untuned)).

    Attributes:
        small: name or folder of a small LM with the PLM's tokenizer; None makes one with the PLM's width.
        layers: number of layers of the small LM that is made if `small` is None.
        start: what its layers begin with: `random`, in which case the embeddings are the rows of W_hd, so that the PLM
            owner hands out the LM head only, as for PEMA; or `plm`, the PLM's first layers, which the owner hands out.
        mixture: whether `probabilities` are mixed, or changes of `logits` added.
        weight: w; at most 1 for probabilities, where 1 is the small LM alone.
    """

    name: ClassVar[str] = "small-lm"
    shared: ClassVar[bool] = True
    default_grid: ClassVar[Mapping[str, Sequence[Any]]] = {"learning_rate": (3e-4, 1e-3, 1e-4)}

    learning_rate: float = option(3e-4, above=0.0, most=LARGEST)
    small: str | None = None
    layers: int = option(4, least=1, most=10_000)
    start: Literal["random", "plm"] = "random"
    mixture: Literal["probabilities", "logits"] = "probabilities"
    weight: float = option(0.5, least=0.0, most=100.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.small is not None and (self.layers, self.start) != (SmallLM.layers, SmallLM.start):
            raise ConfigError(
                f"{self.name}: layers and start describe the small LM that is made without one, and small="
                f"{self.small!r} names one: leave them out."
            )
        if self.mixture == "probabilities" and self.weight > 1:
            raise ConfigError(
                f"{self.name}: weight={self.weight} is too large: a weight of probabilities is at most 1. Choose "
                "mixture='logits' for a larger one."
            )

    @property
    def needs(self) -> Needs:
        """Nothing but probabilities, and the LM head for `start = "random"`; the targets stay with the data owner."""
        copied = self.small is None and self.start == "plm"
        return Needs("some" if copied else "none", targets_at_owner=False, gradients=copied)

    @property
    def requires(self) -> frozenset[Requirement]:
        """All probabilities; without a small LM also the PLM in this process, from whose parts one is made."""
        return frozenset({"weights"} if self.small is None else {"probabilities"})

    @property
    def prepared_by(self) -> Mapping[str, Any]:
        """Settings of the untuned small LM."""
        made = {"layers": self.layers, "start": self.start}
        return {"small": self.small or made}

    @property
    def trained_by(self) -> Mapping[str, Any]:
        """All settings except those of the mixture: one small LM serves all weights."""
        return {n: value for n, value in self.settings().items() if n not in ("mixture", "weight")}

    def require_suited(self, plm: PLM, task: Task) -> None:
        """See `Method.require_suited`: the small LM has the PLM's tokenizer and prompts, or the PLM enough layers."""
        from pema.methods.small_models import require_layers, require_same_prompts
        from pema.owner.loading import load_tokenizer

        if self.small is None:
            require_layers(with_weights(plm, self.name).model, self.layers)
        else:
            require_same_prompts(Path(self.small).name, load_tokenizer(self.small), plm, task)

    def prepare(self, plm: PLM, job: Job, output: Path) -> None:
        """Check the named small LM against the PLM, or make one; it does not depend on the run's seed.

        Raises:
            ConfigError: the PLM has too few layers, or it is not in this process.
            MismatchError: the small LM has another tokenizer than the PLM.
            OwnerError: the small LM cannot be loaded, or the layers of the PLM cannot be identified or dropped.
        """
        from pema.methods.emulator import save_emulator
        from pema.methods.small_models import first_layers, load_small, with_random_layers

        if self.small is not None:
            load_small(self.small, plm, job)
            return
        local = with_weights(plm, self.name)
        small = first_layers(local.model, self.layers)
        save_emulator(with_random_layers(small) if self.start == "random" else small, local, output)

    def source(self, job: Job, prepared: Path) -> str | Path:
        """Return the untuned small LM."""
        from pema.methods.emulator import MODEL

        return prepared / MODEL if self.small is None else self.small

    def trainable(self, plm: LocalPLM, prepared: Path) -> tuple[Any, Callable[[Path], None]]:
        """See `FineTuning.trainable`; `plm` is the small LM."""
        from pema.methods.tuned import save_trained

        plm.model.requires_grad_(True)
        return plm.model, lambda output: save_trained(dict(plm.model.named_parameters()), output / FILE)

    def open(self, plm: PLM, job: Job, prepared: Path, trained: Path) -> AdaptedModel:
        """See `Method.open`."""
        from pema.methods.adapted.with_small import WithSmallLM
        from pema.methods.small_models import load_small, load_tuned

        untuned = load_small(self.source(job, prepared), plm, job)
        tuned = load_tuned(untuned, trained / FILE)
        others = (tuned, untuned) if self.mixture == "logits" else (tuned,)
        return WithSmallLM(plm, job, others, self.weight, trained / FILE)
