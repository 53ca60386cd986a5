"""`olmoe upcycle`, from an OLMo folder and from a dense run of our own trainer."""

import json

import pytest
import torch
from transformers import OlmoConfig, OlmoForCausalLM

from olmoe.cli.main import main
from olmoe.config import ModelConfig
from olmoe.io.hub import SHIPPED
from olmoe.weights.checkpoint import Checkpoint

TOKENIZER = (SHIPPED / "tokenizer.json").read_text(encoding="utf-8")


@pytest.fixture
def olmo(tmp_path):
    config = OlmoConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=1, eos_token_id=4095,
    )  # fmt: skip
    torch.manual_seed(1)
    OlmoForCausalLM(config).save_pretrained(tmp_path / "olmo")
    (tmp_path / "olmo" / "tokenizer.json").write_text(TOKENIZER, encoding="utf-8")
    return tmp_path / "olmo"


def run(capsys, *arguments):
    code = main(["upcycle", *map(str, arguments), "--quiet"])
    return code, capsys.readouterr()


def test_from_an_olmo_folder(olmo, tmp_path, capsys):
    code, said = run(capsys, olmo, tmp_path / "out", "--experts", 4, "--tokens", 600, "--json", "--dtype", "f32")
    assert code == 0
    losses = json.loads(said.out)
    assert losses["tokens"] == 599
    assert abs(losses["before"] - losses["after"]) < 0.05  # norms of queries and keys are all that changed
    config = ModelConfig.from_file(tmp_path / "out" / "config.json")
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (4, 2, True)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_dense_run_of_the_trainer_goes_on_as_a_mixture(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"The cat number {i} sat on the mat and slept." for i in range(400)))
    (tmp_path / "tokenizer.json").write_text(TOKENIZER, encoding="utf-8")
    common = """
        [data]
        train = [{path = "text.txt"}]
        sequence_length = 32
        [batch]
        sequences = 4
        [optimizer]
        learning_rate = 3e-3
        [schedule]
        total_tokens = 2560
    """
    (tmp_path / "dense.toml").write_text(
        """
        [run]
        output = "dense"
        [model]
        vocab_size = 4096
        hidden_size = 32
        intermediate_size = 64
        num_hidden_layers = 1
        num_attention_heads = 2
        num_experts = 1
        num_experts_per_tok = 1
        max_position_embeddings = 64
        eos_token_id = 4095
        [tokenizer]
        path = "tokenizer.json"
        """
        + common
    )
    assert main(["train", str(tmp_path / "dense.toml"), "--quiet"]) == 0
    dense = next(path.parent for path in sorted((tmp_path / "dense").rglob("config.json")))
    capsys.readouterr()
    code, said = run(
        capsys, dense, tmp_path / "moe", "--experts", 4, "--text", text, "--tokens", 2000, "--json", "--dtype", "f32"
    )
    assert code == 0, said.err
    losses = json.loads(said.out)
    assert losses["after"] == pytest.approx(losses["before"], abs=1e-4)
    (tmp_path / "moe.toml").write_text('[run]\noutput = "sparse"\ninitialize_from = "moe"\n' + common)
    assert main(["train", str(tmp_path / "moe.toml"), "--quiet"]) == 0
    trained = next(path.parent for path in sorted((tmp_path / "sparse").rglob("config.json")))
    assert Checkpoint.open(trained).config.num_experts == 4


def test_the_plain_form_warns(olmo, tmp_path, capsys, caplog):
    code, said = run(capsys, olmo, tmp_path / "out", "--form", "plain", "--tokens", 0)
    assert code == 0
    assert said.out == ""
    assert "normalized keeps it" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", 4, "--top-k", 8], "cannot choose 8 of 4"),
        (["--tokens", -1], "--tokens must be 0 or more"),
        (["--noise", 2], "noise is a share"),
    ],
)
def test_mistakes_leave_nothing(olmo, tmp_path, capsys, arguments, message):
    code, said = run(capsys, olmo, tmp_path / "out", *arguments)
    assert code == 2
    assert message in said.err
    assert not (tmp_path / "out").exists()


def test_the_shipped_model_is_sparse_already(tmp_path, capsys):
    code, said = run(capsys, "olmoe-tiny", tmp_path / "out")
    assert code == 2
    assert "already sparse" in said.err or "packed" in said.err
