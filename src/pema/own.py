"""Tasks, metrics and methods of a user's own, named `module:attribute`.

The module is found as Python finds modules, and in the working directory last, so that no file there takes the place
of a library.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from pathlib import Path
from typing import Any

from pema.errors import ConfigError
from pema.files import sha256
from pema.schema import among

NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_own(name: str) -> bool:
    """Return whether a name has the form `module:attribute`."""
    return NAME.fullmatch(name) is not None


def own(name: str, what: str) -> Any:  # noqa: ANN401
    """Import what `module:attribute` names.

    Args:
        name: the name.
        what: what it should be, for the message.

    Raises:
        ConfigError: the module cannot be imported, or has no such attribute.
    """
    module, _, attributes = name.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        value = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"{what} {name!r}: {module} needs {error.name!r}, which is not installed.") from error
        raise ConfigError(
            f"{what} {name!r}: there is no module {module!r}, neither installed nor in the working directory {folder}."
        ) from error
    except Exception as error:
        raise ConfigError(
            f"{what} {name!r}: importing {module} fails with {type(error).__name__}: {error}. Correct the module."
        ) from error
    for attribute in attributes.split("."):
        among(f"{what} in {module}:", [attribute], [each for each in dir(value) if not each.startswith("_")])
        value = getattr(value, attribute)
    return value


@functools.cache
def source_digest(name: str) -> str | None:
    """Return the SHA-256 of the file of the imported module that `module:attribute` names; None if it is no file."""
    file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    return None if file is None else sha256(Path(file))
