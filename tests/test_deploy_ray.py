"""deploy/ray_app.py on a local Ray: two replicas of olmoe-tiny, one of which dies while clients ask.

A tier of its own, since Ray takes half a minute to start: `pytest -m ray`, or `-m "not ray"` to do without.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from pathlib import Path

import pytest

from olmoe import LLM, SamplingParams
from olmoe.io.hub import SHIPPED

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[serve]'")
serve = pytest.importorskip("ray.serve", reason="ray is installed without serve: pip install 'ray[serve]'")
openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

ROOT = Path(__file__).parent.parent
KEY = "a key for the test"

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(not SHIPPED.is_dir(), reason="the shipped checkpoint is not there"),
    # Ray's own sockets and files, which it leaves to the collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The application with two replicas, one core each -> its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # A proxy that is not ready in 5 s is killed, and with it whoever waits for it: a busy machine takes longer.
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
        patch.setenv("OLMOE_API_KEY", KEY)
        patch.syspath_prepend(str(ROOT))
        import deploy.ray_app as application

        paths = {"PYTHONPATH": f"{ROOT}:{':'.join(sys.path)}"}
        ray.init(
            num_cpus=2,
            num_gpus=0,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=str(tmp_path_factory.mktemp("ray")),
            runtime_env={"env_vars": paths},
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            arguments = application.Arguments(cpus=1, min_replicas=2, max_replicas=2, cache_mib=50, drain_seconds=5)
            serve.run(application.build(arguments), name="olmoe", route_prefix="/")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            with contextlib.suppress(Exception):
                serve.shutdown()
            ray.shutdown()


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=address, api_key=KEY, max_retries=5, timeout=60)


def replicas() -> list[str]:
    """The names of Ray's actors that are replicas."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in actors if actor["name"].startswith("SERVE_REPLICA"))


def tell(client, **more) -> str:
    answer = client.completions.create(
        model="olmoe-tiny", prompt="Once upon a time", max_tokens=20, temperature=0, **more
    )
    return answer.choices[0].text


@pytest.fixture(scope="module")
def story() -> str:
    (completion,) = LLM().generate("Once upon a time", SamplingParams(max_new_tokens=20))
    return completion.text


def test_replicas_answer_as_the_engine_does(client, story):
    assert len(replicas()) == 2
    assert {tell(client) for _ in range(8)} == {story}
    assert client.models.list().data[0].max_model_len == 512


def test_streams_come_through_in_parts(client, story):
    stream = client.completions.create(
        model="olmoe-tiny", prompt="Once upon a time", max_tokens=120, temperature=0, stream=True
    )
    parts = [chunk.choices[0].text for chunk in stream]
    assert "".join(parts).startswith(story)
    assert len(parts) > 5  # a busy machine sends several tokens in one


def test_errors_and_keys_are_the_servers(client, address):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="olmoe-tiny", prompt="Once", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=address, api_key="another", max_retries=0).models.list()


def test_a_session_stays_with_its_replica(client):
    """Its prefix cache has what was said before."""
    prompt = "There was a little girl who had a red ball and a big dog. " * 12
    cached = []
    for _ in range(6):
        answer = client.completions.create(
            model="olmoe-tiny", prompt=prompt, max_tokens=1, extra_headers={"x-session-id": "a reader"}
        )
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert cached[0] == 0
    assert min(cached[1:]) >= 64  # every later one found it


def test_a_client_that_leaves_ends_its_text(client, address):
    stream = client.completions.create(
        model="olmoe-tiny",
        prompt="Once",
        max_tokens=500,
        stream=True,
        extra_body={"ignore_eos": True},
        extra_headers={"x-session-id": "leaving"},
    )
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 20
    while time.monotonic() < end:
        metrics = client.get("/../metrics", cast_to=str, options={"headers": {"x-session-id": "leaving"}})
        (running,) = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running")]
        (aborted,) = [
            line
            for line in metrics.splitlines()
            if line.startswith("vllm:request_success_total") and 'finished_reason="abort"' in line
        ]
        if running.endswith(" 0.0") and not aborted.endswith(" 0.0"):
            return
        time.sleep(0.2)
    pytest.fail(f"{running}; {aborted}")


def test_a_replica_that_dies_is_replaced_and_nobody_notices(client, story):
    before = replicas()
    ray.kill(ray.get_actor(before[0], namespace="serve"), no_restart=True)
    answers = [tell(client) for _ in range(20)]  # the client's own retries are all that is needed
    assert set(answers) == {story}
    end = time.monotonic() + 90
    while time.monotonic() < end:
        now = replicas()
        if len(now) == 2 and before[0] not in now:
            break
        time.sleep(0.5)
    assert len(now) == 2
    assert before[1] in now
    assert tell(client) == story
