"""`olmoe serve` as a Ray Serve application: replicas on one machine or many, behind one address.

    pip install ".[serve]" "ray[serve]>=2.60"
    serve run deploy.ray_app:build model=allenai/OLMoE-1B-7B-0924-Instruct max_replicas=4 cpus=8
    serve deploy deploy/ray_serve.yaml                   # on a cluster: serve status shows it

Each replica holds the model and the engine, and answers all of the server's routes, streams included. Ray starts and
stops replicas with the load, replaces those that die, and passes on to the replica when a client hangs up. Requests
that carry the same `x-session-id` go to the same replica, whose prefix cache has the conversation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

if TYPE_CHECKING:
    from olmoe.serve.state import ServerState

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class Arguments(BaseModel):
    """What `serve run` and the `args` of a configuration file may say.

    - `model`: a folder or a hub id, that every machine can read; `served_model_name`: its name for clients.
    - `min_replicas`, `max_replicas`: between them Ray follows the load, aiming at `target_requests` for each replica.
    - `cpus`: cores, and so threads, of each replica. `cache_mib`: its memory for keys and values.
    - `max_requests`: what one replica works on and queues at once; `max_queued`: what Ray keeps besides. More is 503.
    - `drain_seconds`: how long a replica that is stopped may finish what it has begun.
    - `share_prefixes`: one prefix cache for all API keys. The keys themselves come from OLMOE_API_KEY in the
      environment of the application, not from here, where a dashboard would show them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "olmoe-tiny"
    served_model_name: str | None = None
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_requests: float = Field(8, gt=0)
    cpus: int = Field(2, ge=1)
    cache_mib: int = Field(2048, ge=1)
    max_requests: int = Field(128, ge=1)
    max_queued: int = Field(512, ge=1)
    drain_seconds: float = Field(120, ge=0)
    share_prefixes: bool = False


@serve.deployment
@serve.ingress()
class Replica:
    """One engine with its server, as an actor of Ray."""

    def __init__(self, arguments: dict[str, Any], api_keys: tuple[str, ...]) -> None:
        self._state = _load(Arguments(**arguments), api_keys)

    def __serve_build_asgi_app__(self) -> Any:
        """The application, which Ray calls where it would otherwise listen."""
        from olmoe.serve.app import make_app

        return make_app(self._state)

    def check_health(self) -> None:
        """Ray asks every few seconds, and replaces the replica if this raises."""
        if self._state.thread.failed is not None:
            raise RuntimeError(f"The engine has stopped: {self._state.thread.failed}")

    def __del__(self) -> None:
        """What Ray calls when a replica has drained."""
        if (state := self.__dict__.get("_state")) is not None:
            state.close()


def _load(arguments: Arguments, api_keys: tuple[str, ...]) -> ServerState:
    """The model, the engine and its thread, as `olmoe serve` makes them."""
    from olmoe import LLM
    from olmoe.engine.engine import Engine
    from olmoe.serve.state import ServeSettings, make_state

    llm = LLM(arguments.model, threads=arguments.cpus)
    engine = Engine(
        llm.runner,
        llm.tokenizer,
        context_length=llm.context_length,
        cache_bytes=arguments.cache_mib * 2**20,
        backend=llm.backend,
    )
    settings = ServeSettings(api_keys=api_keys, share_prefixes=arguments.share_prefixes)
    return make_state(
        engine,
        llm.tokenizer,
        model_name=arguments.served_model_name or arguments.model,
        config=llm.config,
        context_length=llm.context_length,
        settings=settings,
    )


def build(given: Arguments | dict[str, Any]) -> serve.Application:
    """The application that `serve run deploy.ray_app:build` deploys, which gives its words as a dict of texts."""
    from olmoe.serve.auth import read_keys

    arguments = Arguments.model_validate(given)
    deployment = Replica.options(  # type: ignore[attr-defined]
        name="olmoe",
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": arguments.target_requests,
            "upscale_delay_s": 10,
            "downscale_delay_s": 300,
        },
        # Ray sets OMP_NUM_THREADS to num_cpus.
        ray_actor_options={"num_cpus": arguments.cpus},
        max_ongoing_requests=arguments.max_requests,
        max_queued_requests=arguments.max_queued,
        graceful_shutdown_timeout_s=arguments.drain_seconds,
        request_router_config={"request_router_class": ROUTER},
    )
    return deployment.bind(arguments.model_dump(), read_keys())
