"""Engines that give the vectors their LM head reads: vLLM's pooling server and SGLang's server."""
