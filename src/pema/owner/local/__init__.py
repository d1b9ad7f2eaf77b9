"""The local engine: a causal LM of transformers in this process, behind the contract."""

from __future__ import annotations

from pema.owner.local.plm import LocalPLM

__all__ = ["LocalPLM"]
