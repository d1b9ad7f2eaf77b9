"""The plug-in: an adapter at the output head of any unmodified transformers causal language model."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pema.adapter.schedule import Schedule
from pema.errors import ConfigError, MismatchError, OwnerError
from pema.generation.methods import ForwardMethod, Method, Replacement
from pema.generation.passes import Pass, Plug, enter, leave
from pema.generation.planning import Planner
from pema.generation.reading import Reader
from pema.owner.causal_lm import output_embedding
from pema.schema import require
from pema.tasks.spelling import speller_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pema.adapter.module import Adapter
    from pema.owner.contract import PLM, PLMDescription
    from pema.owner.head import Head

_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def attach(
    model: PreTrainedModel,
    adapter: Adapter,
    head: Head,
    schedule: Schedule,
    *,
    prompt_overhead_tokens: int | None = None,
    description: PLMDescription | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overhead: int | None = None,
) -> AttachedAdapter:
    """Plug `adapter` into `model`, until `detach()` or the end of a `with` block.

    Args:
        model: any causal language model of transformers, unmodified; its weights and modules stay unchanged.
        adapter: a trained adapter, for example from `pema train`.
        head: the head bundle of the same model.
        schedule: the adapter's weight per step.
        prompt_overhead_tokens: number of prompt tokens that are not source tokens
            (`task.template.prompt_overhead_tokens(tokenizer)`): SL is a prompt's length minus this number. Not needed
            if the schedule does not depend on SL, or if `attached.inputs(source_lengths=...)` gives SL.
        description: the description of the PLM; with it, an adapter of another PLM is refused.
        tokenizer: the PLM's tokenizer, for an adapter that copies.
        overhead: the former name of `prompt_overhead_tokens`.

    Raises:
        ConfigError: an adapter is attached already, an adapter that copies is given no tokenizer, or
            `prompt_overhead_tokens` is below 0 or given twice.
        OwnerError: the model is not a causal language model of transformers, or is a wrapper around one.
        MismatchError: the adapter belongs to another PLM, or has other dimensions.
    """
    if overhead is not None:
        if prompt_overhead_tokens is not None:
            raise ConfigError(
                f"overhead={overhead} is the former name of prompt_overhead_tokens={prompt_overhead_tokens}: "
                "give prompt_overhead_tokens only."
            )
        warnings.warn("overhead is now prompt_overhead_tokens", DeprecationWarning, stacklevel=2)
        prompt_overhead_tokens = overhead
    return AttachedAdapter(
        model,
        adapter,
        head,
        schedule,
        prompt_overhead_tokens=prompt_overhead_tokens,
        description=description,
        tokenizer=tokenizer,
    )


def attach_to(plm: PLM, adapter: Adapter, schedule: Schedule) -> AttachedAdapter:
    """Plug `adapter` into the generator of `plm`; see `attach`."""
    return attach(plm.generator, adapter, plm.head(), schedule, description=plm.description, tokenizer=plm.tokenizer)


class AttachedAdapter:
    """P = lambda_t softmax(W_hd h_pd) + (1 - lambda_t) softmax(W_hd f), with h_pd = adapter(f), in the model's logits.

    softmax(logits) is P at the positions that predict generated tokens, and the logits have the PLM's own zero point
    (`mix_logits`). Inside the model's `generate` the step t is counted from the tokens that `generate` holds, with
    every cache. In a custom loop the first pass is the prompt, and each pass that continues from the returned state is
    one step; a pass whose step is unknown is refused, and `inputs(columns=...)` resolves it.

    A pass made by other code while `generate` runs, such as the second prompt of classifier-free guidance, has the
    current step of `generate`.

    Calls may run concurrently in threads or tasks: the state of a call is kept in its context. A new thread does not
    see an `inputs` block around its start: open the block inside the thread.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: Adapter,
        head: Head,
        schedule: Schedule,
        *,
        prompt_overhead_tokens: int | None,
        description: PLMDescription | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        output_head = _output_head(model)
        if description is not None:
            adapter.require(description)
        _require_dimensions(output_head, adapter, head)
        require("prompt_overhead_tokens", prompt_overhead_tokens, int | None, least=0)
        if adapter.copying is not None and tokenizer is None:
            raise ConfigError("this adapter copies tokens of the prompt: attach with tokenizer=plm.tokenizer.")
        if adapter.U is not None:
            raise ConfigError(
                "this adapter has an output matrix of its own, for an API's tokens: train it with vocabulary='auto' to "
                "attach it to a model."
            )
        if model in _ATTACHED:
            raise ConfigError(f"{type(model).__name__} has an adapter attached already: detach that one first.")
        self.model = model
        self.adapter = adapter
        self.schedule = schedule
        self._was_training = adapter.training
        adapter.eval()
        weight = output_head.weight
        if isinstance(weight, Tensor) and weight.device.type != "meta":
            adapter.to(weight.device)
        self._plug = Plug(output_head, adapter, head)
        reader = None if tokenizer is None else Reader(adapter, speller_of(tokenizer), head.weight)
        reader = None if adapter.copying is None else reader
        self._planner = Planner(model, self._plug, schedule, prompt_overhead_tokens, reader)
        self._running = 0
        self._lock = threading.Lock()
        around = {"generate": self._generate, "prepare_inputs_for_generation": self._prepare}
        around |= dict.fromkeys(("generate_batch", "init_continuous_batching"), self._refuse_batches)
        methods = {name: Method(getattr(model, name), f) for name, f in around.items() if hasattr(model, name)}
        methods["forward"] = ForwardMethod(model.forward, self)
        self._replaced = [Replacement(model, name, method) for name, method in methods.items()]
        self._replaced.append(Replacement(output_head, "forward", Method(output_head.forward, self._in_head)))
        _ATTACHED.add(model)

    def __enter__(self) -> AttachedAdapter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Restore the model exactly; further calls do nothing.

        Raises:
            ConfigError: a call of the model is running, whose remaining tokens would lack the adapter, or other code
                has replaced a method that was replaced here.
        """
        with self._lock:
            if self._running:
                raise ConfigError(
                    f"{type(self.model).__name__} is generating in another thread or inside this call: detach after "
                    "that call has returned."
                )
            for replacement in self._replaced:
                replacement.require_in_place()
            replaced, self._replaced = self._replaced, []
        if not replaced:
            return
        for replacement in replaced:
            replacement.undo()
        self.adapter.train(self._was_training)
        _ATTACHED.discard(self.model)

    @contextlib.contextmanager
    def inputs(
        self, source_lengths: Tensor | list[int] | None = None, columns: int | None = None
    ) -> Iterator[AttachedAdapter]:
        """Describe the inputs of the model's calls inside the block, where the calls themselves do not tell.

        Args:
            source_lengths: (items,) SL of each input in the batch, instead of a prompt's length minus
                `prompt_overhead_tokens`. A batch may hold several adjacent rows per input (beams, samples).
            columns: number of positions that the prompt takes in every row, padding included, for direct calls of the
                model (`generate` knows it). The logits at position columns - 1 + t are those of step t, whether the
                whole sequence is passed at once, with or without a cache, or in parts. Logits of earlier positions,
                which predict the prompt, are the PLM's own.

        Raises:
            ConfigError: a length or `columns` is below 1.
        """
        lengths = None
        if source_lengths is not None:
            lengths = torch.as_tensor(source_lengths, dtype=torch.int64)
            if lengths.ndim != 1 or not len(lengths) or int(lengths.min()) < 1:
                raise ConfigError(f"source_lengths must be one length of at least 1 per input, not {source_lengths}.")
        if columns is not None and columns < 1:
            raise ConfigError(
                f"columns is the number of positions of the prompt and must be at least 1, not {columns}."
            )
        with self._planner.described(lengths, columns):
            yield self

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        """Prepare a forward pass of the model: find its steps and the weights of its batch."""
        one: Pass = self._plan(args, kwargs)
        self._count(1)
        enter(one)
        return one

    def finish(self, one: Pass, output: Any) -> Any:  # noqa: ANN401
        """Turn the stacked logits (batch, q + k, V) of the pass into those of the mixture, (batch, q, V)."""
        return self._mix(one, output)

    def end(self, one: Pass) -> None:
        """End the pass, whether or not it raised."""
        leave(one)
        self._count(-1)

    def _count(self, calls: int) -> None:
        with self._lock:
            self._running += calls

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        return self._planner.plan(args, kwargs)

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run `generate` and make its arguments available to its passes."""
        with self._busy(), self._planner.generating(args, kwargs):
            return generate(*args, **kwargs)

    def _prepare(self, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Record the tokens that `generate` holds; it calls this method before each of its passes."""
        self._planner.prepare(args[0] if args else kwargs.get("input_ids"))
        return prepare(*args, **kwargs)

    def _refuse_batches(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ANN401
        raise ConfigError(
            f"{method.__name__} is continuous batching, which packs several requests into one row: while an adapter "
            "is attached, pass a padded batch to `generate`."
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _in_head(self, _forward: Callable[..., Any], f: Tensor) -> Tensor:
        return self._plug.logits(f)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _mix(self, one: Pass, output: Any) -> Any:  # noqa: ANN401
        if one.weights is not None and not one.reached:
            raise OwnerError(
                f"{type(self.model).__name__} computed logits without calling its output head, so the adapter had no "
                "effect: this model is not supported."
            )
        if one.count is not None:
            one.count(output)
        if not one.mixed:
            return output
        if isinstance(output, tuple):
            return (self._plug.mixture(one, output[0]), *output[1:])
        output.logits = self._plug.mixture(one, output.logits)
        return output


def _output_head(model: PreTrainedModel) -> nn.Module:
    """Return the module that maps f to the logits; it must be called once in every forward pass."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        inside = next((inner for inner in _INNER if hasattr(model, inner.removesuffix("()"))), None)
        raise OwnerError(
            f"{name} is not a model of transformers: attach to the causal language model itself"
            + (f", `model.{inside}`; the adapter then acts in the wrapper as well." if inside else ".")
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise OwnerError(f"{name} is an encoder-decoder: use a causal language model, the only kind that is supported.")
    return output_embedding(model)


_INNER = ("_orig_mod", "get_base_model()", "module")
"""Attributes of wrappers with the wrapped model: compiled models, PEFT, and parallel training."""


def _require_dimensions(output_head: nn.Module, adapter: Adapter, head: Head) -> None:
    config = adapter.config
    if (config.vocabulary_size, config.d) != (head.vocabulary_size, head.d):
        raise MismatchError(
            f"the adapter is for a head of {config.vocabulary_size} x {config.d}, this head is "
            f"{head.vocabulary_size} x {head.d}: use the PLM that the adapter was trained for."
        )
    shape = tuple(getattr(output_head, "weight", head.weight).shape)
    if shape != (head.vocabulary_size, head.d):
        raise MismatchError(
            f"the head bundle is {head.vocabulary_size} x {head.d}, the model's output head is {shape[0]} x {shape[1]}"
            ": use the head of this model."
        )
