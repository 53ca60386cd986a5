"""Files: what appears whole or not at all, the hub, texts, safetensors."""
