"""Registry of the methods by name."""

from __future__ import annotations

import inspect
import re

from pema.errors import ConfigError
from pema.methods.contract import Method
from pema.methods.few_shot import FewShot, RetrievedFewShot
from pema.methods.full import FullFineTuning
from pema.methods.knn import KNN
from pema.methods.offsite import OffsiteTuning
from pema.methods.peft_methods import IA3, LoRA, PrefixTuning
from pema.methods.pema import PEMA
from pema.methods.plm_alone import PLMAlone
from pema.own import is_own, own
from pema.schema import among

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(PLMAlone, FewShot, RetrievedFewShot, PEMA, KNN),
        *(FullFineTuning, LoRA, IA3, PrefixTuning, OffsiteTuning),
    )
}


def get_method(name: str) -> type[Method]:
    """Return the class of the method called `name`; `get_method(name).of(settings)` builds it with settings.

    `module:Class` is a subclass of `Method` of the user's own; see `pema.own`.

    Raises:
        ConfigError: the name is unknown, or the class is no method.
    """
    if not is_own(name):
        among("method", [name], METHODS)
        return METHODS[name]
    method = own(name, "method")
    if not (isinstance(method, type) and issubclass(method, Method)) or inspect.isabstract(method):
        raise ConfigError(f"method {name!r} is no subclass of pema.methods.contract.Method that defines all stages.")
    if not re.fullmatch(r"[\w.+-]+", getattr(method, "name", "")):
        raise ConfigError(f"method {name!r} needs a class attribute `name` of letters, digits and '-_.+'.")
    return method


def method_name(method: type[Method]) -> str:
    """Return the name that `get_method` finds a class by."""
    return method.name if METHODS.get(method.name) is method else f"{method.__module__}:{method.__qualname__}"
