"""The plug-in: an adapter at the output head of any unmodified transformers causal language model."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pema.errors import ConfigError, MismatchError, OwnerError
from pema.generation.mixture import mix_logits, mix_logits_of
from pema.generation.schedule import Schedule
from pema.generation.steps import Prompts, Weights, cache_length, prompts_of_call, prompts_of_forward
from pema.owner.derivation import output_embedding
from pema.owner.state import state_argument, state_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pema.adapter.module import Adapter
    from pema.owner.contract import PLMDescription
    from pema.owner.head import Head

FEW_ROWS = 16
"""Up to so many rows the LM head is multiplied with its factors exchanged, on a CPU."""

_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def attach(
    model: PreTrainedModel,
    adapter: Adapter,
    head: Head,
    schedule: Schedule,
    *,
    overhead: int | None = None,
    description: PLMDescription | None = None,
) -> Attached:
    """Plug `adapter` into `model`, until `detach()` or the end of a `with` block.

    Args:
        model: any causal language model of transformers, unmodified; its weights and modules stay as they are.
        adapter: what `pema train` made.
        head: the head bundle of the same model.
        schedule: the adapter's weight per step.
        overhead: prompt tokens that are not tokens of the input (`task.template.overhead(tokenizer)`), so that SL is
            a prompt's length minus `overhead`. Not needed by a schedule that does not depend on SL, or where
            `attached.inputs(source_lengths=...)` says SL.
        description: what the model says of itself; with it, an adapter of another PLM is refused.

    Raises:
        ConfigError: an adapter is attached already.
        OwnerError: a model whose output head or cache the plug-in does not understand.
        MismatchError: the adapter belongs to another PLM, or has other dimensions.
    """
    return Attached(model, adapter, head, schedule, overhead=overhead, description=description)


class Attached:
    """logits = log(lambda_t softmax(W_hd h_pd) + (1 - lambda_t) softmax(W_hd f)), with h_pd = adapter(f).

    h_pd is stacked under f before the LM head, so one pass over W_hd gives both products, and whatever the model does
    to its logits (bias, scale, soft cap) it does to both. Behind the model's forward the two halves are mixed. Where
    the adapter has no weight, nothing is stacked and the logits are the PLM's own; where it has all the weight, h_pd
    takes the place of f. With `vocabulary="seen"` and more than a few rows the adapter's product is over its own rows
    of W_hd only.

    softmax(logits) is P at the positions that predict generated tokens; logits of earlier positions stay the PLM's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: Adapter,
        head: Head,
        schedule: Schedule,
        *,
        overhead: int | None,
        description: PLMDescription | None,
    ) -> None:
        output_head = _output_head(model)
        if description is not None:
            adapter.require(description)
        _require_dimensions(output_head, adapter, head)
        if overhead is not None and overhead < 0:
            raise ConfigError(f"overhead counts prompt tokens, so it cannot be {overhead}.")
        if model in _ATTACHED:
            raise ConfigError(f"{type(model).__name__} has an adapter attached already: detach that one first.")
        self.model = model
        self.adapter = adapter
        self.schedule = schedule
        self._overhead = overhead
        self._signature = inspect.signature(model.forward)
        self._was_training = adapter.training
        adapter.eval()
        weight = output_head.weight
        if isinstance(weight, Tensor) and weight.device.type != "meta":
            adapter.to(weight.device)
        self._tokens: Tensor | None = None if adapter.tokens is None else adapter.tokens
        self._head = None if self._tokens is None else head.subset(self._tokens)
        self._given_lengths: Tensor | None = None
        self._prompts: Prompts | None = None
        self._fixed = False
        self._weights: Weights | None = None
        self._step: int | None = None
        self._mixing: _Mixing | None = None
        self._reached = False
        self._handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.register_forward_hook(self._after_model, with_kwargs=True, always_call=False),
        ]
        self._output_head = output_head
        self._head_forward = output_head.forward
        self._bare = "forward" not in output_head.__dict__
        self._replaced = [
            _replace(model, "generate", self._generating(model.generate)),
            _replace(output_head, "forward", self._in_head),
        ]
        _ATTACHED.add(model)

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Restore the model exactly; nothing happens the second time."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for restore in self._replaced:
            restore()
        self.adapter.train(self._was_training)
        _ATTACHED.discard(self.model)

    @contextlib.contextmanager
    def inputs(
        self, source_lengths: Tensor | list[int] | None = None, columns: int | None = None
    ) -> Iterator[Attached]:
        """Say what the model's calls inside the block are given, where it cannot be read from them.

        Args:
            source_lengths: (items,) SL of each input in the batch, instead of prompt length minus overhead. A batch
                may hold several rows per input (beams, samples) side by side.
            columns: positions that the prompt takes in every row, padding included. With it, calls of the model
                itself with the whole sequence and no cache are understood: the logits at position columns - 1 + t are
                those of step t.

        Raises:
            ConfigError: a length or `columns` below 1.
        """
        before = self._given_lengths, self._prompts, self._fixed, self._weights
        if source_lengths is not None:
            lengths = torch.as_tensor(source_lengths, dtype=torch.int64)
            if lengths.ndim != 1 or not len(lengths) or int(lengths.min()) < 1:
                raise ConfigError(f"source_lengths must be one length of at least 1 per input, not {source_lengths}.")
            self._given_lengths = lengths
        if columns is not None:
            if columns < 1:
                raise ConfigError(f"columns counts the positions of the prompt, so it cannot be {columns}.")
            self._prompts, self._fixed = Prompts(columns, torch.tensor([columns])), True
        self._weights = None
        try:
            yield self
        finally:
            self._given_lengths, self._prompts, self._fixed, self._weights = before

    def _generating(self, generate: Any) -> Any:  # noqa: ANN401
        """`generate` with the prompts known to the hooks, so that t holds for every cache and decoding method."""

        def generate_with_adapter(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            config = kwargs.get("generation_config") or (args[0] if args else None) or self.model.generation_config
            pad = kwargs.get("pad_token_id", config.pad_token_id)
            ends = kwargs.get("eos_token_id", config.eos_token_id)
            prompts = prompts_of_call(inputs, kwargs, pad, ends if isinstance(ends, list) else [ends])
            before = self._prompts, self._fixed, self._weights
            self._prompts, self._fixed, self._weights = prompts, prompts is not None, None
            try:
                return generate(inputs, *args, **kwargs)
            finally:
                self._prompts, self._fixed, self._weights = before

        return generate_with_adapter

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the step that this forward pass is at, and the weights of the batch."""
        self._step = self._mixing = None
        self._reached = False
        if args:
            kwargs = {**self._signature.bind_partial(*args).arguments, **kwargs}
        if kwargs.get("labels") is not None:
            raise ConfigError(
                "A loss with an adapter attached would be the PLM's own: leave the labels out, or detach."
            )
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise ConfigError("logits_to_keep must be a number with an adapter attached, not a tensor of positions.")
        shown = kwargs.get("input_ids")
        if shown is None:
            shown = kwargs["inputs_embeds"]
        past = cache_length(state_of(kwargs))
        rows, columns = shown.shape[0], past + shown.shape[1]
        if not self._fixed and past == 0:
            if kwargs.get("use_cache") is False:
                raise ConfigError(
                    "Without a cache the step cannot be known: leave use_cache on, call the model's `generate`, or "
                    "say how long the prompt is with `attached.inputs(columns=...)`."
                )
            self._prompts, self._weights = prompts_of_forward(kwargs, rows, columns, shown.device), None
        if self._prompts is None:
            raise ConfigError(
                "The cache was filled before the adapter was attached, so the step is unknown: say how long the prompt "
                "is with `attached.inputs(columns=...)`."
            )
        step = columns - self._prompts.columns
        if step < 0:
            return
        if self._weights is None or self._weights.rows != rows:
            self._weights = Weights(self.schedule, self._input_lengths(self._prompts).to(shown.device), rows)
        self._weights.until(step)
        self._step = step

    def _input_lengths(self, prompts: Prompts) -> Tensor:
        if self._given_lengths is not None:
            return self._given_lengths
        if self._overhead is not None:
            return (prompts.lengths - self._overhead).clamp(min=1)
        if not getattr(self.schedule, "needs_length", True):
            return prompts.lengths
        raise ConfigError(
            f"{type(self.schedule).__name__} needs the length of the input: attach with "
            "overhead=task.template.overhead(tokenizer), or call inside `attached.inputs(source_lengths=...)`."
        )

    def _in_head(self, f: Tensor) -> Tensor:
        """The LM head of f with h_pd stacked under it, for the last k positions: those from step t = 0 on.

        f is (batch, q, d) and what comes out (batch, q + k, V).
        """
        if self._step is None or self._weights is None:
            return self._plain(f)
        self._reached = True
        last = self._step
        k = min(f.shape[1], last + 1)
        first = last - k + 1
        if self._weights.none(first, last):
            return self._plain(f)
        with torch.no_grad():
            h_pd = self.adapter(f[:, -k:].float()).to(f)
            few = f.shape[0] * (f.shape[1] + k) <= FEW_ROWS
            if self._tokens is None and self._weights.all(first, last):
                return self._plain(torch.cat((f[:, :-k], h_pd), dim=1))
            if self._tokens is None or few:
                self._mixing = _Mixing(first, last, None)
                return self._product(torch.cat((f, h_pd), dim=1))
            self._mixing = _Mixing(first, last, h_pd)
            return self._plain(f)

    def _plain(self, f: Tensor) -> Tensor:
        """The LM head's own forward."""
        logits: Tensor = self._head_forward(f)
        return logits

    def _product(self, stacked: Tensor) -> Tensor:
        """The LM head of a few rows: (batch, q + k, d) -> (batch, q + k, V).

        On a CPU, W_hd times the rows as columns reads W_hd once at the speed of the memory where the usual order of
        the factors takes up to twice as long.
        """
        head, rows = self._output_head, stacked.shape[0] * stacked.shape[1]
        if type(head) is not nn.Linear or not self._bare or stacked.device.type != "cpu" or rows > FEW_ROWS:
            return self._plain(stacked)
        product = torch.mm(head.weight, stacked.view(rows, -1).T).T.contiguous().view(*stacked.shape[:2], -1)
        return product if head.bias is None else product.add_(head.bias)

    @torch.no_grad()
    def _after_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ANN401
        """Replace the stacked logits (batch, q + k, V) by those of the mixture (batch, q, V)."""
        mixing, weights, step, self._step, self._mixing = self._mixing, self._weights, self._step, None, None
        if step is not None and not self._reached:
            raise OwnerError(f"{type(model).__name__} made logits without its output head, so the adapter had no part.")
        if mixing is None or weights is None:
            return output
        logits = output[0] if isinstance(output, tuple) else output.logits
        k = mixing.last - mixing.first + 1
        logs = weights.logs(mixing.first, mixing.last).to(logits.device)
        plm = logits if mixing.h_pd is not None else logits[:, :-k]
        if self._head is None or self._tokens is None:
            mixed = mix_logits(logits[:, -2 * k :], logs)
        elif mixing.h_pd is None:
            mixed = mix_logits_of(self._tokens, plm[:, -k:], logits[:, -k:].index_select(2, self._tokens), logs)
        else:
            pema = self._head.logits(mixing.h_pd.flatten(0, 1)).view(len(logits), k, -1)
            mixed = mix_logits_of(self._tokens, plm[:, -k:], pema, logs)
        if weights.some_none(mixing.first, mixing.last):
            alone = (weights.table(mixing.first, mixing.last) == 0).to(logits.device)[..., None]
            mixed = torch.where(alone, plm[:, -k:].float(), mixed)
        if k < plm.shape[1]:
            mixed = torch.cat((plm[:, :-k].float(), mixed), dim=1)
        if isinstance(output, tuple):
            return (mixed, *output[1:])
        output.logits = mixed
        return output


def _replace(module: nn.Module, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Put `method` over the method `name` of this one object; returns what undoes it."""
    before = module.__dict__.get(name)

    def restore() -> None:
        del module.__dict__[name]
        if before is not None:
            module.__dict__[name] = before

    module.__dict__[name] = method
    return restore


@dataclass(frozen=True, slots=True)
class _Mixing:
    """What the LM head leaves for the hook behind the model.

    Attributes:
        first: the first step that is mixed.
        last: the last one.
        h_pd: (batch, k, d) where it is not stacked but multiplied with the adapter's own rows of W_hd.
    """

    first: int
    last: int
    h_pd: Tensor | None


def _output_head(model: PreTrainedModel) -> nn.Module:
    """The module that reads f and gives the logits, which must be called once in every forward pass."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise OwnerError(f"{name} is an encoder-decoder: an adapter plugs into causal language models only.")
    module = output_embedding(model)
    if state_argument(model) not in ("cache", "past_key_values"):
        raise OwnerError(f"{name} keeps no state between two steps, so its step cannot be known.")
    return module


def _require_dimensions(output_head: nn.Module, adapter: Adapter, head: Head) -> None:
    config = adapter.config
    if (config.vocabulary_size, config.d) != (head.vocabulary_size, head.d):
        raise MismatchError(
            f"The adapter is for a head of {config.vocabulary_size} x {config.d}, this head is "
            f"{head.vocabulary_size} x {head.d}: use the PLM that the adapter was trained for."
        )
    shape = tuple(getattr(output_head, "weight", head.weight).shape)
    if shape != (head.vocabulary_size, head.d):
        raise MismatchError(
            f"The head bundle is {head.vocabulary_size} x {head.d}, the model's output head is {shape[0]} x {shape[1]}"
            ": use the head of this model."
        )
