"""The head bundle, derived from the model itself by numerical experiment; no table of architectures.

The input of the output embedding is recorded in a forward pass, and replaced by scaled copies so that everything after
the product (a scale, a soft cap) is observed over a wide range. The result is verified on fresh input; a model that it
does not explain is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pema.errors import OwnerError
from pema.owner.bundle import NormSettings
from pema.owner.causal_lm import output_embedding
from pema.owner.contract import Tap
from pema.owner.head import Head, Norm
from pema.owner.probing import evaluating, hooked, random_tokens, run_head
from pema.owner.weights import tensor_of
from pema.schema import among

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Maximum difference from the model's logits, relative to their largest magnitude (at least 1)."""

_RANGES = (0.5, 5.0, 50.0, 500.0, 5e3, 5e4)
_SUM = 4e-6
"""Rounding error of a float32 sum over d, relative to the largest one."""
_SMALL = (1.0, 1e-2, 1e-3, 1e2)
_KINDS: tuple[Literal["rms", "layer"], ...] = ("rms", "layer")


def derive_head(model: PreTrainedModel, tap: Tap) -> Head:
    """Derive the head bundle of a transformers causal LM by experiment, and verify it on fresh input.

    Args:
        model: an unmodified transformers causal LM.
        tap: where representations are read.

    Raises:
        OwnerError: the model is not supported; the message names the architecture and the reason.
        ConfigError: an unknown tap.
    """
    among("tap", [tap], get_args(Tap))
    name = type(model).__name__
    embedding = output_embedding(model)
    weight, bias = tensor_of(embedding, "weight"), tensor_of(embedding, "bias")
    # A quantised weight may be a tensor subclass that looks like a plain tensor.
    plain = type(weight) in (Tensor, nn.Parameter)
    if weight is None or not plain or weight.dim() != 2 or weight.dtype not in TOLERANCE:
        kind = "none" if weight is None else f"a {type(weight).__name__} of {str(weight.dtype).removeprefix('torch.')}"
        raise OwnerError(
            f"{name} is not supported: its output embedding is {type(embedding).__name__} and its weight {kind}, not "
            "a linear projection in float32, float16 or bfloat16. Load it with its LM head unquantised."
        )
    with evaluating(model):
        _require_causal(model, embedding)
        exact = weight.detach().to("cpu", torch.float32)
        scale, soft_cap = _post_processing(model, embedding, _exact(Head(weight, bias), exact), weight.dtype)
        norm, projection, tapped = None, None, embedding
        if tap == "norm_input":
            final = find_final_norm(model)
            norm = recognise_norm(final.module, final.sample, f"the final norm {final.name} of {name}")
            projection, tapped = final.projection, final.module
        head = Head(weight, bias, scale=scale, soft_cap=soft_cap, norm=norm, projection=projection)
        _verify(model, _exact(head, exact), tapped, tap, weight.dtype)
    return head


def _exact(head: Head, weight: Tensor) -> Head:
    """Return a copy of a head in float32 on the CPU, given its W_hd so; unlike a cast it needs no fingerprint."""

    def exact(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to("cpu", torch.float32)

    norm = None if head.norm is None else Norm(head.norm.settings, exact(head.norm.weight), exact(head.norm.bias))
    return Head(
        weight,
        exact(head.bias),
        scale=head.scale,
        soft_cap=head.soft_cap,
        norm=norm,
        projection=exact(head.projection),
    )


@dataclass(frozen=True)
class FinalNorm:
    """The norm in front of the head.

    Attributes:
        name: its name in the model.
        module: the module itself.
        projection: (d, d_tap) between it and the head's input, or None.
        sample: (n, d_tap), observed inputs.
    """

    name: str
    module: nn.Module
    projection: Tensor | None
    sample: Tensor


def _require_causal(model: PreTrainedModel, embedding: nn.Module) -> None:
    """Require that a change of the last token does not change the head's input at earlier positions.

    Raises:
        OwnerError: it changes.
    """
    tokens = random_tokens(model, seed=5)
    changed = tokens.clone()
    changed[:, -1] = tokens[:, -2]
    changed[:, -1] += torch.where(changed[:, -1] == tokens[:, -1], 1 - 2 * (changed[:, -1] > 0).long(), 0)
    seen: list[Tensor] = []
    with hooked(embedding.register_forward_pre_hook(lambda _m, arguments: seen.append(arguments[0].float()))):
        model(input_ids=torch.cat([tokens, changed]), use_cache=False)
    # A head that runs several times, or on another shape, is refused by what follows.
    if len(seen) != 1 or seen[0].shape[:-1] != (2 * len(tokens), tokens.shape[1]):
        return
    before, after = seen[0][:, :-1].chunk(2)
    if _relative(after, before) > 0.05:
        raise OwnerError(
            f"{type(model).__name__} as configured is not a causal language model: a token changes earlier "
            "representations."
        )


def _post_processing(
    model: PreTrainedModel, embedding: nn.Module, plain: Head, dtype: torch.dtype
) -> tuple[float, float | None]:
    """Fit the model's function of raw = W_hd f + bias, on inputs scaled so that raw spans several magnitudes.

    All magnitudes are rows of one forward pass, which costs little more than a pass of one of them.

    Args:
        model: the model.
        embedding: its output embedding.
        plain: W_hd and bias alone, in float32 on the CPU.
        dtype: type that the model multiplies W_hd in.

    Returns:
        Scale and soft cap.
    """
    rows = random_tokens(model, seed=1)
    tokens = rows.repeat(1 + len(_RANGES), 1)

    def spread(f: Tensor) -> Tensor:
        if f.shape[:-1] != tokens.shape:
            return f  # refused after the pass
        # The scale factors are computed without the bias, which does not grow with the input.
        natural = (f[: len(rows)].cpu().float() @ plain.weight.T).abs().max().item()
        factors = torch.tensor([1.0] + [target / max(natural, 1e-12) for target in _RANGES])
        return (f.float() * factors.repeat_interleave(len(rows))[:, None, None].to(f.device)).to(f.dtype)

    f, y = run_head(model, embedding, tokens, spread)
    if y.shape[-1] != plain.vocabulary_size:
        raise OwnerError(
            f"{type(model).__name__} is not supported: W_hd has {plain.vocabulary_size} rows, the model's logits have "
            f"{y.shape[-1]} columns."
        )
    both = list(zip(*(part.chunk(1 + len(_RANGES)) for part in (plain(f.float()), y)), strict=True))
    kept = both[:1] + [(raw, y) for raw, y in both[1:] if torch.isfinite(raw).all() and torch.isfinite(y).all()]
    raws, ys = [raw for raw, _ in kept], [y for _, y in kept]
    fitted = _fit(raws, ys, TOLERANCE.get(dtype, 4e-2), _hints(model.config))
    if fitted is None:
        difference = max(_relative(raw, y) for raw, y in zip(raws, ys, strict=True))
        raise OwnerError(
            f"{type(model).__name__} is not supported: its logits are not the output embedding's product, scaled or "
            f"soft-capped (they differ from the plain product by up to {difference:.2e} of their magnitude). "
            "PEMA requires a linear head."
        )
    return fitted


def _hints(config: PreTrainedConfig) -> list[float]:
    """Return the numbers of the configuration and their inverses, as candidates for exact values of fitted ones."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    numbers = [v for v in vars(config).values() if isinstance(v, int | float) and not isinstance(v, bool) and v > 0]
    return [float(n) for n in numbers] + [1.0 / n for n in numbers]


def _snap(value: float, hints: list[float], tolerance: float) -> float:
    """Return the hint that equals `value` within rounding, else `value`."""
    close = [h for h in [1.0, *hints] if abs(h - value) <= tolerance * value]
    return min(close, key=lambda h: abs(h - value)) if close else value


def _fit(
    raws: list[Tensor], ys: list[Tensor], tolerance: float, hints: list[float]
) -> tuple[float, float | None] | None:
    """Fit (scale, soft cap) with y = scale raw, or y = cap tanh(scale raw / cap); None if neither explains the data."""

    def explains(scale: float, cap: float | None) -> bool:
        for raw, y in zip(raws, ys, strict=True):
            z = raw * scale
            # A sum over d in another order, as on another device, differs by this much everywhere; after a cap the
            # difference is visible where the sum is small.
            rounding = _SUM * z.abs().max()
            if cap is not None:
                z = torch.tanh(z / cap) * cap
                rounding = rounding * (1 - (z / cap).square())
            if ((z - y).abs() > tolerance * y.abs().max().clamp_min(1.0) + rounding).any():
                return False
        return True

    pairs = [(raw.double(), y.double()) for raw, y in zip(raws, ys, strict=True)]
    products, squares = sum((x * y).sum().item() for x, y in pairs), sum(x.square().sum().item() for x, _ in pairs)
    linear = products / max(squares, 1e-30)
    for scale in (_snap(linear, hints, tolerance / 8), linear):
        if scale > 0 and explains(scale, None):
            return scale, None
    x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    bound = y.abs().max().item()
    for cap in (_snap(bound, hints, tolerance / 8), bound):
        middle = (y.abs() > 0.02 * cap) & (y.abs() < 0.7 * cap)
        if cap <= 0 or not middle.any():
            continue
        z = torch.atanh(y[middle] / cap) * cap
        slope = ((x[middle] * z).sum() / x[middle].square().sum()).item()
        for scale in (_snap(slope, hints, tolerance / 8), slope):
            if scale > 0 and explains(scale, cap):
                return scale, cap
    return None


def _relative(actual: Tensor, expected: Tensor) -> float:
    """Return the maximum difference, relative to the largest magnitude of `expected` (at least 1)."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1.0)).item()


def _verify(model: PreTrainedModel, head: Head, tapped: nn.Module, tap: Tap, dtype: torch.dtype) -> None:
    """Compare head(f(c)) with the model's logits on fresh tokens.

    Args:
        model: the model.
        head: the derived head, in float32 on the CPU.
        tapped: the module whose input is f(c).
        tap: its name, for the message.
        dtype: type that the model multiplies W_hd in.

    Raises:
        OwnerError: they differ.
    """
    name = type(model).__name__
    seen: list[Tensor] = []
    with hooked(tapped.register_forward_pre_hook(lambda _m, arguments: seen.append(arguments[0].flatten(0, -2)))):
        logits = model(input_ids=random_tokens(model, seed=2, rows=3, length=9), use_cache=False).logits
    expected = logits.flatten(0, -2).float().cpu()
    difference = _relative(head(seen[0].cpu().float()), expected)
    tolerance = TOLERANCE.get(dtype, 4e-2)
    if not difference <= tolerance:
        raise OwnerError(
            f"{name} is not supported: with tap {tap!r} the derived head differs from the model's logits by "
            f"{difference:.2e} of their magnitude (allowed for rounding: {tolerance:.0e})."
        )


def find_final_norm(model: PreTrainedModel) -> FinalNorm:
    """Find the module whose output is the head's input, directly or through one linear projection without bias.

    Raises:
        OwnerError: there is none outside the repeated layers.
    """
    embedding = output_embedding(model)
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    seen: list[Tensor] = []

    def recorder(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: object) -> None:
            if arguments and isinstance(arguments[0], Tensor) and isinstance(output, Tensor):
                calls.append((name, module, arguments[0].detach().clone(), output.detach().clone()))

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if not any(True for _ in m.children()) and m is not embedding]
    handles = [module.register_forward_hook(recorder(name)) for name, module in leaves]
    handles.append(
        embedding.register_forward_pre_hook(lambda _m, arguments: seen.append(arguments[0].detach().clone()))
    )
    with evaluating(model), hooked(*handles):
        model(input_ids=random_tokens(model, seed=3), use_cache=False)

    def writer(value: Tensor) -> tuple[str, nn.Module, Tensor, Tensor] | None:
        for call in reversed(calls):
            if _same(call[3], value) and not _same(call[2], value):
                return call
        return None

    projection = None
    last = writer(seen[0])
    if last is not None and isinstance(last[1], nn.Linear) and tensor_of(last[1], "bias") is None:
        projection = tensor_of(last[1], "weight")
        last = writer(last[2])
    repeated = {id(m) for layers in model.modules() if isinstance(layers, nn.ModuleList) for m in layers.modules()}
    if last is None or id(last[1]) in repeated or isinstance(last[1], (nn.Linear, nn.Embedding)):
        raise OwnerError(
            f"{type(model).__name__} as configured has no final norm in front of its head, so there is no tap "
            "'norm_input': use tap 'head_input'."
        )
    return FinalNorm(last[0], last[1], projection, last[2].flatten(0, -2))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and torch.equal(a.to(b.dtype), b)


def recognise_norm(module: nn.Module, sample: Tensor, what: str) -> Norm:
    """Find a layer norm or RMS norm equivalent to `module`, by trial on inputs of many magnitudes.

    Args:
        module: the norm.
        sample: (n, d), observed inputs.
        what: name of the norm, for the message.

    Raises:
        OwnerError: no candidate is equivalent to `module`.
    """
    dtype = sample.dtype
    weight, bias = tensor_of(module, "weight"), tensor_of(module, "bias")
    names = {n for n, _ in module.named_parameters()}
    if not names <= {"weight", "bias"}:
        raise OwnerError(f"{what} is not supported: it has parameters {sorted(names)}. Use tap 'head_input'.")
    factors = [f for f in _SMALL if dtype != torch.float16 or f <= 1]
    # Random inputs in addition to the observed ones: if those have mean zero, its subtraction would be invisible.
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(4)) + 0.5
    rows = torch.cat([sample.cpu().float(), noise]).to(sample.device, dtype)
    inputs = [rows * factor for factor in factors]
    outputs = [module(x).float().cpu() for x in inputs]
    tolerance = TOLERANCE.get(dtype, 4e-2) / (10 if dtype == torch.float32 else 2)
    hints = [v for k, v in vars(module).items() if "eps" in k and isinstance(v, float)]
    usual = [eps for eps in (1e-5, 1e-6, 1e-8, 1e-12, 0.0) if eps not in hints]
    best = float("inf")
    for candidates in (hints, usual):
        errors: dict[NormSettings, float] = {}
        for kind, offset, eps in itertools.product(_KINDS, (0.0, 1.0) if weight is not None else (0.0,), candidates):
            settings = NormSettings(kind, eps, offset)
            norm = Norm(settings, weight, bias).to("cpu")
            errors[settings] = max(_relative(norm(x.cpu().float()), y) for x, y in zip(inputs, outputs, strict=True))
        nearest = min(errors, key=errors.__getitem__, default=None)
        if nearest is not None and errors[nearest] <= tolerance:
            return Norm(nearest, weight, bias)
        best = min(best, *errors.values(), float("inf"))
    raise OwnerError(
        f"{what} ({type(module).__name__}) is not supported: the nearest layer norm or RMS norm differs from it by "
        f"{best:.2e} of its magnitude. Use tap 'head_input'."
    )
