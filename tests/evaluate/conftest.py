"""olmoe-tiny behind lm-evaluation-harness: our model, and its `hf` backend with transformers' own classes."""

from __future__ import annotations

import pytest

from olmoe.io.hub import SHIPPED


@pytest.fixture(scope="session")
def ours():
    pytest.importorskip("lm_eval", reason="the extra `ecosystem` is not installed")
    if not SHIPPED.is_dir():
        pytest.skip("the shipped checkpoint is not there")
    from olmoe.evaluate import OlmoeLM

    return OlmoeLM(dtype="float32", show_progress=False)


@pytest.fixture(scope="session")
def theirs(ours):
    from lm_eval.models.huggingface import HFLM
    from transformers.models.olmoe import OlmoeForCausalLM

    backend = HFLM(pretrained=str(SHIPPED), dtype="float32", device="cpu", batch_size=4)
    assert type(backend.model) is OlmoeForCausalLM
    return backend
