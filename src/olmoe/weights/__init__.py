"""Weights on disk: checkpoints in every format, read, checked, quantized, converted and written."""
