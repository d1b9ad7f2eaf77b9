"""Names of style metrics, `MEASURE:MODEL` or `MEASURE:MODEL#LABEL`, read without loading the model."""

from __future__ import annotations

from typing import NamedTuple, Self

from pema.errors import ConfigError
from pema.owner.sources.names import require_model

CLASSIFIER = "a text classifier"


class ClassifierName(NamedTuple):
    """The parts of the name of a style metric.

    Attributes:
        measure: one of `pema.evaluation.notation.STYLE`.
        model: hub name or folder of the classifier.
        label: its name for the desired style; "" if the metric names none.
    """

    measure: str
    model: str
    label: str

    @classmethod
    def of(cls, metric: str) -> Self:
        """Split the name of a style metric.

        Raises:
            ConfigError: it names no model.
        """
        measure, _, rest = metric.partition(":")
        model, _, label = rest.partition("#")
        if not model:
            raise ConfigError(
                f"{metric!r} names no classifier: write {measure}:MODEL, with a transformers text-classification model."
            )
        return cls(measure, model, label)

    def require(self) -> None:
        """Refuse a model that does not exist, without loading torch.

        Raises:
            OwnerError: there is no such folder, and no such model on the hub.
        """
        require_model(self.model, CLASSIFIER)
