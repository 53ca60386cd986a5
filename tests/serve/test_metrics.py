"""/metrics: vLLM's names, and values that follow events."""

from __future__ import annotations

import re

import pytest

NAMES = """
num_requests_running num_requests_waiting kv_cache_usage_perc prompt_tokens_total generation_tokens_total
prompt_tokens_cached_total prefix_cache_queries_total prefix_cache_hits_total num_preemptions_total
time_to_first_token_seconds_bucket inter_token_latency_seconds_sum request_time_per_output_token_seconds_count
e2e_request_latency_seconds_bucket request_queue_time_seconds_sum request_prefill_time_seconds_sum
request_decode_time_seconds_sum request_inference_time_seconds_sum request_prompt_tokens_sum
request_generation_tokens_sum iteration_tokens_total_sum request_params_n_sum request_params_max_tokens_sum
""".split()


def read(running) -> dict[str, float]:
    """Values by name and labels, without the model's label."""
    status, text, headers = running.call("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    values = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, labels, value = re.fullmatch(r"([a-z0-9_:]+)\{(.*)\} (\S+)", line).groups()
            assert 'model_name="olmoe-tiny"' in labels
            assert 'engine="0"' in labels
            others = [label for label in labels.split(",") if not re.match("model_name|engine", label)]
            values[name.removeprefix("vllm:") + "".join(others)] = float(value)
    return values


@pytest.fixture
def running(run_server):
    return run_server()


def test_metric_names_are_vllms(running):
    running.call("/v1/completions", {"prompt": "Once", "max_tokens": 2, "ignore_eos": True})
    values = read(running)
    found = {re.sub(r"(le|reason|finished_reason)=.*", "", name) for name in values}
    assert set(NAMES) <= found
    assert "request_success_total" in found


def test_metric_values_follow_events(running):
    before = read(running)
    assert before["generation_tokens_total"] == 0
    body = {"prompt": ["word " * 200] * 2, "n": 2, "max_tokens": 10, "ignore_eos": True}
    usage = running.call("/v1/completions", body)[1]["usage"]
    after = read(running)
    assert (
        after["generation_tokens_total"] == after["request_generation_tokens_sum"] == usage["completion_tokens"] == 40
    )
    assert after["request_prompt_tokens_count"] == after['request_success_totalfinished_reason="length"'] == 4
    assert after["request_params_n_sum"] == 2
    assert after["request_params_max_tokens_sum"] == 10
    assert after["time_to_first_token_seconds_count"] == 4
    assert after["inter_token_latency_seconds_count"] == 36
    assert 0 < after["time_to_first_token_seconds_sum"] <= after["e2e_request_latency_seconds_sum"]
    assert after["prefix_cache_hits_total"] <= after["prefix_cache_queries_total"]
    assert after["prompt_tokens_cached_total"] == after["prefix_cache_hits_total"]
    assert after["iteration_tokens_total_count"] > 0
    assert after["num_requests_running"] == after["num_requests_waiting"] == after["kv_cache_usage_perc"] == 0


def test_disconnected_clients_count_as_aborted(running):
    import http.client

    connection = http.client.HTTPConnection(running.host, running.port)
    body = b'{"prompt": "a", "max_tokens": 500, "ignore_eos": true, "stream": true}'
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    connection.getresponse().readline()
    assert read(running)["num_requests_running"] == 1
    connection.close()
    assert running.idle()
    assert read(running)['request_success_totalfinished_reason="abort"'] == 1
