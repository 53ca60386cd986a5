"""What /metrics shows, under vLLM's names, so that its dashboards work.

What the engine itself counts is read from it on each scrape; histograms of requests are filled on the event loop as
their deltas arrive.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from olmoe.engine.request import Delta, Request

if TYPE_CHECKING:
    from olmoe.engine.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_LONG = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

# The engine's finish reasons, as the protocol names them.
_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}


class Metrics:
    """All metrics of a server, in their own registry."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._engine, self._labels = engine, {"model_name": model_name, "engine": "0"}
        self._last: dict[Request, float] = {}  # when the last token of a request arrived
        self._last_steps = -1
        self.registry.register(_EngineCollector(engine, self._labels))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return self._labelled(
                Histogram(f"vllm:{name}", text, ["model_name", "engine"], buckets=buckets, registry=None)
            )

        self.first = histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self.between = histogram("inter_token_latency_seconds", "Between two tokens of a text.", _SECONDS)
        self.per_token = histogram(
            "request_time_per_output_token_seconds", "Mean time of the tokens after the first, of a text.", _SECONDS
        )
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _LONG)
        self.queue = histogram("request_queue_time_seconds", "Waiting for the engine.", _LONG)
        self.prefill = histogram("request_prefill_time_seconds", "From the first step to the first token.", _LONG)
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last.", _LONG)
        self.inference = histogram("request_inference_time_seconds", "From the first step to the last token.", _LONG)
        self.prompts = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.generations = histogram("request_generation_tokens", "Tokens generated for a text.", _TOKENS)
        self.steps = histogram("iteration_tokens_total", "Tokens that ran through the network in a step.", _STEP_TOKENS)
        self.choices = histogram("request_params_n", "Texts that a call requested.", (1, 2, 5, 10, 20))
        self.limits = histogram("request_params_max_tokens", "Most tokens that a call requested.", _TOKENS)
        self._success = self._counter("request_success", "Texts that have ended, by reason.", "finished_reason")
        self._rejected = self._counter("admission_rejections", "Calls turned away, by reason.", "reason")
        for reason in dict.fromkeys(_REASONS.values()):
            self._success.labels(**self._labels, finished_reason=reason)

    def _labelled(self, metric: Any) -> Any:
        self.registry.register(metric)
        return metric.labels(**self._labels)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"vllm:{name}", text, ["model_name", "engine", label], registry=self.registry)

    # ---- what happens ----

    def rejected(self, reason: str) -> None:
        """A call was turned away."""
        self._rejected.labels(**self._labels, reason=reason).inc()

    def asked(self, choices: int, limit: int | None) -> None:
        """A call has started."""
        self.choices.observe(choices)
        if limit is not None:
            self.limits.observe(min(limit, 2**31))  # a client may write any number

    def observe(self, deltas: list[Delta]) -> None:
        """The deltas of a step have arrived."""
        statistics = self._engine.statistics()
        if statistics.steps != self._last_steps:
            self._last_steps = statistics.steps
            self.steps.observe(statistics.step_tokens)
        now = time.perf_counter()
        for delta in deltas:
            request = delta.request
            if delta.token_ids:
                last = self._last.get(request)
                if last is None:
                    self.first.observe(max(now - request.times.arrived, 0.0))
                else:
                    self.between.observe(now - last)
                self._last[request] = now
            if delta.finish_reason is not None:
                self._finished(request, delta.finish_reason)

    def _finished(self, request: Request, reason: str) -> None:
        self._last.pop(request, None)
        self._success.labels(**self._labels, finished_reason=_REASONS[reason]).inc()
        self.prompts.observe(len(request.prompt_ids))
        self.generations.observe(len(request.token_ids))
        times, now = request.times, time.perf_counter()
        finished = times.finished or now
        self.whole.observe(max(finished - times.arrived, 0.0))
        if not times.scheduled:
            return
        self.queue.observe(max(times.scheduled - times.arrived, 0.0))
        self.inference.observe(finished - times.scheduled)
        if times.first_token:
            self.prefill.observe(times.first_token - times.scheduled)
            self.decode.observe(finished - times.first_token)
            if len(request.token_ids) > 1:
                self.per_token.observe((finished - times.first_token) / (len(request.token_ids) - 1))

    def text(self) -> bytes:
        """The page for Prometheus."""
        return generate_latest(self.registry)


class _EngineCollector:
    """What the engine counts, read when the page is requested."""

    def __init__(self, engine: Engine, labels: dict[str, str]) -> None:
        self._engine, self._names, self._values = engine, list(labels), list(labels.values())

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """All gauges and counters of the engine."""
        now = self._engine.statistics()
        gauges = {
            "num_requests_running": ("Requests in the batch.", now.running),
            "num_requests_waiting": ("Requests that are waiting.", now.waiting),
            "kv_cache_usage_perc": ("Share of the cache in use, 1 for all.", now.blocks_used / max(now.blocks, 1)),
        }
        counters = {
            "prompt_tokens": ("Tokens of prompts.", now.prompt_tokens),
            "generation_tokens": ("Tokens generated.", now.generation_tokens),
            "prompt_tokens_cached": ("Tokens of prompts found in the prefix cache.", now.prefix_hits),
            "prefix_cache_queries": ("Tokens looked for in the prefix cache.", now.prefix_queries),
            "prefix_cache_hits": ("Tokens found in the prefix cache.", now.prefix_hits),
            "num_preemptions": ("Requests that gave up their blocks for others.", now.preemptions),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=self._names)
            gauge.add_metric(self._values, value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=self._names)
            counter.add_metric(self._values, value)
            yield counter
