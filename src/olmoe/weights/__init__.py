"""Weights at rest: checkpoints in every format, read, checked, quantized, converted and written."""
