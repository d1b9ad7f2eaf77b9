"""P = lambda P_kNN + (1 - lambda) P_LM: the distribution over neighbours, the choice of settings, the model hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pema.adapter.likelihood import maximise
from pema.generation.mixture import mix
from pema.methods.knn_index import Index, Neighbours
from pema.owner.causal_lm import output_embedding
from pema.owner.probing import hooked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARES = tuple(2.0 ** (power / 2) for power in range(-14, 3))
"""Temperatures that are compared on dev, in multiples of the mean distance to the neighbours."""


@dataclass(frozen=True)
class MixtureSettings:
    """Settings of the mixture.

    Attributes:
        k: number of neighbours.
        temperature: T, in units of squared distance.
        weight: lambda, the weight of P_kNN.
    """

    k: int
    temperature: float
    weight: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class TokenMeasurements:
    """Measurements of gold tokens from which their likelihood follows for any k, T and lambda.

    Attributes:
        log_p_plm: (n,) log P_LM(y).
        neighbours: (n, k), the neighbours of the contexts.
        targets: (n,) int64, y.
    """

    log_p_plm: Tensor
    neighbours: Neighbours
    targets: Tensor


def p_knn(neighbours: Neighbours, temperature: float, vocabulary_size: int) -> Tensor:
    """Compute P_kNN(y | c) = sum of exp(-d_i / T) over neighbours with y_i = y, normalised (Khandelwal et al., eq. 2).

    Returns:
        (n, V) float32; all 0 where there are no neighbours.
    """
    shares = torch.softmax(-neighbours.distances / temperature, dim=-1).nan_to_num_(0.0)
    p = torch.zeros(len(shares), vocabulary_size, device=shares.device)
    return p.scatter_add_(1, neighbours.targets, shares)


def mixed(logits: Tensor, neighbours: Neighbours, temperature: float, weight: float) -> Tensor:
    """Compute log P; it equals log P_LM where there are no neighbours.

    Args:
        logits: (n, V), the logits of the PLM.
        neighbours: (n, k), the neighbours of the same contexts.
        temperature: T.
        weight: lambda.

    Returns:
        (n, V) float32.
    """
    p = p_knn(neighbours, temperature, logits.shape[-1])
    weights = weight * neighbours.distances[:, 0].isfinite().float()
    return mix(torch.log_softmax(logits.float(), dim=-1), p.log(), weights)


@contextlib.contextmanager
def plugged(model: PreTrainedModel, index: Index, chosen: MixtureSettings) -> Iterator[None]:
    """Mix neighbours into the model's distribution over the next token, inside the block.

    f is read at the input of the output head, and the logits are replaced after the complete forward pass, so the
    model's changes to its logits affect its own part only. Only the last position of a pass is searched and mixed, in
    one search for all rows: the other positions predict tokens that are already known.

    Raises:
        OwnerError: the model has no output head.
    """
    seen: list[Tensor] = []

    def before_head(_head: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen[:] = [arguments[0][:, -1]]

    @torch.no_grad()
    def after_model(_model: nn.Module, _arguments: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401
        f = seen.pop()
        logits = output[0] if isinstance(output, tuple) else output.logits
        last = mixed(logits[:, -1], index.search(f, chosen.k), chosen.temperature, chosen.weight)
        logits = torch.cat((logits[:, :-1].float(), last[:, None].to(logits.device)), dim=1)
        if isinstance(output, tuple):
            return (logits, *output[1:])
        output.logits = logits
        return output

    if chosen.weight == 0:
        yield
        return
    head = output_embedding(model)
    with hooked(head.register_forward_pre_hook(before_head), model.register_forward_hook(after_model)):
        yield


def log_p_knn(measured: TokenMeasurements, ks: Sequence[int], temperatures: Sequence[float]) -> Tensor:
    """Compute log P_kNN(y) of gold tokens for all T and k, from one search.

    Returns:
        (temperatures, ks, n) float64; -inf where no neighbour has y.
    """
    distances, targets = measured.neighbours.distances.double(), measured.neighbours.targets
    right = targets == measured.targets[:, None]
    columns = torch.tensor(ks).clamp(max=distances.shape[1]) - 1
    log_p = []
    for temperature in temperatures:
        # The nearest neighbour is included for every k, so no denominator is below 1.
        shares = torch.exp((distances[:, :1] - distances) / temperature).nan_to_num_(0.0)
        total, gold = shares.cumsum(1)[:, columns], (shares * right).cumsum(1)[:, columns]
        log_p.append(torch.where(total > 0, gold / total, 0.0).log().T)
    return torch.stack(log_p)


def log_p_mixed(measured: TokenMeasurements, chosen: MixtureSettings) -> Tensor:
    """Compute log P(y) of gold tokens under the mixture, (n,) float32; see `mixed`."""
    p = log_p_knn(measured, [chosen.k], [chosen.temperature])[0, 0]
    weights = chosen.weight * measured.neighbours.distances[:, 0].isfinite().float()
    return mix(measured.log_p_plm[:, None], p[:, None], weights)[:, 0]


def choose(
    measured: TokenMeasurements, ks: Sequence[int], temperature: float | None, weight: float | None
) -> MixtureSettings:
    """Choose the k, T and lambda that maximise the likelihood of dev targets.

    k and T come from a grid; lambda comes from EM for each grid point (the likelihood is concave in lambda).

    Args:
        measured: the dev targets, with at least max(ks) neighbours.
        ks: the values of k to compare.
        temperature: fixed T, or None to compare multiples of the mean distance.
        weight: fixed lambda, or None to choose it.
    """
    distances = measured.neighbours.distances
    mean = float(distances[distances.isfinite()].double().mean())
    # If all distances are 0, T has no effect.
    scale = mean if mean > 0 else 1.0
    temperatures = [share * scale for share in SHARES] if temperature is None else [temperature]
    log_p = log_p_knn(measured, ks, temperatures).flatten(0, 1)
    settings, pairs = log_p.shape
    if weight is None:
        ratios = (log_p - measured.log_p_plm.double()).flatten()
        weights = maximise(ratios, torch.arange(settings).repeat_interleave(pairs), settings)
    else:
        weights = torch.full((settings,), weight, dtype=torch.float64)
    likelihood = mix(measured.log_p_plm.expand(settings, pairs), log_p, weights).double().mean(1)
    best = int(likelihood.argmax())
    return MixtureSettings(ks[best % len(ks)], temperatures[best // len(ks)], float(weights[best]))
