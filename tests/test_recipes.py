"""Each recipe of docs/recipes.md runs as it stands there, and does what it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from olmoe import LLM, SamplingParams
from olmoe.io.hub import SHIPPED
from olmoe.model import causal_attend

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))
ADAPTER, MERGE = "Train a LoRA adapter on the experts", "Merge it, and run it in llama.cpp"
BLOCK = re.compile(r"```(python|bash)\n(.*?)```", re.DOTALL)

pytestmark = pytest.mark.skipif(not SHIPPED.is_dir(), reason="the shipped checkpoint is not there")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder that looks like the root of a checkout to a recipe, and may be written."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cook(title):
    """Run the blocks of a recipe in turn -> the names that they define."""
    namespace: dict[str, object] = {}
    for language, code in BLOCK.findall(RECIPES[title]):
        if language == "python":
            for package in ("peft", "lm_eval", "xllamacpp", "datasets"):
                if re.search(rf"^(?:import|from) {package}\b", code, flags=re.MULTILINE):
                    pytest.importorskip(package)
            if script := re.match(r"# (\w+\.py)\n", code):
                Path(script[1]).write_text(code, encoding="utf-8")
            else:
                exec(compile(code, title, "exec"), namespace)
            continue
        for command in filter(None, (re.sub(r"\s+#.*", "", line).strip() for line in code.splitlines())):
            path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
            done = subprocess.run(
                command, shell=True, env=os.environ | path, capture_output=True, text=True, timeout=300, check=False
            )
            assert done.returncode == 0, done.stderr
    return namespace


def test_every_recipe_is_listed_and_tested():
    assert re.findall(r"^- \[(.+)\]\(#", PAGE, flags=re.MULTILINE) == list(RECIPES)
    anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in RECIPES]
    assert re.findall(r"^- \[.+\]\(#(.+)\)", PAGE, flags=re.MULTILINE) == anchors
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{title}"' in source for title in RECIPES)


def test_an_adapter_on_experts_learns_and_goes_to_llama_cpp(folder, capsys):
    losses = cook(ADAPTER)["losses"]
    assert losses[-1] < losses[0] - 0.05
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    capsys.readouterr()
    answer = cook(MERGE)["answer"]
    theirs = answer["choices"][0]["text"]
    params = SamplingParams(max_new_tokens=20)
    (ours,) = LLM(folder / "merged", dtype="float32").generate("My fellow citizens", params)
    (base,) = LLM(dtype="float32").generate("My fellow citizens", params)
    assert ours.text != base.text  # the adapter is in it
    assert theirs[:8] == ours.text[:8]  # its cache is fp16: texts may part later
    assert (folder / "merged-int4.gguf").is_file()


def test_two_processes_train_with_transformers_trainer(folder):
    cook("Train on two processes with transformers' Trainer")
    state = json.loads((folder / "trained" / "trainer_state.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    (ours,) = LLM(folder / "trained", dtype="float32").generate("My fellow", SamplingParams(max_new_tokens=8))
    (base,) = LLM(dtype="float32").generate("My fellow", SamplingParams(max_new_tokens=8))
    assert ours.text != base.text


def test_chat(folder, capsys):
    names = cook("Chat")
    assert [message["role"] for message in names["messages"]] == ["system", *["user", "assistant"] * 2]
    assert "<|assistant|>" in capsys.readouterr().out


def test_lm_evaluation_harness(folder):
    results = cook("Evaluate with lm-evaluation-harness")["results"]
    assert results["results"]["questions"]["acc,none"] == 1.0


def test_perplexity_by_domain(folder):
    reports = cook("Perplexity by domain")["reports"]
    assert set(reports) == {"reference", "speeches"}
    for report in reports.values():
        assert report.tokens == 2047
        assert 1 < report.reference_perplexity < 4096
        assert 0 < report.kl_mean < 0.2
        assert 0.8 < report.routing_mean < 1


def test_routers_by_domain(folder):
    shares = cook("Routers by domain")["shares"]
    for share in shares.values():
        assert share.shape == (4, 64)
        np.testing.assert_allclose(share.sum(axis=1), 1)
    assert np.abs(shares["story"] - shares["reference"]).sum(axis=1).min() > 0.2


def test_banning_an_expert(folder):
    names = cook("Ban an expert")
    assert len(names["without"]) == 8
    assert len({round(loss, 6) for loss in [names["before"], *names["without"].values()]}) > 4
    plain = LLM(dtype="float32").model
    ids = torch.tensor([names["ids"]])
    with torch.inference_mode():
        hidden = plain(ids, torch.arange(ids.shape[1])[None], causal_attend).hidden
        expected = torch.nn.functional.cross_entropy(plain.logits(hidden)[0, :-1], ids[0, 1:]).item()
    assert names["before"] == pytest.approx(expected, abs=1e-4)
