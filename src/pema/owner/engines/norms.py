"""The probe of vectors without log-probabilities: what a final norm returns has a mean square of 1, weight undone."""

from __future__ import annotations

from torch import Tensor

from pema.errors import MismatchError, OwnerError
from pema.owner.head import Head, Norm
from pema.owner.llamacpp.material import Material

TOLERANCE = 0.02
"""Largest deviation of the root mean square from 1; the norm is computed in float32, and its result rounded."""

SMALLEST = 1e-3
"""Weights below this share of the largest are left out: rounding would be magnified."""


def require_after_norm(at_hand: Material, vectors: Tensor, where: str) -> Head:
    """Return the head, after holding vectors against the final norm in front of it.

    Args:
        at_hand: what is known of the model.
        vectors: (n, d).
        where: address of the server, for messages.

    Raises:
        OwnerError: the norm or the form of the head is not known.
        MismatchError: the vectors are not what this norm returns.
    """
    if at_hand.norm is None or len(at_hand.heads) > 1:
        raise OwnerError(
            f"{where} gives no log-probabilities, and {at_hand.name} does not say enough to check its vectors: append "
            "?completions=http://host:port with a server that completes, or give the model's folder behind #."
        )
    deviation = float((_root_mean_square(at_hand.norm, vectors) - 1).abs().max())
    if deviation > TOLERANCE:
        raise MismatchError(
            f"{where} returns vectors that the final norm of {at_hand.name} does not: their root mean square differs "
            f"from 1 by {deviation:.0%} after its weight is undone, at most {TOLERANCE:.0%} is accepted; they are "
            "normalised, from before the norm, or of another model."
        )
    return at_hand.heads[0]


def _root_mean_square(norm: Norm, vectors: Tensor) -> Tensor:
    """Return the root mean square of each vector without the norm's weight and bias, (n,)."""
    values = vectors.double()
    if norm.bias is not None:
        values = values - norm.bias.double()
    if norm.weight is not None:
        weight = norm.weight.double() + norm.settings.offset
        kept = weight.abs() > SMALLEST * weight.abs().max()
        values = values[:, kept] / weight[kept]
    return values.square().mean(1).sqrt()
