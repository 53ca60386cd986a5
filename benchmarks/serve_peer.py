"""llama.cpp's own HTTP server on a GGUF file, out of the `xllamacpp` wheel, as a peer for `serve.py`.

    python benchmarks/serve_peer.py MODEL.gguf --slots 8 --context 256

Prints one line of JSON with its address once it listens, and serves until SIGTERM. `--context` are the tokens of one
slot. The flags are those under which it is fastest here: continuous batching, no reuse of earlier prompts unless asked
for with --prefix-cache, flash attention where llama.cpp likes it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument("--slots", type=int, default=8, help="texts in progress at most (%(default)s)")
    parser.add_argument("--context", type=int, default=512, help="tokens of each (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--prefix-cache", action="store_true", help="reuse the beginnings of earlier prompts")
    arguments = parser.parse_args()

    import xllamacpp

    started = time.perf_counter()
    settings = xllamacpp.CommonParams()
    settings.model.path = arguments.model
    settings.n_parallel, settings.cont_batching = arguments.slots, True
    settings.n_ctx, settings.kv_unified = arguments.slots * arguments.context, False
    settings.n_batch, settings.n_ubatch = 2048, 512
    settings.n_gpu_layers, settings.fit_params, settings.warmup = 0, False, True
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = arguments.threads
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F16
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_AUTO
    settings.cache_prompt = arguments.prefix_cache
    if not arguments.prefix_cache:  # there are three more places that remember prompts
        settings.cache_ram_mib, settings.cache_idle_slots, settings.slot_prompt_similarity = 0, False, 0.0
    settings.hostnames, settings.port = ["127.0.0.1"], arguments.port
    settings.endpoint_metrics, settings.ui, settings.verbosity = False, False, 0
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    server = xllamacpp.Server(settings)
    facts = {
        "url": server.listening_address,
        "xllamacpp": xllamacpp.__version__,
        "load_s": round(time.perf_counter() - started, 2),
    }
    print(json.dumps(facts), flush=True)
    while not stop.wait(0.5):
        pass
    os._exit(0)  # threads of its HTTP server may outlive it


if __name__ == "__main__":
    main()
