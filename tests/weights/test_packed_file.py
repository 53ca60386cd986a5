"""Packed folders: what loading gives, that it copies nothing, and which folders are refused."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys

import pytest
import torch

from configurations import small_config
from mutated_files import mutate
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import CheckpointError, ConfigError, UserError
from olmoe.io.tensor_file import Entry, TensorFile
from olmoe.model import CausalLM, Experts, Linear, causal_attend, set_backend
from olmoe.quant import PackedEmbedding, PackedExperts, PackedLayout, PackedLinear
from olmoe.weights import checkpoint, export, packed_file
from olmoe.weights.table import TensorTable
from packed_folders import WHOLE, decoded, packed_folder

IDS = torch.randint(0, 320, (2, 16), generator=torch.Generator().manual_seed(0))


def logits(model):
    set_backend(model, "torch")  # the C++ kernels round activations; here weights alone are compared
    with torch.inference_mode():
        hidden = model(IDS, torch.arange(16).expand(2, 16), causal_attend).hidden
        return model.logits(hidden)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return packed_folder(tmp_path_factory.mktemp("packed") / "int4", **WHOLE)


@pytest.mark.parametrize("recipe", ["int8", "int4", "q4_0"])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(WHOLE, id="all packed"),
        pytest.param({}, id="down_proj plain beside a packed gate_up_proj"),
        pytest.param(WHOLE | {"tie_word_embeddings": True}, id="tied"),
        pytest.param(WHOLE | {"attention_bias": True, "num_key_value_heads": 2}, id="biases and few KV heads"),
        pytest.param({"hidden_size": 40, "intermediate_size": 64}, id="only down_proj packed"),
    ],
)
def test_a_packed_model_computes_with_the_decoded_weights(tmp_path, recipe, changes):
    model = checkpoint.load(packed_folder(tmp_path / "m", recipe, **changes))
    ours, expected = logits(model), logits(decoded(model))
    assert ours.dtype == torch.float32
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    exact = logits(checkpoint.load(tmp_path / "m-plain", dtype=torch.float32))
    assert 0 < (ours - exact).norm() < 0.5 * exact.norm()
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_modules_are_packed_where_shapes_allow(tmp_path):
    model = checkpoint.load(packed_folder(tmp_path / "m"))  # experts of width 12
    layer = model.model.layers[0]
    assert type(model.model.embed_tokens) is PackedEmbedding
    assert type(model.lm_head) is type(layer.self_attn.k_proj) is PackedLinear
    assert type(layer.mlp.experts) is PackedExperts
    assert layer.mlp.experts.formats.keys() == {"gate_up_proj"}
    assert layer.mlp.experts.down_proj.dtype == torch.float32
    assert model.lm_head.formats["weight"].name == "q5_0"
    assert layer.mlp.experts.formats["gate_up_proj"].name == "q4_0"
    assert layer.mlp.gate.weight.dtype == torch.float32
    plain = packed_file.build(small_config(hidden_size=40), PackedLayout("q4_0", {"lm_head": "bf16"}))
    assert type(plain.lm_head) is Linear
    assert type(plain.model.layers[0].mlp.experts) is Experts
    assert type(plain.model.embed_tokens) is torch.nn.Embedding


def test_packed_tensors_are_aligned_views_of_the_file(folder):
    model = checkpoint.load(folder)
    codes = {name: p for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert len(codes) == 2 + 2 * 6
    entries = TensorFile(folder / packed_file.FILE_NAME).entries
    bases = {p.data_ptr() - entries[name].start for name, p in codes.items()}
    assert len(bases) == 1  # all of them lie in one map as they lie in the file
    for name, p in codes.items():
        assert entries[name].start % 64 == p.data_ptr() % 64 == 0, name
    again = checkpoint.load(folder)
    codes["lm_head.weight"].data[0, 0] ^= 255  # private: the other model and the file stay as they are
    assert not torch.equal(model.lm_head.weight, again.lm_head.weight)


def test_loading_reads_no_weights(folder, tmp_path):
    """Resident memory grows by far less than the file."""
    code = (
        "import sys, torch; from olmoe.weights import checkpoint\n"
        "def resident():\n"
        "    return int(next(l for l in open('/proc/self/status') if l.startswith('VmRSS')).split()[1]) * 1024\n"
        "checkpoint.load(sys.argv[2]); before = resident()\n"
        "model = checkpoint.load(sys.argv[1]); print(resident() - before)"
    )
    config = small_config(hidden_size=256, intermediate_size=512, num_experts=64, num_hidden_layers=2)
    layout = PackedLayout("q8_0")
    tensors = packed_file.file_tensors(TensorTable(config, layout), torch.bfloat16)
    with packed_file.writer(tmp_path / packed_file.FILE_NAME, tensors) as writer:
        for name, (shape, dtype) in tensors.items():
            writer.write(name, torch.zeros(shape, dtype=dtype))
    (tmp_path / "config.json").write_text(packed_file.config_text(config, layout, torch.bfloat16))
    size = (tmp_path / packed_file.FILE_NAME).stat().st_size
    assert size > 50e6
    done = subprocess.run([sys.executable, "-c", code, tmp_path, folder], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0.1 * size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_hidden_states_in_half_precision(folder, dtype):
    model = checkpoint.load(folder, dtype=dtype)
    assert model.model.norm.weight.dtype == dtype
    ours, expected = logits(model), logits(checkpoint.load(folder))
    assert ours.dtype == dtype
    assert (ours.float() - expected).norm() < 0.1 * expected.norm()


def test_progress_counts_tensors(folder):
    seen = []
    checkpoint.load(folder, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_engine_generates_from_a_packed_folder(tmp_path, tokenizer_file, dtype):
    folder = packed_folder(tmp_path / "m", "int8", tokenizer_file, **WHOLE)
    llm = LLM(folder, device="cpu", dtype=dtype)
    params = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
    together = [c.token_ids for c in llm.generate(["Once upon", "The dog ran to the"], params)]
    assert [len(ids) for ids in together] == [6, 6]
    if dtype is None:
        plain = LLM.from_parts(decoded(llm.model), llm.tokenizer)
        assert together == [c.token_ids for c in plain.generate(["Once upon", "The dog ran to the"], params)]


def test_a_packed_model_is_not_saved_as_an_ordinary_one(folder, tmp_path):
    with pytest.raises(CheckpointError, match="A packed model cannot be written again; copy its folder"):
        export.save(checkpoint.load(folder), tmp_path / "again")
    assert not list(tmp_path.iterdir())


# ---- what is refused ----


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def edit(folder, change):
    """Let `change` edit the contents of config.json."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.update(num_hidden_layers=10**9), "says 1000000000 layers, but .* holds tensors of 2"),
        (lambda c: c.update(num_hidden_layers=1), "says 1 layers"),
        (lambda c: c.update(num_experts=16), "has shape .* but config.json makes it"),
        (lambda c: c.update(vocab_size=2**30), "has shape .* but config.json makes it"),
        (lambda c: c.update(hidden_size=64, num_attention_heads=4), "has shape"),
        (lambda c: c.update(tie_word_embeddings=True), "holds the tensor 'lm_head.weight', which OLMoE .* does not"),
        (lambda c: c.update(attention_bias=True), "lacks .*bias' and 7 more tensors"),
        (lambda c: c["quantization_config"].update(weight_format="q8_0"), "has shape"),
        (lambda c: c["quantization_config"]["overrides"].update(lm_head="bf16"), "has shape"),
        (lambda c: c["quantization_config"].update(weight_format="q5"), "packed as 'q5'; only"),
        (lambda c: c.update(quantization_config={"quant_method": "awq"}), "was quantized by 'awq'"),
        (lambda c: c.update(quantization_config=4), "must be an object, not 4"),
        (lambda c: c.pop("quantization_config"), "has shape"),
        (lambda c: c.update(surprise=1), "'surprise' = 1, which is unknown"),
    ],
    ids=str,
)  # fmt: skip
def test_configurations_that_contradict_the_file(copy, change, sentence):
    edit(copy, change)
    with pytest.raises(UserError, match=sentence) as refusal:
        checkpoint.load(copy)
    assert "\n" not in str(refusal.value)


def test_files_that_are_missing_or_of_another_model(copy, folder):
    (copy / packed_file.FILE_NAME).unlink()
    with pytest.raises(CheckpointError, match="There is no file"):
        checkpoint.load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        checkpoint.load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"There is no file .*config.json"):
        checkpoint.load(copy)


def test_tensors_of_another_dtype(folder):
    opened = packed_file.PackedFile(folder)
    config, layout = opened.config, opened.layout
    entries = TensorFile(folder / packed_file.FILE_NAME).entries
    for name, dtype, wanted in (("model.norm.weight", "I8", "F32 or F16 or BF16"), ("lm_head.weight", "I8", "U8")):
        changed = entries | {name: Entry(entries[name].start, entries[name].end, dtype, entries[name].shape)}
        with pytest.raises(CheckpointError, match=f"'{name}' is stored as I8, but config.json makes it {wanted}"):
            packed_file.check(config, layout, changed, folder / packed_file.FILE_NAME)


def test_mutated_folders_are_refused_with_a_sentence_or_compute(copy):
    """Some mutations only change weights; such a model must still run. See also test_tensor_file.py."""
    raw = (copy / packed_file.FILE_NAME).read_bytes()
    text = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    rng, refused = random.Random(1), 0
    for case in range(400):
        (copy / packed_file.FILE_NAME).write_bytes(mutate(raw, text, rng))
        try:
            model = checkpoint.load(copy)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
            refused += 1
            continue
        if case % 10 == 0:
            logits(model)
    assert refused > 200


def test_the_model_without_values_costs_nothing():
    model = packed_file.build(small_config(vocab_size=2**30), PackedLayout("q4_0"))
    assert isinstance(model, CausalLM)
    assert all(p.is_meta for p in model.parameters())


def test_loading_does_not_import_the_compiler(folder):
    """It takes seconds; random initialisation on the meta device would."""
    code = (
        "import sys, torch; from olmoe.weights import checkpoint; checkpoint.load(sys.argv[1]);"
        "print([name for name in ('torch._dynamo', 'sympy', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
