"""`transformers serve` with our classes and packed folders (examples/transformers_serve.py), via OpenAI's client."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import olmoe
from olmoe import LLM, SamplingParams
from olmoe.io.hub import SHIPPED
from ports import kept_port

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

SCRIPT = Path(__file__).parents[2] / "examples" / "transformers_serve.py"

pytestmark = pytest.mark.skipif(not SHIPPED.is_dir(), reason="the shipped checkpoint is not there")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "tiny-int4"
    olmoe.quantize("olmoe-tiny", folder, calibration=None)
    return folder


@pytest.fixture(scope="module")
def client(packed, tmp_path_factory):
    with kept_port() as port:
        yield from served(packed, port, tmp_path_factory.mktemp("log") / "log")


def served(packed, port, log):
    command = [sys.executable, SCRIPT, "serve", packed, "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    with log.open("w") as out:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"it does not answer: {log.read_text()}")


def test_a_served_packed_folder_gives_the_engines_text(client, packed):
    answer = client.completions.create(model=str(packed), prompt="Once upon a time", max_tokens=20, temperature=0)
    (expected,) = LLM(packed).generate("Once upon a time", SamplingParams(max_new_tokens=20))
    assert answer.choices[0].text == expected.text
    assert answer.usage.completion_tokens == 20


def test_chats_are_streamed(client, packed):
    messages = [{"role": "user", "content": "Tell me a story."}]
    stream = client.chat.completions.create(model=str(packed), messages=messages, max_tokens=8, stream=True)
    chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    assert "".join(chunk.delta.content or "" for chunk in chunks)
    assert chunks[-1].finish_reason == "length"


def test_transformers_own_class_cannot_load_a_packed_folder(packed):
    """That is why the script's two lines are needed."""
    program = f"import transformers; transformers.OlmoeForCausalLM.from_pretrained({str(packed)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ignore_mismatched_sizes" in done.stderr  # it mistakes packed matrices for ordinary ones
