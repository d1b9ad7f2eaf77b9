"""Adapted PLMs: what `Method.open` returns. They load torch, which the settings of the methods do not need."""
