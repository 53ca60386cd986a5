"""Each script of examples/clients runs against a real server, and prints what it is there to show."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from olmoe import LLM, SamplingParams
from olmoe.io.hub import SHIPPED
from serving_process import serving

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
yaml = pytest.importorskip("yaml")

CLIENTS = Path(__file__).parent.parent / "examples" / "clients"
KEY = "a key for the examples"

pytestmark = pytest.mark.skipif(not SHIPPED.is_dir(), reason="the shipped checkpoint is not there")


@pytest.fixture(scope="module")
def address():
    with serving("--cache-mib", "256", OLMOE_API_KEY=KEY) as url:
        yield url


def run(script: str, address: str, *arguments: str, **environment: str) -> str:
    """What a script prints; it must succeed."""
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    given = os.environ | path | {"OPENAI_BASE_URL": f"{address}/v1", "OPENAI_API_KEY": KEY} | environment
    command = [sys.executable] if script.endswith(".py") else []
    done = subprocess.run(
        [*command, str(CLIENTS / script), *arguments],
        env=given,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def story(prompt: str, tokens: int) -> str:
    (completion,) = LLM().generate(prompt, SamplingParams(max_new_tokens=tokens))
    return completion.text


def test_every_example_is_tested():
    source = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in CLIENTS.iterdir() if path.is_file() and f'"{path.name}"' not in source] == []


def test_curl(address):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    lines = run("curl.sh", address).splitlines()
    assert '{"status":"ok"}' in lines
    assert "data: [DONE]" in lines
    assert '"tokens":[1172,715,260,528]' in lines[-1]


def test_openai_sync(address):
    pytest.importorskip("openai")
    out = run("openai_sync.py", address)
    assert "'" in out
    assert story("The king said", 30) in out
    assert "30 tokens" in out
    assert re.search(r"^temperature .*-1", out, re.MULTILINE)


def test_openai_async(address):
    pytest.importorskip("openai")
    out = run("openai_async.py", address)
    assert [line.split()[0] for line in out.splitlines()] == [str(number) for number in range(8)]
    lengths = [len(line) for line in out.splitlines()]
    assert lengths[0] < max(lengths)  # which was left early; how early depends on how much comes at once


def test_openai_structured(address):
    pytest.importorskip("openai")
    out = run("openai_structured.py", address).splitlines()
    assert re.fullmatch(r"kind='(dog|cat|fox)' name=.* legs=[0-8]", out[0])
    assert re.search(r" (yes|no)$", out[1])
    assert re.search(r" [0-9]{4}-[0-9]{2}$", out[2])


def test_openai_tools(address):
    pytest.importorskip("openai")
    out = run("openai_tools.py", address)
    assert re.match(r"tool_calls weather \{'town': .*'days': -?\d+\}", out)


def test_openai_responses(address):
    pytest.importorskip("openai")
    out = run("openai_responses.py", address)
    assert re.search(r" \d+$", out, re.MULTILINE)


def test_anthropic(address):
    pytest.importorskip("anthropic")
    out = run("anthropic_messages.py", address)
    assert re.search(r" 40$", out, re.MULTILINE)


def test_langchain(address):
    pytest.importorskip("langchain_openai")
    out = run("langchain_chat.py", address)
    assert re.search(r"^ \d+ tokens$", out, re.MULTILINE)
    assert len(eval(out.splitlines()[-1])) == 2


def test_litellm(address):
    pytest.importorskip("litellm")
    out = run("litellm_chat.py", address)
    assert re.search(r" \d+$", out, re.MULTILINE)


def test_routing(address):
    pytest.importorskip("openai")
    out = run("routing.py", address)
    first, last = (
        out.split("experts of the first token in layer 0: ")[0].rstrip("\n"),
        out.split("]: ")[-1].rstrip("\n"),
    )
    assert first == story("Once upon a time", 40)
    assert last != first


def test_lm_eval(address, tmp_path):
    """Log-likelihoods of a task over HTTP are those of the engine; the tokenizer is the server's."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")
    pytest.importorskip("tenacity")
    rows = ['{"question": "She had a red", "choices": [" ball", " park"], "answer": 0}']
    rows += ['{"question": "The dog ran to the", "choices": [" girl", " ball"], "answer": 1}']
    (tmp_path / "data.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "data.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
    }
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    options = ["--tasks", "local", "--include_path", str(tmp_path), "--output_path", str(tmp_path), "--log_samples"]
    # The command may be another environment's; this one's module is the same.
    command = tmp_path / "bin" / "lm_eval"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m lm_eval "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    run("lm_eval.sh", address, *options, PATH=path, HF_DATASETS_OFFLINE="1")
    (samples,) = tmp_path.rglob("samples_local_*.jsonl")
    llm = LLM()
    for line in samples.read_text(encoding="utf-8").splitlines():
        sample = yaml.safe_load(line)
        question, choices = sample["doc"]["question"], sample["doc"]["choices"]
        for choice, answer in zip(choices, sample["filtered_resps"], strict=True):
            ids = llm.tokenizer.encode(question + choice)
            begin = len(llm.tokenizer.encode(question))
            (scored,) = llm.generate([ids], SamplingParams(max_new_tokens=1, prompt_logprobs=0))
            expected = sum(each.logprob for each in scored.prompt_logprobs[begin:])
            assert float(answer[0]) == pytest.approx(expected, abs=1e-5)


def test_continues_file_names_what_the_server_has(address):
    (model,) = yaml.safe_load((CLIENTS / "continue.yaml").read_text(encoding="utf-8"))["models"]
    assert (model["provider"], model["model"], model["apiBase"]) == ("vllm", "olmoe-tiny", "http://127.0.0.1:8000/v1")
