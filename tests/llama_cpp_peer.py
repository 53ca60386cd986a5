"""llama.cpp through whichever of its Python bindings is installed, with the three answers that tests compare."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from olmoe.weights.gguf.block_types import BY_NAME

NAMES = ("xllamacpp", "llama_cpp")
CONTEXT = 256


def available() -> bool:
    return any(importlib.util.find_spec(name) is not None for name in NAMES)


def open_model(path: Path, vocab_size: int, adapter: Path | None = None) -> Xllamacpp | LlamaCppPython:
    if importlib.util.find_spec("xllamacpp") is not None:
        return Xllamacpp(path, vocab_size, adapter)
    return LlamaCppPython(path, adapter)


class Xllamacpp:
    """xllamacpp: llama.cpp's own server inside this process. PyPI has wheels of it."""

    def __init__(self, path: Path, vocab_size: int, adapter: Path | None = None) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = CONTEXT, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup, params.verbosity, params.fit_params = False, 0, False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server, self._vocab_size = xllamacpp.Server(params), vocab_size
        self._plain_id = self.tokenize("a")[0]

    def tokenize(self, text: str) -> list[int]:
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize",
            json.dumps({"content": text, "parse_special": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
            return json.loads(response.read())["tokens"]

    def log_probs(self, ids: Sequence[int]) -> np.ndarray:
        # The server leaves out tokens that end within a character, so it is made to choose one that does not; the
        # probabilities that it reports are those before any bias.
        request = {"n_probs": self._vocab_size, "logit_bias": [[self._plain_id, 1000.0]]}
        entries = self._complete(ids, 1, request)["logprobs"]["content"][0]["top_logprobs"]
        row = np.full(self._vocab_size, np.nan, np.float32)
        row[[entry["id"] for entry in entries]] = [entry["logprob"] for entry in entries]
        return row

    def generate(self, ids: Sequence[int], count: int) -> str:
        return self._complete(ids, count, {})["text"]

    def _complete(self, ids: Sequence[int], count: int, request: dict) -> dict:
        request |= {"prompt": list(ids), "n_predict": count, "temperature": 0, "cache_prompt": False}
        answer = self._server.handle_completions(request)
        return (json.loads(answer) if isinstance(answer, str | bytes) else answer)["choices"][0]


class LlamaCppPython:
    """llama-cpp-python, where somebody has built it."""

    def __init__(self, path: Path, adapter: Path | None = None) -> None:
        import llama_cpp

        self._model = llama_cpp.Llama(
            str(path),
            n_ctx=CONTEXT,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            verbose=False,
            type_k=0,
            type_v=0,
            lora_path=None if adapter is None else str(adapter),
        )

    def tokenize(self, text: str) -> list[int]:
        return self._model.tokenize(text.encode(), add_bos=False, special=True)

    def log_probs(self, ids: Sequence[int]) -> np.ndarray:
        self._model.reset()
        self._model.eval(list(ids))
        logits = self._model.scores[self._model.n_tokens - 1].astype(np.float64)
        return (logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()).astype(np.float32)

    def generate(self, ids: Sequence[int], count: int) -> str:
        chosen: list[int] = []
        for _ in range(count):
            chosen.append(int(self.log_probs([*ids, *chosen]).argmax()))
        return self._model.detokenize(chosen).decode(errors="replace")


# ---- ggml's quantizers, which xllamacpp exports beside the rest ----


def has_ggml() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None and hasattr(_ggml(), "ggml_quantize_chunk")


def _ggml() -> ctypes.CDLL:
    import xllamacpp.xllamacpp as extension

    return ctypes.CDLL(extension.__file__)


def ggml_quantize(name: str, values: np.ndarray) -> np.ndarray:
    """values (R, C) fp32 -> (R, bytes of a row) as llama.cpp's quantizer makes them."""
    kind, rows = BY_NAME[name], np.ascontiguousarray(values, np.float32)
    out = np.empty((len(rows), kind.row_bytes(rows.shape[1])), np.uint8)
    function = _ggml().ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    size = function(kind.code, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None)
    assert size == out.nbytes
    return out


def ggml_dequantize(name: str, data: np.ndarray, columns: int) -> np.ndarray:
    """data (R, bytes of a row) -> (R, columns) fp32."""
    out = np.empty((len(data), columns), np.float32)
    function = getattr(_ggml(), f"dequantize_row_{name.lower().replace('k', 'K')}")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function(np.ascontiguousarray(data).ctypes.data, out.ctypes.data, out.size)
    return out
