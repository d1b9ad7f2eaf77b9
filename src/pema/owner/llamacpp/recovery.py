"""Recovery of f(c) from log-probabilities of some tokens: least squares against their rows of W_hd.

With logits = scale (W_hd f + bias), the log-probabilities of any tokens S are a linear function of f up to a constant:

    log p_S = scale (W_S f + bias_S) - c

For a fixed S with more tokens than d + 1, the solution (f, c) is a product with the pseudo-inverse of [scale W_S, -1],
which is computed once. S is drawn at random, so that its rows span the head space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pema.errors import OwnerError
from pema.owner.head import Head
from pema.owner.llamacpp.material import Material

FACTOR = 1.5
"""Number of tokens in S, as a multiple of d + 1: enough for a well-conditioned system."""

LARGEST_CONDITION = 1e5
"""Largest ratio of singular values: the log-probabilities are exact to about 1e-5."""


def enough(d: int) -> int:
    """Return the number of tokens whose log-probabilities determine f."""
    return int(FACTOR * (d + 1)) + 1


@dataclass(frozen=True)
class Recovery:
    """The tokens S, and what maps their log-probabilities to f.

    Attributes:
        tokens: (k,) the tokens.
        inverse: (d, k) float64.
        offset: (k,) float64, scale times the bias.
    """

    tokens: list[int]
    inverse: Tensor
    offset: Tensor

    @classmethod
    def of(cls, head: Head, at_hand: Material) -> Recovery:
        """Choose the tokens and compute the inverse.

        Raises:
            OwnerError: the logits have a soft cap, or the vocabulary is too small to determine f.
        """
        if head.soft_cap is not None:
            raise OwnerError(
                f"{at_hand.name} has a soft cap on its logits, so f cannot be recovered from log-probabilities: start "
                "the server with --embeddings --pooling none."
            )
        tokens = at_hand.ordinary_tokens(enough(head.d))
        recovery = cls.solving(head, tokens, at_hand.rows(tokens))
        if recovery is None:
            raise OwnerError(
                f"f of {at_hand.name} cannot be recovered from log-probabilities: {len(tokens)} ordinary tokens do not "
                f"determine {head.d} numbers. Start the server with --embeddings --pooling none."
            )
        return recovery

    @classmethod
    def solving(cls, head: Head, tokens: list[int], rows: Tensor) -> Recovery | None:
        """Compute the inverse for some tokens and their rows of W_hd; None if they do not determine f."""
        system = torch.cat([head.scale * rows, -torch.ones(len(tokens), 1)], dim=1).double()
        singular = torch.linalg.svdvals(system)
        if len(tokens) < system.shape[1] or singular[0] > LARGEST_CONDITION * singular[-1]:
            return None
        offset = torch.zeros(len(tokens)) if head.bias is None else head.scale * head.bias[tokens].float()
        return cls(tokens, torch.linalg.pinv(system)[: head.d], offset.double())

    def __call__(self, log_probabilities: Tensor) -> Tensor:
        """Recover f, (n, d) float32, from the (n, k) log-probabilities of the tokens, each row up to a constant."""
        return ((log_probabilities.double() - self.offset) @ self.inverse.T).float()
