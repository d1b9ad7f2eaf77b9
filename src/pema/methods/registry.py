"""Registry of the methods by name."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import TYPE_CHECKING

from pema.errors import ConfigError
from pema.own import is_own, own
from pema.schema import among

if TYPE_CHECKING:
    from pema.methods.contract import Method

METHODS = {
    "plm": "plm_alone.PLMAlone",
    "few-shot": "few_shot.FewShot",
    "retrieved-few-shot": "few_shot.RetrievedFewShot",
    "pema": "pema.PEMA",
    "knn-lm": "knn.KNN",
    "full": "full.FullFineTuning",
    "lora": "peft_methods.LoRA",
    "ia3": "peft_methods.IA3",
    "prefix-tuning": "peft_methods.PrefixTuning",
    "offsite": "offsite.OffsiteTuning",
    "small-lm": "small_lm.SmallLM",
}
"""Modules and classes of the methods; they load torch, so a name is checked before its class is imported."""


def get_method(name: str) -> type[Method]:
    """Return the class of the method called `name`; `get_method(name).of(settings)` builds it with settings.

    `module:Class` is a subclass of `Method` of the user's own; see `pema.own`.

    Raises:
        ConfigError: the name is unknown, or the class is not a method.
    """
    from pema.methods.contract import Method

    require_method(name)
    if not is_own(name):
        module, _, kind = METHODS[name].partition(".")
        bundled: type[Method] = getattr(importlib.import_module(f"pema.methods.{module}"), kind)
        return bundled
    method = own(name, "method")
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise ConfigError(f"method {name!r} must be a subclass of pema.methods.contract.Method.")
    if inspect.isabstract(method):
        missing = ", ".join(sorted(method.__abstractmethods__))
        raise ConfigError(f"method {name!r} is not complete: define {missing}, as in pema.methods.contract.Method.")
    if not re.fullmatch(r"[\w.+-]+", getattr(method, "name", "")):
        raise ConfigError(f"method {name!r} needs a class attribute `name` of letters, digits and '-_.+'.")
    return method


def require_method(name: str) -> None:
    """Refuse the name of a method that does not exist, before anything is imported.

    Raises:
        ConfigError: the name is unknown.
    """
    if not is_own(name):
        among("method", [name], METHODS)


def method_name(method: type[Method]) -> str:
    """Return the name of a class for `get_method`."""
    address = f"{method.__module__.removeprefix('pema.methods.')}.{method.__qualname__}"
    return method.name if METHODS.get(method.name) == address else f"{method.__module__}:{method.__qualname__}"
