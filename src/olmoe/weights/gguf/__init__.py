"""GGUF files of OLMoE, llama.cpp's format: read, dequantized, written, with their tokenizer.

`reader` checks and maps a file, `block_types` decodes its blocks, `source.GGUFSource` is the file as weights,
configuration and tokenizer; `to_folder` and `to_gguf` convert either way.
"""
