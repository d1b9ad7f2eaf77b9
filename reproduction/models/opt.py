"""OPT (Zhang et al. 2022) of a shape, made from a config with random weights, which change neither memory nor time."""

from __future__ import annotations

import torch
from transformers import OPTConfig, OPTForCausalLM

from reproduction.paper_shape.options import Shape


def opt(shape: Shape, device: torch.device, *, layers: int, dtype: torch.dtype) -> OPTForCausalLM:
    """Build it on a device, without a copy in another dtype.

    Args:
        shape: its shape.
        device: the device.
        layers: number of its layers, which may be fewer than those of the shape.
        dtype: type of its weights.
    """
    config = OPTConfig(
        vocab_size=shape.V,
        hidden_size=shape.d,
        word_embed_proj_dim=shape.d,
        ffn_dim=shape.ffn,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        dropout=0.0,
    )
    with torch.device(device):
        model: OPTForCausalLM = OPTForCausalLM._from_config(config, dtype=dtype)
    return model
