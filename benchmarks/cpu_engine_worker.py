"""One engine of `cpu_engines.py` in a process of its own: it reads requests, one JSON a line, and answers each.

    python benchmarks/cpu_engine_worker.py ours|transformers|llama_cpp|llama_whole OPTIONS_AS_JSON

Between two requests it waits on a pipe. It runs under an interpreter that has its engine, and needs nothing else:
olmoe, transformers, llama_cpp with numpy, or for `llama_whole` xllamacpp or llama_cpp. All engines get random ids.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from typing import Any

WARM_UP = 16
VOCABULARY = 50000  # ids below this exist in every model here


def peak_bytes() -> int:
    """The largest resident size of this process so far: its own memory and the file pages that it has mapped."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def shared_state(descriptor: int, config: Any) -> dict[str, Any]:
    """bf16 weights of all shapes of `config` by name, as views of a file that processes share. It must be that long."""
    import math
    import mmap

    import torch

    from olmoe.weights.names import parameter_shapes

    shapes = parameter_shapes(config)
    total = 2 * sum(math.prod(shape) for shape in shapes.values())
    memory = torch.frombuffer(mmap.mmap(descriptor, total), dtype=torch.bfloat16)
    state, start = {}, 0
    for name, shape in shapes.items():
        state[name] = memory[start : start + math.prod(shape)].view(shape)
        start += math.prod(shape)
    return state


class Ours:
    """The engine on a packed folder, or on shared bf16 weights."""

    def __init__(self, options: dict[str, Any]) -> None:
        from olmoe.bench import random_models, speed
        from olmoe.config import ModelConfig
        from olmoe.ops import cpu
        from olmoe.runtime import keep_freed_memory, set_threads
        from olmoe.weights import checkpoint

        set_threads(options["threads"])
        keep_freed_memory()
        if options["isa"] is not None:
            cpu.set_isa(options["isa"])
        self._checkpoint, self._random_models, self._speed, self._cpu = checkpoint, random_models, speed, cpu
        self._options, self._config_class = options, ModelConfig
        self._cache: Any = None
        self._key: tuple[int, int] | None = None

    def load(self) -> None:
        """Map or assign the weights."""
        options = self._options
        if "folder" in options:
            from pathlib import Path

            model = self._checkpoint.load(Path(options["folder"]), device="cpu")
        else:
            config = self._config_class.from_file(options["config"]) if options["config"] else self._config_class()
            model = self._random_models.skeleton(config, "bf16")
            model.load_state_dict(shared_state(options["descriptor"], config), assign=True)
            model.eval().requires_grad_(False)
        self.runner = self._speed.Measured(model)
        self._whole: Any = None
        self._tokenizer = self._read_tokenizer(model.config)

    def _read_tokenizer(self, config: Any) -> Any:
        """The folder's own; a stand-in for random weights."""
        from pathlib import Path

        from olmoe.bench.whole_path import stand_in_tokenizer
        from olmoe.tokenizer import Tokenizer

        folder = Path(self._options.get("folder", ""))
        if "folder" in self._options and (folder / "tokenizer.json").is_file():
            return Tokenizer.from_folder(folder, eos_ids=config.eos_token_ids, pad_id=config.pad_token_id)
        return stand_in_tokenizer(config.vocab_size, config.eos_token_ids)

    def facts(self) -> dict[str, Any]:
        """What else the result says about this engine."""
        return {"isa": self._cpu.isa() if self._cpu.available() else None}

    def prefill(self, length: int, capacity: int) -> float:
        """Seconds for a prompt. No sequence of this part of the benchmark is longer than `capacity`."""
        seconds: float = self.runner.prefill(self.runner.sequences(1, length), length)
        return seconds

    def decode(self, context: int, batch: int, steps: int, capacity: int) -> list[float]:
        """Seconds of each step after `context` tokens in each of `batch` sequences; `capacity` as for `prefill`."""
        if self._key != (context, batch):
            self._cache = None
            cache = self.runner.sequences(batch, max(context + steps, capacity))
            self.runner.prefill(cache, context)
            self._cache, self._key = cache, (context, batch)
        self._cache.lengths = [context] * batch
        return [self.runner.decode(self._cache) for _ in range(steps)]

    def whole(self, context: int, steps: int, sampling: dict[str, Any], capacity: int) -> dict[str, Any]:
        """Tokens a second through the whole path, prompts left out: by the reader's clock, and by the engine's own.

        Ours has none of its own: what it reports is measured in the same place.
        """
        from olmoe.bench.whole_path import WholePath
        from olmoe.engine.llm import LLM
        from olmoe.engine.sampling_params import SamplingParams

        if self._whole is None or self._key != (context, -1):
            llm = LLM.from_parts(self.runner.model, self._tokenizer)
            self._whole, self._key = WholePath(llm, context, SamplingParams(**sampling)), (context, -1)
        return {"reader": self._whole.decode(steps), "own": None}


class Transformers:
    """transformers' own classes on shared bf16 weights, with its defaults."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        import transformers

        from olmoe.config import ModelConfig
        from olmoe.runtime import keep_freed_memory, set_threads

        set_threads(options["threads"])
        keep_freed_memory()
        torch.set_grad_enabled(False)
        self._torch, self._transformers = torch, transformers
        self._config = ModelConfig.from_file(options["config"]) if options["config"] else ModelConfig()
        self._descriptor = options["descriptor"]
        self._cache: Any = None
        self._key: tuple[int, int] | None = None

    def load(self) -> None:
        """Assign the weights. This is no load from disk, so its time says nothing."""
        config = self._transformers.OlmoeConfig(**self._config.to_dict(), attn_implementation="sdpa")
        with self._torch.device("meta"):
            model = self._transformers.OlmoeForCausalLM(config).bfloat16()
        model.load_state_dict(shared_state(self._descriptor, self._config), assign=True)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are on the meta device otherwise
        self.model = model.eval()

    def facts(self) -> dict[str, Any]:
        """See `Ours`."""
        return {"experts_implementation": self.model.config._experts_implementation}

    def _ids(self, batch: int, length: int) -> Any:
        return self._torch.randint(0, min(VOCABULARY, self._config.vocab_size), (batch, length))

    def prefill(self, length: int, capacity: int) -> float:
        """See `Ours`."""
        ids = self._ids(1, length)
        started = time.perf_counter()
        self.model(ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - started

    def decode(self, context: int, batch: int, steps: int, capacity: int) -> list[float]:
        """See `Ours`."""
        if self._key != (context, batch):
            ids = self._ids(batch, context)
            self._cache = self.model(ids, use_cache=True, logits_to_keep=1).past_key_values
            self._key = (context, batch)
        times = []
        for _ in range(steps):
            ids = self._ids(batch, 1)
            started = time.perf_counter()
            logits = self.model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
            logits[:, -1].argmax(-1).tolist()
            times.append(time.perf_counter() - started)
        self._cache.crop(-steps)
        return times


class LlamaCpp:
    """llama.cpp on a GGUF file through the functions of its C interface (llama.h), with its defaults."""

    def __init__(self, options: dict[str, Any]) -> None:
        import llama_cpp
        import numpy as np

        self._lib, self._path, self._threads = llama_cpp, options["gguf"], options["threads"]
        self._random = np.random.default_rng(0)

        @llama_cpp.llama_log_callback
        def quiet(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
            pass

        self._quiet = quiet  # the library keeps a pointer to it
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._context: Any = None
        self._shape: tuple[int, int] | None = None  # of the context: tokens a sequence, sequences
        self._key: tuple[int, int] | None = None

    def load(self) -> None:
        """Load the file, and make the context that a short prompt needs."""
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(self._path.encode(), params)
        assert self._model, f"llama.cpp does not load {self._path}"
        self._resize(512, 1)

    def facts(self) -> dict[str, Any]:
        """See `Ours`."""
        return {"llama_cpp_python": self._lib.__version__}

    def _resize(self, capacity: int, batch: int) -> None:
        """Make sure that the context has `batch` sequences of `capacity` tokens."""
        capacity = -(-capacity // 256) * 256  # as llama.cpp rounds
        if self._shape == (capacity, batch):
            return
        if self._context is not None:
            self._lib.llama_free(self._context)
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = capacity * batch, batch
        params.n_threads = params.n_threads_batch = self._threads
        self._context = self._lib.llama_init_from_model(self._model, params)
        assert self._context, "llama.cpp has no memory for a context"
        self._memory = self._lib.llama_get_memory(self._context)
        self._shape, self._key = (capacity, batch), None

    def _run(self, counts: list[int], start: int) -> float:
        """Seconds for `counts[b]` new tokens of sequence b from position `start` on, with the logits of each last."""
        total = sum(counts)
        batch = self._lib.llama_batch_init(total, 0, 1)
        ids, i = self._random.integers(0, VOCABULARY, total), 0
        batch.n_tokens = total
        for sequence, count in enumerate(counts):
            for place in range(count):
                batch.token[i], batch.pos[i] = int(ids[i]), start + place
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = place == count - 1
                i += 1
        started = time.perf_counter()
        code = self._lib.llama_decode(self._context, batch)
        self._lib.llama_synchronize(self._context)
        seconds = time.perf_counter() - started
        self._lib.llama_batch_free(batch)
        assert code == 0, f"llama_decode returned {code}"
        return seconds

    def prefill(self, length: int, capacity: int) -> float:
        """See `Ours`."""
        self._resize(max(length, capacity), 1)
        self._lib.llama_memory_clear(self._memory, True)
        self._key = None
        return self._run([length], 0)

    def decode(self, context: int, batch: int, steps: int, capacity: int) -> list[float]:
        """See `Ours`."""
        self._resize(max(context + steps, capacity), batch)
        if self._key != (context, batch):
            self._lib.llama_memory_clear(self._memory, True)
            self._run([context] * batch, 0)
            self._key = (context, batch)
        for sequence in range(batch):
            self._lib.llama_memory_seq_rm(self._memory, sequence, context, -1)
        return [self._run([1] * batch, context + step) for step in range(steps)]


class LlamaWhole:
    """llama.cpp through what users of its Python bindings call: completions that stream, by whichever is installed."""

    def __init__(self, options: dict[str, Any]) -> None:
        import importlib.util
        import random

        self._options, self._random = options, random.Random(0)
        self._binding = "xllamacpp" if importlib.util.find_spec("xllamacpp") is not None else "llama_cpp"
        self._module = importlib.import_module(self._binding)

    def load(self) -> None:
        """Load the file, with room for the longest text."""
        capacity, threads = -(-self._options["capacity"] // 256) * 256, self._options["threads"]
        if self._binding == "llama_cpp":
            self._engine = self._module.Llama(
                self._options["gguf"], n_ctx=capacity, n_threads=threads, n_threads_batch=threads, verbose=False
            )
            return
        params = self._module.CommonParams()
        params.model.path = self._options["gguf"]
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.fit_params = capacity, 1, 0, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup, params.verbosity = True, 0
        # Every prompt is computed, as ours are.
        params.cache_prompt, params.cache_ram_mib, params.cache_idle_slots = False, 0, False
        self._engine = self._module.Server(params)

    def facts(self) -> dict[str, Any]:
        """See `Ours`."""
        return {self._binding: self._module.__version__}

    def prefill(self, length: int, capacity: int) -> float:
        """Seconds to a first token after `length` others; `capacity` as for `Ours`."""
        started = time.perf_counter()
        self._complete(length, 1, {})
        return time.perf_counter() - started

    def whole(self, context: int, steps: int, sampling: dict[str, Any], capacity: int) -> dict[str, Any]:
        """See `Ours`; its own timings are those of its server, where the binding is one."""
        times, final = self._complete(context, steps + 1, sampling)
        timings = final.get("timings")
        if timings is not None:
            assert timings["predicted_n"] == steps + 1, timings
        own = None if timings is None else timings["predicted_per_second"]
        return {"reader": steps / (times[-1] - times[0]), "own": own}

    def _complete(self, context: int, count: int, sampling: dict[str, Any]) -> tuple[list[float], dict[str, Any]]:
        """When the pieces of a text of `count` tokens came, and the last of them."""
        prompt = [self._random.randrange(100, self._options["vocabulary"]) for _ in range(context)]
        times: list[float] = []
        final: dict[str, Any] = {}

        def take(piece: Any) -> None:
            times.append(time.perf_counter())
            final.update(json.loads(piece) if isinstance(piece, str | bytes) else piece)

        if self._binding == "xllamacpp":
            request = {"prompt": prompt, "n_predict": count, "ignore_eos": True, "cache_prompt": False, "min_p": 0.0}
            self._engine.handle_completions(request | sampling | {"stream": True}, take)
        else:
            end = {self._engine.token_eos(): -1000.0}
            for piece in self._engine.create_completion(
                prompt, max_tokens=count, stream=True, logit_bias=end, min_p=0.0, **sampling
            ):
                take(piece)
        assert final["choices"][0]["finish_reason"] == "length", final
        return times, final


def write_packed(format: str, folder: str, config: str | None) -> None:
    """A packed checkpoint of random weights."""
    from pathlib import Path

    import torch

    from olmoe.bench.random_models import random_model
    from olmoe.config import ModelConfig
    from olmoe.io.atomic import atomic_folder
    from olmoe.weights import packed_file
    from olmoe.weights.recipes import RECIPES
    from olmoe.weights.table import TensorTable

    model = random_model(ModelConfig.from_file(config) if config else ModelConfig(), format)
    layout = RECIPES[format].layout()
    tensors = packed_file.file_tensors(TensorTable(model.config, layout), torch.bfloat16)
    with atomic_folder(Path(folder)) as temporary:
        with packed_file.writer(temporary / packed_file.FILE_NAME, tensors) as writer:
            for name, parameter in model.named_parameters():
                writer.write(name, parameter.data.to(tensors[name][1]))
        text = packed_file.config_text(model.config, layout, torch.bfloat16)
        (temporary / "config.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Start the engine, say how long that took, and serve."""
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    if kind == "write":
        write_packed(**options)
        return
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply

    def reply(value: dict[str, Any]) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    started = time.perf_counter()
    engine: Any = {"ours": Ours, "transformers": Transformers, "llama_cpp": LlamaCpp, "llama_whole": LlamaWhole}[kind](
        options
    )
    imported = time.perf_counter()
    engine.load()
    loaded = time.perf_counter()
    engine.prefill(WARM_UP, 0)
    first = time.perf_counter()
    times = {"import_s": imported - started, "load_s": loaded - imported, "first_token_s": first - imported}
    reply(times | {"peak_bytes": peak_bytes(), "facts": engine.facts()})
    for line in sys.stdin:
        request = json.loads(line)
        what = request.pop("do")
        if what == "peak":
            reply({"peak_bytes": peak_bytes()})
        else:
            reply({"result": getattr(engine, what)(**request)})


if __name__ == "__main__":
    main()
