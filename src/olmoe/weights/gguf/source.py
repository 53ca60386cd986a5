"""`GGUFSource`: a GGUF file as the weights, configuration and tokenizer of a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from olmoe.errors import CheckpointError, TokenizerError, shown
from olmoe.tokenizer import Tokenizer
from olmoe.weights import generation
from olmoe.weights.gguf import metadata as keys
from olmoe.weights.gguf import tokenizer as vocabulary
from olmoe.weights.gguf.block_types import Bytes, dequantize
from olmoe.weights.gguf.names import EMBEDDING, HEAD, tensor_names, tensor_shapes
from olmoe.weights.gguf.reader import GGUFFile
from olmoe.weights.source import RELEASE_BYTES

_BLOCK_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.")
# Types that torch has too.
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Frequency factors of RoPE that some converters add; OLMoE's are all 1.
_FREQUENCIES = "rope_freqs.weight"


class GGUFSource:
    """Implements `WeightSource` over a GGUF file, memory-mapped; weights are dequantized as they are read."""

    def __init__(self, file: str | Path | GGUFFile) -> None:
        """Open and check the file. Raises `CheckpointError`, `ConfigError` or `TokenizerError`, one sentence each."""
        self.file = file if isinstance(file, GGUFFile) else GGUFFile(file)
        tensors = self.file.tensors
        embedding = tensors.get(EMBEDDING)
        self.config = keys.to_config(
            self.file.metadata, embedding.shape[0] if embedding else 1, tied=HEAD not in tensors
        )
        layers = len({m[1] for name in tensors if (m := _BLOCK_NAME.match(name))})
        if layers != self.config.num_hidden_layers:
            # Compared before names are listed, so that a hostile layer count cannot fill the memory.
            raise CheckpointError(
                f"The metadata say {self.config.num_hidden_layers} layers, but the file holds tensors of {layers}."
            )
        self._tensors = tensor_names(self.config)
        self._read_bytes = 0
        self._check_tensors()

    def _check_tensors(self) -> None:
        """Every tensor of the network must be present in its shape, and no other tensors."""
        expected = tensor_shapes(self.config)
        for name, shape in expected.items():
            tensor = self.file.tensors.get(name)
            if tensor is None:
                raise CheckpointError(f"The GGUF file lacks the tensor {name}, which its metadata call for.")
            if tensor.shape != shape:
                raise CheckpointError(
                    f"The GGUF file's tensor {name} has shape {list(tensor.shape)}, but its metadata make it "
                    f"{list(shape)}."
                )
        for name in self.file.tensors:
            if name not in expected and not (name == _FREQUENCIES and self._is_all_ones(name)):
                raise CheckpointError(f"The GGUF file holds the tensor {shown(name)}, which OLMoE does not have.")

    def _is_all_ones(self, name: str) -> bool:
        tensor = self.file.tensors[name]
        return tensor.num_bytes <= 1 << 16 and bool((dequantize(tensor.kind, self.file.rows(name)) == 1).all())

    @property
    def path(self) -> Path:
        """The GGUF file."""
        return self.file.path

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """One parameter of `model.CausalLM` on the CPU: fp32, fp16 or bf16 as stored, fp32 if it is quantized.

        Stacks of experts are read one `expert` at a time: (2F, D) of `gate_up_proj`, (D, F) of `down_proj`.
        """
        index = () if expert is None else (expert,)
        parts = [self._tensor(name, index) for name in self._tensors[parameter]]
        if len(parts) == 1:
            return parts[0]
        same = parts[0].dtype == parts[1].dtype
        return torch.cat(parts if same else [part.float() for part in parts], dim=-2)

    def _tensor(self, name: str, index: tuple[int, ...]) -> Tensor:
        kind, data = self.file.tensors[name].kind, self.file.rows(name, *index)
        if kind.name in _PLAIN:
            value = torch.from_numpy(np.array(data)).view(_PLAIN[kind.name])  # copied: the file is read-only
        else:
            value = torch.from_numpy(dequantize(kind, data))
        self._read_bytes += data.nbytes
        if self._read_bytes >= RELEASE_BYTES:
            self.file.release()
            self._read_bytes = 0
        return value

    def stored_as(self, parameter: str, expert: int | None = None) -> tuple[str, ...]:
        """ggml's names of the block types that hold a parameter, one for each of its tensors."""
        return tuple(self.file.tensors[name].kind.name for name in self._tensors[parameter])

    def blocks(self, parameter: str, expert: int | None = None) -> Bytes:
        """The parameter's bytes as stored, (..., bytes of a row), for lossless conversion.

        Raises `CheckpointError` if its tensors are stored in different types.
        """
        if len(set(self.stored_as(parameter))) > 1:
            raise CheckpointError(
                f"The parts of {parameter} are stored in different types: {self.stored_as(parameter)}."
            )
        index = () if expert is None else (expert,)
        parts = [self.file.rows(name, *index) for name in self._tensors[parameter]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-2)

    def files(self) -> dict[str, str]:
        """The text files of a checkpoint folder that the metadata hold: the tokenizer's with its chat template.

        Raises `TokenizerError` if the tokenizer is broken or not of OLMoE's kind.
        """
        files = {generation.FILE_NAME: generation.generation_text(self.config)}
        if f"{vocabulary.PREFIX}model" in self.file.metadata:
            files |= self._tokenizer_files()
        return files

    def _tokenizer_files(self) -> dict[str, str]:
        from tokenizers import Tokenizer as Backend

        config, metadata = self.config, self.file.metadata
        text = vocabulary.to_tokenizer_json(metadata, config.vocab_size)
        template = vocabulary.chat_template(metadata)
        try:
            backend = Backend.from_str(text)
        except Exception as error:  # the library raises bare Exception for whatever it dislikes
            raise TokenizerError(f"The GGUF file's tokenizer cannot be built ({error}).") from None
        tokenizer = Tokenizer(backend, eos_ids=config.eos_token_ids, pad_id=config.pad_token_id, chat_template=template)
        return {
            "tokenizer.json": text,
            "tokenizer_config.json": tokenizer.transformers_config(config.max_position_embeddings),
        }
