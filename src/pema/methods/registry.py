"""Registry of the methods by name."""

from __future__ import annotations

from pema.methods.contract import Method
from pema.methods.full import FullFineTuning
from pema.methods.knn import KNN
from pema.methods.offsite import OffsiteTuning
from pema.methods.peft_methods import IA3, LoRA, PrefixTuning
from pema.methods.pema import PEMA
from pema.methods.plm_alone import PLMAlone
from pema.schema import among

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (PLMAlone, PEMA, KNN, FullFineTuning, LoRA, IA3, PrefixTuning, OffsiteTuning)
}


def get_method(name: str) -> type[Method]:
    """Return the class of the method called `name`; `get_method(name).of(settings)` builds it with settings.

    Raises:
        ConfigError: the name is unknown.
    """
    among("method", [name], METHODS)
    return METHODS[name]
