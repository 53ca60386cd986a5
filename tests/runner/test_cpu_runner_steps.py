"""What a decoding step keeps off other threads: small models altogether, and every operation of torch in any model."""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path

import pytest
import torch

from conftest import make_model
from olmoe.config import RopeParameters
from olmoe.engine.request import Request
from olmoe.engine.running import RunningSequences
from olmoe.engine.sampler import Sampler
from olmoe.engine.sampling_params import SamplingParams
from olmoe.ops import cpu
from olmoe.runner import make_runner

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason="the C++ kernels are not built"),
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the times of threads are Linux's"),
]
SAMPLED = SamplingParams(temperature=0.7, top_k=40, top_p=0.95, repetition_penalty=1.1, presence_penalty=0.1, seed=1)
DYNAMIC = RopeParameters(rope_type="dynamic", factor=2.0)


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def other_threads_seconds() -> float:
    """What all threads but this one have computed so far; those of other tests may end meanwhile."""
    total, own = 0, str(os.getpid())
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            total += int((task / "schedstat").read_text().split()[0]) if task.name != own else 0
    return total / 1e9


def seconds_once_others_rest() -> float:
    """The same, once they compute hardly anything: idle threads of torch spin for a while after a prompt."""
    deadline, seen = time.monotonic() + 60, [other_threads_seconds()]
    while len(seen) == 1 or seen[-1] - seen[-2] > 0.001:
        assert time.monotonic() < deadline
        time.sleep(0.3)
        seen.append(other_threads_seconds())
    return seen[-1]


def elements(shape) -> int:
    """How many a tensor of this shape has; 0 for what is no tensor."""
    return math.prod(shape) if shape else 0


def start(model, prompts, positions, params=SAMPLED):
    """A decoding step of these prompts, sampling included, as a function."""
    runner = make_runner(model, "cpu")
    running = RunningSequences(runner, len(prompts), positions)
    requests = [Request(prompt, params, positions) for prompt in prompts]
    sampler = Sampler(model.config.vocab_size)
    state = [running.prefill(prompts)]

    def step() -> None:
        for choice, request in zip(sampler.choose_rows(state[0], requests), requests, strict=True):
            request.token_ids.append(choice.token_id)
        state[0] = running.step([request.token_ids[-1] for request in requests])

    return step


@pytest.mark.parametrize("changes", [{}, {"rope": DYNAMIC}], ids=["looked up", "dynamic RoPE"])
@pytest.mark.parametrize("batch", [1, 2])
def test_steps_of_a_small_model_leave_other_threads_asleep(two_threads, changes, batch):
    model = make_model(max_position_embeddings=2048, **changes)
    step = start(model, [[1, 2, 3]] * batch, 700)
    step()
    before, started = seconds_once_others_rest(), time.thread_time()
    for _ in range(600):  # past the positions 256 and 512
        step()
    assert other_threads_seconds() - before < 0.05 * (time.thread_time() - started)


def test_a_step_of_a_large_model_uses_them(two_threads):
    model = make_model(hidden_size=1024, num_attention_heads=16, intermediate_size=1024)
    step = start(model, [[1, 2, 3]], 64)
    step()
    before = other_threads_seconds()
    for _ in range(10):
        step()
    assert other_threads_seconds() > before


@pytest.mark.parametrize("changes", [{}, {"rope": DYNAMIC}], ids=["looked up", "dynamic RoPE"])
def test_torch_has_nothing_to_share_out_in_a_step(changes):
    model = make_model(vocab_size=50304, max_position_embeddings=2048, **changes)
    step = start(model, [[1, 2, 3]] * 3, 700, SamplingParams(temperature=0.8, top_p=0.95, seed=2, logprobs=20))
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        for _ in range(300):  # past the position 256
            step()
    assert profile.events()
    events = [event for event in profile.events() if event.name.startswith("aten::")]
    # These touch no element, or leave that to others in the list.
    computed = [event for event in events if event.name not in ("aten::empty", "aten::to", "aten::detach")]
    largest = {event.name: max(map(elements, event.input_shapes), default=0) for event in computed}
    assert max(largest.values(), default=0) <= 64, largest
