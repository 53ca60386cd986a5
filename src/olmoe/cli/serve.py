"""Serve a model over HTTP: OpenAI's and Anthropic's protocols, metrics, and a chat page that shows the experts.

Only this machine can reach the server unless --host says otherwise. Ctrl-C or SIGTERM lets running requests finish; a
second one ends them.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmoe.cli.generate import add_model_arguments, load_model

if TYPE_CHECKING:
    import socket

    import torch

    from olmoe.serve.state import ServerState, ServeSettings

_EXTRA = ("starlette", "uvicorn", "httptools", "pydantic", "prometheus_client", "llguidance")
_MIB = 2**20


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe serve`."""
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (%(default)s)")
    network.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (%(default)s)")
    network.add_argument("--ssl-certfile", type=Path, metavar="FILE", help="serve TLS with this PEM certificate")
    network.add_argument("--ssl-keyfile", type=Path, metavar="FILE", help="its key, if the certificate file has none")
    network.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="allow calls from pages of this origin; * for all",
    )
    network.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="answer only requests for this host name; * for any (default: localhost, if the server listens only there "
        "and has no keys)",
    )
    access = parser.add_argument_group("access")
    access.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="require this key; may be repeated (OLMOE_API_KEY)",
    )
    access.add_argument("--api-key-file", type=Path, metavar="FILE", help="require one of these keys, one per line")
    access.add_argument(
        "--share-prefix-cache", action="store_true", help="one prefix cache for all keys, instead of one for each"
    )
    access.add_argument("--access-log", action="store_true", help="log every request to stderr")
    add_engine_arguments(parser.add_argument_group("engine"))
    _add_limits(parser.add_argument_group("limits"))
    add_model_arguments(parser)


def add_engine_arguments(group: Any) -> None:
    """Declare the options for the engine's memory and limits."""
    group.add_argument(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="name in the API; further ones are aliases",
    )
    group.add_argument(
        "--cache-mib", type=int, default=2048, metavar="N", help="memory for keys and values, fixed (%(default)s)"
    )
    group.add_argument("--max-rows", type=int, default=64, metavar="N", help="requests that run at once (%(default)s)")
    group.add_argument(
        "--token-budget",
        type=int,
        metavar="N",
        help="at most N tokens in a step (default: what suits the kernels best)",
    )
    group.add_argument("--context-length", type=int, metavar="N", help="longest text, if shorter than the model's own")
    group.add_argument("--no-prefix-cache", action="store_true", help="compute every prompt from its start")
    group.add_argument(
        "--router-policy",
        metavar="FILE",
        help="JSON that changes the routers' choices, for requests without a policy of their own",
    )


def _add_limits(group: Any) -> None:
    group.add_argument(
        "--max-queued-requests",
        type=int,
        default=512,
        metavar="N",
        help="refuse with 503 when more are waiting (%(default)s)",
    )
    group.add_argument(
        "--max-queued-tokens", type=int, default=2**20, metavar="N", help="the same for their tokens (%(default)s)"
    )
    group.add_argument("--max-body-mib", type=int, default=32, metavar="N", help="the largest request (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Bind, load, serve until stopped."""
    check_extra("olmoe serve")
    from olmoe.serve import server
    from olmoe.serve.hosts import is_loopback

    settings = _settings(arguments)
    server.check_tls(settings)
    listener = server.bind(settings.host, settings.port)
    with contextlib.closing(listener):
        _log_to_stderr()
        server.allow_connections()
        if not is_loopback(settings.host) and not settings.api_keys:
            logging.getLogger("olmoe").warning(
                "everybody who reaches %s can use this server; set a key with --api-key", settings.host
            )
        state = load_state(arguments, settings)
        begun = (lambda: None) if arguments.quiet else (lambda: _announce(state, listener))
        _keep_what_is_loaded()
        server.Server(state, listener).run(begun=begun)
    return 0


def _keep_what_is_loaded() -> None:
    """Exempt what was loaded from garbage collection.

    Full collections are then short, and run often enough that cyclic garbage from requests (errors, most of all) does
    not pile up: it used to grow by 300 bytes per refused request.
    """
    import gc

    gc.collect()
    gc.freeze()
    gc.collect()


def check_extra(command: str) -> None:
    """Raise `UserError`, with what to install, if the packages of the extra are not there."""
    import importlib.util

    from olmoe.errors import UserError

    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        it = "it" if len(missing) == 1 else "them"
        raise UserError(f'{command} needs {", ".join(missing)}; install {it} with: pip install "olmoe[serve]"')


def check_values(arguments: argparse.Namespace, *options: str) -> None:
    """Raise `UserError` for a number below 1 in `options` or those of `add_engine_arguments`, and for odd names."""
    from olmoe.engine.sampling_params import whole_number
    from olmoe.errors import UserError, shown

    for option in ("cache_mib", "max_rows", "token_budget", "context_length", *options):
        if getattr(arguments, option) is not None:
            whole_number("--" + option.replace("_", "-"), getattr(arguments, option), least=1)
    for name in arguments.served_model_name:
        if not name.strip() or not name.isprintable():
            raise UserError(f"--served-model-name must be a name of printable characters, not {shown(name)}.")


def _settings(arguments: argparse.Namespace) -> ServeSettings:
    from olmoe.serve.auth import check_origins, read_keys
    from olmoe.serve.hosts import names_to_check
    from olmoe.serve.state import ServeSettings

    check_values(arguments, "max_queued_requests", "max_queued_tokens", "max_body_mib")
    check_origins(arguments.cors_origin)
    keys = read_keys(arguments.api_key, arguments.api_key_file)
    return ServeSettings(
        host=arguments.host,
        port=arguments.port,
        api_keys=keys,
        cors_origins=tuple(arguments.cors_origin),
        ssl_certfile=arguments.ssl_certfile,
        ssl_keyfile=arguments.ssl_keyfile,
        max_queued_requests=arguments.max_queued_requests,
        max_queued_tokens=arguments.max_queued_tokens,
        max_body_bytes=arguments.max_body_mib * _MIB,
        share_prefixes=arguments.share_prefix_cache,
        access_log=arguments.access_log,
        allowed_hosts=names_to_check(arguments.allowed_host, arguments.host, keys=bool(keys)),
    )


def load_state(arguments: argparse.Namespace, settings: ServeSettings) -> ServerState:
    """The model, its engine and their state, from the options of `add_engine_arguments`."""
    from olmoe.engine.engine import Engine
    from olmoe.io import hub
    from olmoe.runner import to_cache_dtype
    from olmoe.runtime import keep_freed_memory
    from olmoe.serve.state import make_state

    keep_freed_memory()
    llm = load_model(arguments, router_policy=arguments.router_policy)
    _check_memory(arguments.cache_mib, llm.device)
    context = min(llm.context_length, arguments.context_length or llm.context_length)
    engine = Engine(
        llm.runner,
        llm.tokenizer,
        context_length=context,
        cache_bytes=arguments.cache_mib * _MIB,
        cache_dtype=to_cache_dtype(arguments.kv_cache_dtype),
        max_rows=arguments.max_rows,
        token_budget=arguments.token_budget,
        prefix_cache=not arguments.no_prefix_cache,
        backend=llm.backend,
        router_policy=llm.router_policy,
    )
    names = arguments.served_model_name or [_name(str(arguments.adapter or arguments.model or hub.SHIPPED))]
    return make_state(
        engine,
        llm.tokenizer,
        model_name=names[0],
        aliases=names[1:],
        config=llm.config,
        context_length=context,
        settings=settings,
    )


def _check_memory(cache_mib: int, device: torch.device) -> None:
    """Warn if the cache is larger than free memory: the system grants that too, and later kills the process.

    Raises `UserError` for one that would never fit.
    """
    from olmoe.errors import UserError
    from olmoe.runtime import available_memory_bytes, total_memory_bytes

    free, total = available_memory_bytes(), total_memory_bytes()
    if device.type != "cpu" or free is None or total is None:
        return
    if cache_mib * _MIB > total:
        raise UserError(
            f"There is no memory for a cache of {cache_mib} MiB: this machine has {total // _MIB} MiB; give a smaller "
            "--cache-mib."
        )
    if cache_mib * _MIB > free:
        logging.getLogger("olmoe").warning(
            "the cache may grow to %d MiB, but only %d MiB of memory are free: the system may kill this process; "
            "give a smaller --cache-mib",
            cache_mib,
            free // _MIB,
        )


def _name(model: str) -> str:
    """What the API calls a model: its hub id, or the name of its folder."""
    path = Path(model)
    return path.resolve().name if path.exists() else model


# ---- stderr, which may be full or closed: that is no reason to stop ----


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """There is nobody left to tell."""


def _log_to_stderr() -> None:
    handler = _Stderr(sys.stderr)
    handler.setFormatter(logging.Formatter("olmoe: %(message)s"))
    logging.getLogger().handlers = [handler]
    # A warning for data sent after a client has hung up, which happens all day.
    logging.getLogger("asyncio").setLevel(logging.ERROR)


def _announce(state: ServerState, listener: socket.socket) -> None:
    from olmoe.serve.server import url_of

    engine, url = state.engine, url_of(listener, state.settings)
    held = engine.pool_tokens * engine.token_bytes
    lines = (
        f"model {state.model_name}, context {state.context_length} tokens",
        f"cache {held / _MIB:.0f} MiB, fixed: {engine.pool_tokens} tokens",
        f"page {url}/ and API {url}/v1{'' if state.settings.api_keys else ', no key needed'}",
    )
    with contextlib.suppress(OSError, ValueError, AttributeError):
        for line in lines:
            print(f"olmoe: {line}", file=sys.stderr, flush=True)
