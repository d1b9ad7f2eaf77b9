"""A step of training as a CUDA graph: one launch in place of one for each kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

WARM_UP = 3
"""Number of calls before the capture: the libraries prepare themselves in them, and optimizers make their state."""


class Captured:
    """A function of tensors, which runs as a CUDA graph once it has been called with the same shapes before.

    Its work must depend on the shapes of its arguments alone, and it may not wait for the device. What else it reads
    and writes, such as parameters, must stay in its place. The result of a graph is overwritten by the next call.
    """

    def __init__(self, run: Callable[..., Tensor], generators: Iterable[torch.Generator] = ()) -> None:
        """Wrap a function.

        Args:
            run: the function.
            generators: what it draws random numbers from.
        """
        self._run, self._generators = run, list(generators)
        self._shapes: list[torch.Size] = []
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._output = torch.empty(0)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the result: of the function with other shapes than those of the graph, else of the graph."""
        shapes = [tensor.shape for tensor in inputs]
        if self._graph is None:
            self._calls = self._calls + 1 if shapes == self._shapes else 1
            self._shapes = shapes
            if self._calls > WARM_UP:
                self._capture(inputs)
        if self._graph is None or shapes != self._shapes:
            return self._run(*inputs)
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        self._graph.replay()
        return self._output

    def _capture(self, inputs: Iterable[Tensor]) -> None:
        """Record the work of a call, which is not carried out."""
        self._inputs = [tensor.clone() for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        device = self._inputs[0].device
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Other threads go on to copy what is read.
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._output = self._run(*self._inputs)
        self._graph = graph
