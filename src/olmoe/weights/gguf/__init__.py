"""GGUF files of OLMoE, llama.cpp's format: read, dequantized, written, with their tokenizer.

`reader` checks and maps a file, `block_types` decodes its blocks, `source.GGUFSource` is the file as weights,
configuration and tokenizer; `to_gguf` writes them, `olmoe.weights.to_folder` the way back.
"""
