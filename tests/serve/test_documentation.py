"""docs/serving.md: its code blocks run unchanged, and its tables match the server."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from olmoe.cli.main import _parse
from olmoe.config import ModelConfig
from olmoe.io.hub import SHIPPED
from olmoe.serve.app import is_open, make_app
from olmoe.serve.batch_file import URLS, parse_line
from olmoe.serve.protocol import MOST_CHOICES, MOST_LOGPROBS, ChatRequest, CompletionRequest
from olmoe.serve.state import ServeSettings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))
BLOCKS = re.findall(r"^```(python|bash)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line
    for language, code in BLOCKS
    if language == "bash"
    for line in re.sub(r"\s*\\\n\s*", " ", re.sub(r"\s+#.*", "", code)).splitlines()
    if line.strip()
]
ADDRESS = "http://127.0.0.1:8000"

pytestmark = pytest.mark.skipif(not SHIPPED.is_dir(), reason="the shipped checkpoint is not there")


def named(text: str) -> set[str]:
    """The words in backticks."""
    return set(re.findall(r"`([^`\n]+)`", text))


def prose(section: str) -> str:
    """A section without line breaks."""
    return " ".join(SECTIONS[section].split())


# ---- blocks ----


@pytest.mark.parametrize("code", PYTHON)
def test_python_examples_run(server, code):
    for package in ("openai", "anthropic", "langchain_openai", "litellm"):
        if re.search(rf"^(?:import|from) {package}\b", code, flags=re.MULTILINE):
            pytest.importorskip(package)
    assert ADDRESS in code
    command = [sys.executable, "-c", code.replace(ADDRESS, server.url)]
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("curl")])
def test_curl_examples_run(server, line):
    done = subprocess.run(
        shlex.split(line.replace(ADDRESS, server.url)), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert '"finish_reason":"length"' in done.stdout


@pytest.mark.parametrize("line", [line for line in COMMANDS if re.search(r"(^| )olmoe (?!.*pip)", line)])
def test_olmoe_commands_run(line):
    words = shlex.split(line.replace("$(openssl rand -hex 32)", "key"))
    if words[0] == "pip":
        return
    arguments = _parse(words[words.index("olmoe") + 1 :])
    assert arguments.command in ("serve", "chat", "batch", "convert")


def test_every_command_is_of_a_kind_that_is_tested():
    """lm_eval, serve run and transformers_serve.py have tests of their own: test_examples, test_deploy_ray, hf."""
    kinds = {re.sub(r"^\w+=\S+( rand -hex 32\))? ", "", line).split()[0] for line in COMMANDS}
    assert kinds == {"pip", "olmoe", "curl", "lm_eval", "serve", "vllm", "python"}
    (script,) = [line.split()[1] for line in COMMANDS if line.startswith("python ")]
    assert (ROOT / script).is_file()
    (harness,) = [line for line in COMMANDS if line.startswith("lm_eval")]
    ours = (ROOT / "examples" / "clients" / "lm_eval.sh").read_text(encoding="utf-8")
    for option in re.findall(r"(\w+)=", harness.split("--model_args")[1]):
        assert f"{option}=" in ours


def test_the_batch_example_is_valid():
    (line,) = re.findall(r'^{"custom_id".*$', SECTIONS["Without HTTP: olmoe chat and olmoe batch"], flags=re.MULTILINE)
    found = parse_line(line.encode(), 1, "page")
    CompletionRequest.model_validate(found.body)
    assert all(f"`{url}`" in PAGE for url in URLS)


# ---- tables and lists ----


def test_every_route_is_in_the_table(server):
    text = SECTIONS["What it answers"]
    routes = {route.path for route in make_app(server.state).routes}
    aliases = {"/models", "/page/{name}"}
    told = {re.sub(r"^(GET|POST) ", "", name) for name in named(text) if re.match(r"(GET |POST )?/", name)}
    assert {re.sub(r":\w+}", "}", path) for path in routes} - aliases == told


def test_every_field_is_documented():
    text = SECTIONS["What it answers"]
    fields = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    implied = {"model", "prompt", "messages"}
    refused = {"suffix", "best_of"}  # known, and not supported
    without_effect = {"add_special_tokens", "add_generation_prompt", "documents"}
    assert fields - implied - without_effect <= named(text)
    others = {"functions", "param", "finish_reason", "max_model_len"}
    assert {name for name in named(text) if re.fullmatch(r"[a-z_]+", name)} <= fields | refused | others
    assert f"`n` (at most {MOST_CHOICES})" in " ".join(text.split())
    assert f"`top_logprobs` (at most {MOST_LOGPROBS})" in " ".join(text.split())


@pytest.mark.parametrize(("name", "value"), [("suffix", "x"), ("best_of", 2), ("functions", [{"name": "x"}])])
def test_fields_documented_as_refused_are_refused(server, name, value):
    status, body, _ = server.call("/v1/completions", {"prompt": "Once", name: value})
    assert (status, body["error"]["param"]) == (400, name)


def test_documented_metrics_exist(server):
    server.call("/v1/completions", {"prompt": "Once", "max_tokens": 2})
    shown = set(re.findall(r"^# TYPE (\S+) ", server.call("/metrics")[1], flags=re.MULTILINE))
    shown = {name for name in shown if not name.endswith("_created")}
    told = {name for name in named(SECTIONS["Metrics"]) if name.startswith("vllm:")}
    assert told == shown


def test_documented_limits_are_the_settings():
    defaults = dict(re.findall(r"^\| `(--[\w-]+)` \| (\S+)", SECTIONS["Limits"], flags=re.MULTILINE))
    settings, arguments = ServeSettings(), _parse(["serve"])
    assert defaults.keys() >= {"--max-queued-requests", "--max-queued-tokens", "--max-body-mib", "--max-rows"}
    for option, default in defaults.items():
        if option != "--context-length":
            assert getattr(arguments, option[2:].replace("-", "_")) == int(default.replace(",", ""))
    assert arguments.context_length is None
    assert (settings.max_queued_requests, settings.max_queued_tokens) == (512, 1_048_576)
    assert f"pause for {settings.body_timeout:.0f} seconds" in prose("Limits")
    assert f"for {settings.stall_timeout:.0f}." in prose("Limits")
    assert f"every {settings.keep_alive:.0f} seconds" in prose("What it answers")
    assert f"`--cache-mib` ({arguments.cache_mib})" in prose("Memory")


def test_documented_memory_is_calculated(server):
    rows = re.findall(r"^\| ([\w-]+) \| ([\d,]+) \| ([\d,]+) \|$", SECTIONS["Memory"], flags=re.MULTILINE)
    sizes = {model: int(size.replace(",", "")) for model, size, _ in rows}
    config = ModelConfig()  # the released shapes
    assert sizes == {
        "OLMoE-1B-7B": 2 * config.num_hidden_layers * config.kv_heads * config.head_dim * 2,
        "olmoe-tiny": server.engine.runner.position_bytes,
    }
    for _, size, tokens in rows:
        assert int(size.replace(",", "")) * int(tokens.replace(",", "")) == 2**31
    statistics = server.engine.statistics()
    assert f"Blocks of {server.engine.pool_tokens // statistics.blocks} tokens" in prose("Memory")


def test_documented_open_routes_need_no_key():
    assert all(map(is_open, ("/", "/health", "/ready")))
    assert not any(map(is_open, ("/metrics", "/v1/models", "/openapi.json", "/tokenize", "/version")))


def test_links_have_targets():
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        page, _, anchor = target.partition("#")
        place = ROOT / "docs" / (page or "serving.md")
        assert place.exists(), target
        titles = re.findall(r"^#+ (.+)$", place.read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, (
            target
        )


def test_the_table_of_contents_matches_the_sections():
    assert re.findall(r"^- \[(.+)\]\(#", PAGE, flags=re.MULTILINE) == list(SECTIONS)
