"""Each Python example of docs/huggingface.md runs, on the shipped checkpoint instead of the released ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from olmoe.io.hub import SHIPPED

PAGE = Path(__file__).parent.parent.parent / "docs" / "huggingface.md"
EXAMPLE = re.compile(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", re.DOTALL | re.MULTILINE)
EXAMPLES = EXAMPLE.findall(PAGE.read_text(encoding="utf-8"))
SMALL = (
    "OlmoeConfig(vocab_size=320, hidden_size=32, intermediate_size=16, num_hidden_layers=2, "
    "num_attention_heads=4, eos_token_id=319)"
)


def adapted(code: str) -> str:
    """The example without what this machine lacks: the released weights, a GPU, memory for 13B parameters."""
    code = re.sub(r'"allenai/OLMoE-[\w-]+"', repr(str(SHIPPED)), code)
    if not torch.cuda.is_available():
        code = code.replace("device=0", "device=-1")
    return code.replace("OlmoeConfig()", SMALL)


def test_the_page_has_all_tested_examples():
    assert len(EXAMPLES) >= 7


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_example_runs(title, code, capsys):
    if "allenai" in code and not SHIPPED.is_dir():
        pytest.skip("the shipped checkpoint is not there yet")
    if "from peft" in code:
        pytest.importorskip("peft")
    namespace: dict[str, object] = {}
    exec(compile(adapted(code), title, "exec"), namespace)
    assert "print" not in code or capsys.readouterr().out.strip()
