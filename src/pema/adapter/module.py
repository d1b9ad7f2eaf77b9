"""The adapter: A, B_rct and B_pd (the paper's section 3.3), with options beyond the paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, rms_norm

from pema.adapter import store
from pema.adapter.config import AdapterConfig
from pema.adapter.copying import Copied, Copying
from pema.adapter.dropout import Dropout
from pema.errors import AdapterError, MismatchError
from pema.memory.prompts import ContextTokens
from pema.memory.reader import Memory
from pema.owner.contract import PLMDescription
from pema.owner.head import Head
from pema.schema import require_instance
from pema.storage.address import name_of
from pema.storage.publishing import destination


class Adapter(nn.Module):
    """PEMA adapter: h_pd = B_pd A f and h_rct = B_rct A f; P_PEMA = softmax(W_hd h_pd).

    With `residual`, h_pd = f + B_pd A f, and with `activation="gelu"` also, h_pd = f + B_pd gelu(A norm(f)), where
    norm(f) = f / sqrt(mean(f^2)). B_pd is then zero at the start: the adapter starts as the PLM. With
    `vocabulary="seen"` P_PEMA is zero outside `tokens`; with `vocabulary="own"` too, and softmax(U h_pd) replaces
    softmax(W_hd h_pd). With `copy_width`, P_PEMA = g P_copy + (1 - g) softmax(W_hd
    h_pd), and P_copy is a distribution over the tokens of the prompt (`pema.adapter.copying`).

    Shapes: f, h_pd and h_rct (..., d); A (r, d); B_pd and B_rct (d, r). f is what W_hd reads (`head.normalise`d).

    Attributes:
        config: what the adapter is and where it comes from.
        A: (r, d), trained.
        B_pd: (d, r), trained.
        B_rct: (d, r), frozen; None if the training needed no reconstruction.
        tokens: (V',) int64, the sorted token ids of the "seen" or "own" vocabulary; None with the full vocabulary.
        U: (V', d), trained, the output matrix of the "own" vocabulary, before training the rows of W_hd; else None.
        copying: the part that copies tokens of the prompt; None without `copy_width`.
        name: name in messages: the last part of the folder or hub name that it was saved to or loaded from.
    """

    B_rct: Tensor | None
    tokens: Tensor | None
    U: nn.Parameter | None

    def __init__(self, config: AdapterConfig, tokens: Tensor | None = None, *, seed: int = 0) -> None:
        super().__init__()
        if (config.vocabulary != "full") != (tokens is not None):
            raise AdapterError(f"vocabulary={config.vocabulary!r} {'needs' if tokens is None else 'takes no'} tokens.")
        if tokens is not None and not _is_vocabulary(tokens, config.vocabulary_size):
            raise AdapterError(f"the seen tokens must be sorted, unique and within 0..{config.vocabulary_size - 1}.")
        self.config = config
        self.name = ""
        random = torch.Generator().manual_seed(seed)
        self.A = nn.Parameter(_uniform(config.rank, config.d, random))
        self.B_pd = nn.Parameter(_uniform(config.d, config.rank, random))
        if config.activation == "gelu":
            nn.init.normal_(self.A, std=config.d**-0.5, generator=random)
        if config.residual:
            nn.init.zeros_(self.B_pd)
        self.register_buffer("B_rct", None)
        self.register_buffer("tokens", tokens)
        self.copying = Copying(config, random) if config.copy_width else None
        self.register_parameter("U", None)
        if config.vocabulary == "own" and tokens is not None:
            self.U = nn.Parameter(torch.zeros(len(tokens), config.d))

    def forward(self, f: Tensor) -> Tensor:
        """Return h_pd of f: (..., d) -> (..., d), in the adapter's dtype."""
        f = f.to(self.A.dtype)
        return self.predict(f, self.compress(f))

    def compress(self, f: Tensor, drop: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return A f, or gelu(A norm(f)): (..., d) -> (..., r). `drop` is applied to the input of A."""
        x = self.normalise(f)
        return self.activate(linear(x if drop is None else drop(x), self.A))

    def normalise(self, f: Tensor) -> Tensor:
        """Return the input of A: f, or norm(f) with the activation; (..., d) -> (..., d)."""
        return rms_norm(f, (self.config.d,)) if self.config.activation == "gelu" else f

    def activate(self, z: Tensor) -> Tensor:
        """Return the input of B_pd: z, or gelu(z) with the activation; (..., r) -> (..., r)."""
        return gelu(z) if self.config.activation == "gelu" else z

    def predict(self, f: Tensor, z: Tensor) -> Tensor:
        """Return B_pd z, or f + B_pd z with `residual`: (..., d), (..., r) -> (..., d)."""
        h_pd = linear(z, self.B_pd)
        return f + h_pd if self.config.residual else h_pd

    def reconstruct(self, f: Tensor) -> Tensor:
        """Return h_rct = B_rct A f: (..., d) -> (..., d).

        Raises:
            AdapterError: the adapter was trained without reconstruction.
        """
        if self.B_rct is None:
            raise AdapterError(
                "this adapter has no B_rct: it was trained with kappa=0 and init='random'. Train with kappa > 0 for it."
            )
        return linear(self.compress(f.to(self.A.dtype)), self.B_rct)

    def logits(self, h: Tensor, head: Head) -> Tensor:
        """Return the logits of P_PEMA without copies, of the tokens that it covers: (n, d) -> (n, V or V') float32."""
        return (
            head.logits(h, self.tokens)
            if self.U is None
            else head.finish(linear(h.to(self.U.dtype), self.U), self.tokens)
        )

    def groups(self) -> list[dict[str, Any]]:
        """Return the trained parameters in groups for the optimizer; see `make_optimizer`."""
        groups: list[dict[str, Any]] = [{"params": [self.A, self.B_pd] + ([] if self.U is None else [self.U])}]
        return groups if self.copying is None else groups + self.copying.groups()

    def context(self, memory: Memory, rows: Tensor) -> ContextTokens | None:
        """Return what copying reads at some pairs of a memory (b,); None without copying.

        Raises:
            ExternalMemoryError: the memory does not contain its prompts.
        """
        return None if self.copying is None else memory.prompts.at(rows, self.config.frame)

    def copy(
        self,
        f: Tensor,
        context: ContextTokens | None,
        W_hd: Tensor | None,
        drop: Dropout | None = None,
    ) -> Copied | None:
        """Return the copying part of P_PEMA at contexts, f (n, d) and their tokens; None without copying.

        With dropout in one of several processes, the tokens are those of the whole batch, f is this process's part.

        Raises:
            AdapterError: the adapter copies, and the tokens of the contexts are missing.
        """
        if self.copying is None:
            return None
        if context is None or W_hd is None:
            raise AdapterError("this adapter copies tokens of the prompt: give the tokens of the contexts, and W_hd.")
        context = context.to(f.device)
        keys, written = self.copying.keys(context, W_hd, None if drop is None else drop.common), context.written
        if drop is not None and drop.pairs:
            own = drop.own(len(f))
            keys, written = keys.take(own), written[own]
        copied: Copied = self.copying(f, keys, written, W_hd, drop)
        return copied

    def log_probs(self, f: Tensor, head: Head, context: ContextTokens | None = None) -> Tensor:
        """Return log P_PEMA(. | c) of every token: (n, d) -> (n, V) float32; -inf outside a seen vocabulary.

        Args:
            f: (n, d).
            head: the head bundle.
            context: the tokens of the contexts, for an adapter that copies.
        """
        return self.log_probs_with(f, head, self.copy(f, context, head.weight))

    def log_probs_with(self, f: Tensor, head: Head, copied: Copied | None) -> Tensor:
        """Return the same as `log_probs`, given the copying part."""
        log_p = torch.log_softmax(self.logits(self(f), head).float(), dim=-1)
        if self.tokens is not None:
            whole = log_p.new_full((*log_p.shape[:-1], self.config.vocabulary_size), -torch.inf)
            whole[..., self.tokens] = log_p
            log_p = whole
        return log_p if copied is None else copied.over(log_p)

    def require(self, description: PLMDescription) -> None:
        """Refuse a PLM that the adapter was not trained for.

        Raises:
            MismatchError: the message names what differs: the PLM, its tokenizer, its head, the tap or a size.
        """
        what = f"the adapter {self.name}" if self.name else "this adapter"
        if self.config.plm is not None:
            description.require_same(self.config.plm, what)
        sizes, expected = (self.config.d, self.config.vocabulary_size), (description.d, description.vocabulary_size)
        if sizes != expected:
            raise MismatchError(
                f"{what} has (d, V) = {sizes}, {description.name} has {expected}: use the PLM that it was trained for."
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter to `folder`, or an address, in the layout of a PEFT adapter; see `pema.adapter.store.save`.

        Raises:
            StorageError: writing failed, or the address has another adapter.
        """
        with destination(folder, store.ADAPTER, anew=True) as new:
            store.save(self.config, self.state_dict(), new)
        self.name = name_of(folder)

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> Adapter:
        """Read an adapter from a folder, an address or the Hugging Face hub; see `pema.adapter.store.load`.

        Raises:
            AdapterError: there is none, or its files are damaged or do not belong together.
        """
        config, tensors = store.load(name_or_folder, revision=revision, token=token)
        return cls.of(config, tensors, name_of(name_or_folder))

    @classmethod
    def of(cls, config: AdapterConfig, tensors: Mapping[str, Tensor], name: str) -> Adapter:
        """Return the adapter with these weights, as `state_dict` returns them."""
        adapter = cls(config, tensors.get("tokens"))
        adapter.B_rct = tensors.get("B_rct")
        for each, parameter in adapter.named_parameters():
            parameter.data.copy_(tensors[each])
        adapter.name = name
        return adapter.eval()

    def extra_repr(self) -> str:
        """Return what `repr` shows of the adapter."""
        config = self.config
        size = f"d={config.d}, rank={config.rank}, V={config.vocabulary_size}"
        return f"{size}, vocabulary={config.vocabulary!r}, task={config.task!r}, plm={config.plm and config.plm.name!r}"

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None
    ) -> str:
        """Upload the adapter to the Hugging Face hub and return its address; see `pema.adapter.store.push`."""
        return store.push(self.config, self.state_dict(), repo_id, private=private, revision=revision, token=token)


def _uniform(rows: int, columns: int, random: torch.Generator) -> Tensor:
    """Return the initial values of a linear layer in the paper's code: uniform within 1 / sqrt(columns)."""
    return torch.empty(rows, columns).uniform_(-(columns**-0.5), columns**-0.5, generator=random)


def _is_vocabulary(tokens: Tensor, vocabulary_size: int) -> bool:
    """Return whether these are sorted unique int64 ids below `vocabulary_size`, at least one."""
    if tokens.dtype != torch.int64 or tokens.dim() != 1 or not len(tokens):
        return False
    return bool(tokens[0] >= 0 and tokens[-1] < vocabulary_size and (tokens[1:] > tokens[:-1]).all())


def require_adapter(adapter: object) -> None:
    """Refuse what is not an adapter, such as the folder of one.

    Raises:
        ConfigError: it is something else; the message names the remedy.
    """
    require_instance("adapter", adapter, Adapter, "read one with pema.Adapter.from_pretrained(folder)")
