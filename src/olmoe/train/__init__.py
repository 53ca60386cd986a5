"""Training: text to tokens to a checkpoint. `loop.train` is the whole of it, readable top to bottom."""
