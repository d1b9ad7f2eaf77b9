"""Methods put over those of one object, and taken away again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from torch import nn

from pema.errors import ConfigError


class Method:
    """A method of one object with something around it; for `inspect.signature` it is the method.

    Args:
        method: the bound method.
        around: called with the method and the arguments of a call.
    """

    def __init__(self, method: Callable[..., Any], around: Callable[..., Any]) -> None:
        self.method = method
        self.around = around
        self.__signature__ = inspect.signature(method)
        self.__doc__ = method.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, D102
        return self.around(self.method, *args, **kwargs)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ConfigError("A model with an adapter attached cannot be copied or pickled: detach the adapter first.")


class Around(Protocol):
    """What happens before and behind a forward pass."""

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Before it: what the other two are given."""

    def finish(self, begun: Any, output: Any) -> Any:  # noqa: ANN401
        """Behind it: the output."""

    def end(self, begun: Any) -> None:  # noqa: ANN401
        """However it ended."""


class ForwardMethod(Method):
    """A model's `forward` with something before and behind it, which `torch.compile` leaves out of its graphs.

    What is compiled is the forward pass in between, so a step that is a number does not have it compiled anew.
    """

    def __init__(self, method: Callable[..., Any], passes: Around) -> None:
        super().__init__(method, passes.begin)
        self._passes = passes

    @torch.compiler.disable(  # type: ignore[untyped-decorator, no-untyped-call]
        recursive=False, reason="the adapter of pema has a part in every pass outside the graph: fullgraph=False"
    )
    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, D102
        begun = self._passes.begin(args, kwargs)
        try:
            return self._passes.finish(begun, self.method(*args, **kwargs))
        finally:
            self._passes.end(begun)


class Replacement:
    """`method` over the method `name` of one object, until `undo`."""

    def __init__(self, module: nn.Module, name: str, method: Method) -> None:
        self._module, self._name, self._method = module, name, method
        self._before = module.__dict__.get(name)
        module.__dict__[name] = method

    def require_in_place(self) -> None:
        """Refuse to undo what something else has been put over.

        Raises:
            ConfigError: it was.
        """
        if self._module.__dict__.get(self._name) is not self._method:
            raise ConfigError(
                f"{type(self._module).__name__}.{self._name} was replaced after the adapter was attached: undo that "
                "first."
            )

    def undo(self) -> None:
        """Put back what was there."""
        del self._module.__dict__[self._name]
        if self._before is not None:
            self._module.__dict__[self._name] = self._before
