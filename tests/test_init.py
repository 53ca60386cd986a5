"""`import olmoe` is light and has no side effect; its public names load on first use."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import olmoe

HEAVY = ("torch", "transformers", "numpy", "tokenizers", "huggingface_hub")


def heavy_modules_after(code: str) -> set[str]:
    """Which of HEAVY a fresh interpreter has imported after running `code`."""
    script = f"{code}\nimport sys\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_import_loads_neither_torch_nor_transformers_nor_any_other_library():
    assert heavy_modules_after("import olmoe; dir(olmoe); olmoe.__version__") == set()


def test_configuration_errors_and_sampling_parameters_need_no_torch():
    assert heavy_modules_after("import olmoe; olmoe.ModelConfig, olmoe.UserError, olmoe.SamplingParams") == set()


def test_modules_that_promise_to_be_without_torch_are():
    code = (
        "import olmoe.tokenizer, olmoe.engine.request, olmoe.engine.text_stream, olmoe.io.hub, olmoe.train.vocabulary"
    )
    assert not heavy_modules_after(code) & {"torch", "transformers"}


def test_generation_needs_no_transformers():
    assert heavy_modules_after("import olmoe; olmoe.LLM, olmoe.CausalLM") & {"torch", "transformers"} == {"torch"}


@pytest.mark.parametrize("name", sorted(set(olmoe.__all__) - {"__version__"}))
def test_public_names_are_the_objects_of_their_homes(name):
    public = getattr(olmoe, name)
    assert public.__name__ == name
    assert getattr(importlib.import_module(public.__module__), name) is public
    assert name in dir(olmoe)


def test_unknown_names_raise_attribute_error():
    with pytest.raises(AttributeError, match="'olmoe' has no attribute 'LMM'"):
        _ = olmoe.LMM
