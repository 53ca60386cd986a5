"""Inference without transformers: requests, the KV cache, sampling, and `LLM`, which ties them together."""
