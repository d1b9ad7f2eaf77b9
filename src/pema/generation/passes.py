"""One forward pass with the adapter at the output head: one product with W_hd, then the mixture."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pema.adapter.copying import Copied
from pema.adapter.module import Adapter
from pema.errors import ConfigError
from pema.generation.mixture import mix_logits, mix_logits_of, mix_logits_with_copies
from pema.generation.reading import Prompts
from pema.generation.steps import Weights
from pema.owner.head import Head

FEW_ROWS = 16
"""On a CPU, the product of the LM head is computed transposed up to this number of rows."""


@dataclass(eq=False, slots=True)
class Pass:
    """State of one forward pass of the model: instructions for the output head, and its results for the mixture.

    Attributes:
        plug: the plug that the pass belongs to.
        weights: lambda by row and step; None where no position predicts a new token.
        last: step of the last position.
        most: maximum number of positions that predict new tokens.
        whole: whether the pass may return logits at more positions than these.
        count: called with the model's output after the pass.
        outer: the enclosing pass.
        reached: whether the output head ran.
        mixed: number of positions to mix.
        h_pd: (batch, k, d) where it is not stacked but multiplied with the adapter's own rows of W_hd.
        prompts: what an adapter that copies reads; None for one that does not.
        copied: the copying part of P_PEMA at batch x k positions.
    """

    plug: Plug
    weights: Weights | None
    last: int
    most: int
    whole: bool
    count: Callable[[Any], None] | None = None
    outer: Pass | None = None
    reached: bool = False
    mixed: int = 0
    h_pd: Tensor | None = None
    prompts: Prompts | None = None
    copied: Copied | None = None


_PASS: ContextVar[Pass | None] = ContextVar("pema_pass", default=None)


def enter(one: Pass) -> None:
    """Make `one` the pass that the output head reads, until `leave`."""
    one.outer = _PASS.get()
    _PASS.set(one)


def leave(one: Pass) -> None:
    """End the pass, whether or not it raised."""
    _PASS.set(one.outer)


class Plug:
    """The adapter at the output head of one model.

    h_pd is stacked below f before the LM head, so one pass over W_hd gives both products, and everything that the
    model does to its logits (bias, scale, soft cap) applies to both. The two halves are mixed after the model's
    forward. Where the adapter's weight is 0, nothing is stacked and the logits are the PLM's own. With
    `vocabulary="seen"` and more than a few rows, the adapter's product uses its own rows of W_hd only.
    """

    def __init__(self, module: nn.Module, adapter: Adapter, head: Head) -> None:
        self.module = module
        self.adapter = adapter
        self.W_hd = head.weight
        self._tokens = adapter.tokens
        self._rows_of_head = None if adapter.tokens is None else head.subset(adapter.tokens)
        self._forward = module.forward
        self._exchangeable = type(module) is nn.Linear and "forward" not in module.__dict__

    def logits(self, f: Tensor) -> Tensor:
        """Apply the LM head to f with h_pd stacked below it: (batch, q, d) -> (batch, q + k, V).

        Outside a pass of the model, apply the LM head alone.

        Raises:
            ConfigError: the pass would give logits at several positions, and the end of the prompt is unknown.
        """
        one = _PASS.get()
        if one is None or one.plug is not self:
            return self._plain(f)
        one.reached = True
        if not one.whole and f.shape[1] > 1:
            raise ConfigError(
                f"this pass would give logits at {f.shape[1]} positions, and it is unknown which of them follow the "
                "prompt; the attached adapter needs this. If the input is the prompt alone, pass logits_to_keep=1: "
                "the last logits predict the first new token. If a target follows, give the length of the prompt with "
                "`attached.inputs(columns=...)`."
            )
        k = min(f.shape[1], one.most)
        if one.weights is None or one.weights.none(one.last - k + 1, one.last):
            return self._plain(f)
        one.mixed = k
        with torch.no_grad():
            h_pd = self.adapter(f[:, -k:].float()).to(f)
            if one.prompts is not None:
                one.copied = one.prompts.copy(f[:, -k:].float())
            if self._tokens is None or f.shape[0] * (f.shape[1] + k) <= FEW_ROWS:
                return self._product(torch.cat((f, h_pd), dim=1))
            one.h_pd = h_pd
            return self._plain(f)

    @torch.no_grad()
    def mixture(self, one: Pass, logits: Tensor) -> Tensor:
        """Turn the stacked logits (batch, q + k, V) into those of the mixture, (batch, q, V)."""
        k, weights = one.mixed, one.weights
        if not k or weights is None:
            return logits
        # A model spread over several devices takes its tokens on one device and returns its logits on another.
        logs = [log.to(logits.device) for log in weights.logs(one.last - k + 1, one.last)]
        plm = logits if one.h_pd is not None else logits[:, :-k]
        if one.copied is not None:
            mixed = mix_logits_with_copies(logits[:, -2 * k :], one.copied, *logs)
            return mixed if k == plm.shape[1] else torch.cat((plm[:, :-k].float(), mixed), dim=1)
        if self._rows_of_head is None or self._tokens is None:
            mixed = mix_logits(logits[:, -2 * k :], *logs)
        elif one.h_pd is None:
            mixed = mix_logits_of(self._tokens, plm[:, -k:], logits[:, -k:].index_select(2, self._tokens), *logs)
        else:
            pema = self._rows_of_head.logits(one.h_pd.flatten(0, 1)).view(len(logits), k, -1)
            mixed = mix_logits_of(self._tokens, plm[:, -k:], pema, *logs)
        return mixed if k == plm.shape[1] else torch.cat((plm[:, :-k].float(), mixed), dim=1)

    def _plain(self, f: Tensor) -> Tensor:
        """Run the LM head's own forward."""
        logits: Tensor = self._forward(f)
        return logits

    def _product(self, stacked: Tensor) -> Tensor:
        """Apply the LM head to a few rows: (batch, q + k, d) -> (batch, q + k, V).

        On a CPU, the transposed product (W_hd times the rows as columns) reads W_hd once at memory speed; the usual
        order of the factors takes up to twice as long.
        """
        head, rows = self.module, stacked.shape[0] * stacked.shape[1]
        if not self._exchangeable or stacked.device.type != "cpu" or rows > FEW_ROWS:
            return self._plain(stacked)
        weight: Any = head.weight
        product = torch.mm(weight, stacked.view(rows, -1).T).T.contiguous().view(*stacked.shape[:2], -1)
        return product if head.bias is None else product.add_(head.bias)  # type: ignore[arg-type]
