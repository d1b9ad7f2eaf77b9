"""Plug-in External Memory Adaptation (PEMA; Kim, Kim and Bak, NAACL 2024) for frozen language models."""

__version__ = "0.1.0"
