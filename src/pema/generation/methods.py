"""Methods that temporarily replace those of one object."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from torch import nn

from pema.errors import ConfigError


class Method:
    """Wrapper around a bound method; `inspect.signature` sees the original method.

    Args:
        method: the bound method.
        around: called with the method and the arguments of each call.
    """

    def __init__(self, method: Callable[..., Any], around: Callable[..., Any]) -> None:
        self.method = method
        self.around = around
        self.__signature__ = inspect.signature(method)
        self.__doc__ = method.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, D102
        return self.around(self.method, *args, **kwargs)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ConfigError("a model with an adapter attached cannot be copied or pickled: detach the adapter first.")


class PassHooks(Protocol):
    """Actions before and after a forward pass."""

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Run before the pass; return the object that `finish` and `end` receive."""

    def finish(self, begun: Any, output: Any) -> Any:  # noqa: ANN401
        """Run after a successful pass; return its output."""

    def end(self, begun: Any) -> None:  # noqa: ANN401
        """Run last, whether or not the pass raised."""


class ForwardMethod(Method):
    """Wrapper around a model's `forward` whose actions before and after it stay outside the graphs of `torch.compile`.

    Only the forward pass in between is compiled, so a changing step number does not trigger recompilation.
    """

    def __init__(self, method: Callable[..., Any], passes: PassHooks) -> None:
        super().__init__(method, passes.begin)
        self._passes = passes

    @torch.compiler.disable(  # type: ignore[untyped-decorator, no-untyped-call]
        recursive=False, reason="the adapter of pema runs outside the graph in every pass: use fullgraph=False"
    )
    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, D102
        begun = self._passes.begin(args, kwargs)
        try:
            return self._passes.finish(begun, self.method(*args, **kwargs))
        finally:
            self._passes.end(begun)


class Replacement:
    """Replacement of the method `name` of one object by `method`, until `undo`."""

    def __init__(self, module: nn.Module, name: str, method: Method) -> None:
        self._module, self._name, self._method = module, name, method
        self._before = module.__dict__.get(name)
        module.__dict__[name] = method

    def require_in_place(self) -> None:
        """Check that nothing else has replaced the method since.

        Raises:
            ConfigError: another object has replaced it.
        """
        if self._module.__dict__.get(self._name) is not self._method:
            raise ConfigError(
                f"{type(self._module).__name__}.{self._name} was replaced after the adapter was attached: undo that "
                "first."
            )

    def undo(self) -> None:
        """Restore the original method."""
        del self._module.__dict__[self._name]
        if self._before is not None:
            self._module.__dict__[self._name] = self._before
