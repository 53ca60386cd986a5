"""Files: atomic writes, the hub, texts, safetensors."""
