"""What an adapter that copies reads while a model generates: the prompts, and the tokens written so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pema.adapter.copying import NO_TOKEN, Copied, Keys, context_tokens, shifted
from pema.adapter.module import Adapter
from pema.tasks.spelling import Speller


@dataclass(frozen=True, eq=False)
class Reader:
    """A reader of prompts for one adapter that copies.

    Attributes:
        adapter: the adapter.
        speller: of the PLM's tokenizer.
        W_hd: (V, d).
    """

    adapter: Adapter
    speller: Speller
    W_hd: Tensor

    def keys(self, ids: Tensor, columns: int, lengths: Tensor) -> Keys:
        """Return the keys of the prompts of a batch.

        Args:
            ids: (rows, columns of the prompt and more), a number of adjacent rows per prompt.
            columns: columns of the prompts, padding on the left included.
            lengths: (items,), the number of tokens of each prompt.
        """
        firsts = ids[:: len(ids) // len(lengths), :columns].tolist()
        return self.keys_of([row[columns - length :] for row, length in zip(firsts, lengths.tolist(), strict=True)])

    @torch.no_grad()
    def keys_of(self, prompts: Sequence[Sequence[int]]) -> Keys:
        """Return the keys of prompts."""
        assert self.adapter.copying is not None
        context = context_tokens(self.speller, prompts, [[] for _ in prompts], self.adapter.config.frame)
        return self.adapter.copying.keys(context.to(self.W_hd.device), self.W_hd)


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts of one pass, and the tokens after them.

    Attributes:
        reader: the reader.
        keys: of each row of the pass.
        written: (rows, W), the tokens after the prompts, up to the last position of the pass.
    """

    reader: Reader
    keys: Keys
    written: Tensor

    def copy(self, f: Tensor) -> Copied:
        """Return the copying part of P_PEMA at the last k positions, f (rows, k, d), as (rows x k) contexts."""
        rows, k = f.shape[:2]
        copying = self.reader.adapter.copying
        assert copying is not None
        before = [shifted(self.written, -n, NO_TOKEN) for n in reversed(range(k))]
        written = torch.stack(before, 1).flatten(0, 1).to(f.device)
        copied: Copied = copying(f.flatten(0, 1), self.keys.repeat(rows * k), written, self.reader.W_hd)
        return copied
