"""Packing: what is written, that calibration text lowers the loss, and that nothing half-written stays."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch

from configurations import small_config
from conftest import make_model
from olmoe.analysis import quality
from olmoe.config import ModelConfig
from olmoe.errors import CheckpointError, UserError
from olmoe.io import hub
from olmoe.io.tensor_file import TensorFile, TensorWriter
from olmoe.model import set_backend
from olmoe.quant import Q4_0, Q8_0, PackedModule, search
from olmoe.quant.formats import CODES
from olmoe.tokenizer import Tokenizer
from olmoe.weights import checkpoint, export, packed_file, sample_text
from olmoe.weights.checkpoint import open_source
from olmoe.weights.contents import describe
from olmoe.weights.hf_folder import HFFolder
from olmoe.weights.quantize import pack
from olmoe.weights.recipes import RECIPES, Recipe
from olmoe.weights.table import TensorTable
from packed_folders import WHOLE, plain_folder
from sentences import refused


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return plain_folder(tmp_path_factory.mktemp("packing") / "plain", **WHOLE)


WINDOWS = torch.randint(0, 320, (3, 40), generator=torch.Generator().manual_seed(0)).tolist()


def stored(folder):
    file = TensorFile(folder / packed_file.FILE_NAME)
    return {name: file.tensor(name).clone() for name in file.entries}


@pytest.mark.parametrize(("recipe", "format"), [("int8", Q8_0()), ("q4_0", Q4_0())])
def test_every_matrix_is_encoded_and_everything_else_kept(plain, tmp_path, recipe, format):
    written = pack(open_source(plain), tmp_path / "m", RECIPES[recipe])
    model, values = checkpoint.load(plain), stored(tmp_path / "m")
    for name, parameter in model.named_parameters():
        if "norm" in name or "mlp.gate" in name:
            assert values[name].dtype == torch.bfloat16
            assert torch.equal(values[name], parameter), name
        else:
            matrices = parameter if parameter.dim() == 3 else [parameter]
            expected = torch.stack([format.encode(m)[CODES] for m in matrices])
            assert torch.equal(values[name], expected if parameter.dim() == 3 else expected[0]), name
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization_config"]["weight_format"] == format.name
    assert {k: v for k, v in config.items() if k != "quantization_config"} == json.loads(
        (plain / "config.json").read_text()
    )
    assert written.file_bytes == (tmp_path / "m" / packed_file.FILE_NAME).stat().st_size
    assert sum(size for _, _, size in written.kinds.values()) < written.file_bytes
    assert sum(weights for _, weights, _ in written.kinds.values()) == model.config.num_parameters


@pytest.mark.parametrize("windows", [None, WINDOWS], ids=["search", "calibrated"])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(WHOLE, id="all packed"),
        pytest.param({}, id="a plain down_proj"),
        pytest.param(WHOLE | {"tie_word_embeddings": True}, id="tied"),
        pytest.param(WHOLE | {"attention_bias": True, "num_key_value_heads": 2}, id="biases"),
        pytest.param({"hidden_size": 40}, id="nothing can be packed"),
        pytest.param(WHOLE | {"num_experts": 64, "num_experts_per_tok": 1}, id="experts without a token"),
    ],
)
def test_int4_of_every_shape_of_model(tmp_path, windows, changes):
    plain, seen = plain_folder(tmp_path / "plain", **changes), []
    windows = windows if windows is None else [w[:8] for w in windows]
    pack(open_source(plain), tmp_path / "m", RECIPES["int4"], windows, lambda done, total: seen.append((done, total)))
    total = small_config(**changes).num_parameters
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    reference, candidate = checkpoint.load(plain, dtype=torch.float32), checkpoint.load(tmp_path / "m")
    packs = any(isinstance(module, PackedModule) for module in candidate.modules())
    assert packs == (changes != {"hidden_size": 40})
    report = quality.compare(reference, candidate, WINDOWS[0], 40)
    assert report.kl_mean < 0.2


def test_calibrated_codes_lose_less_than_searched_and_those_less_than_rounded(tmp_path):
    """On the shipped model, whose weights have the structure of trained ones, and on other text."""
    source, config = open_source(hub.SHIPPED), ModelConfig.from_file(hub.SHIPPED / "config.json")
    tokenizer = Tokenizer.from_folder(hub.SHIPPED, eos_ids=config.eos_token_ids)
    windows = sample_text.windows(sample_text.read_ids(sample_text.CALIBRATION, tokenizer), 256, 8)
    text = sample_text.read_ids(sample_text.HELD_OUT, tokenizer)[:513]
    reference = checkpoint.load(hub.SHIPPED, dtype=torch.float32)
    rounding = Recipe("rounding", "q4_0", RECIPES["int4"].overrides)
    losses = {}
    for name, recipe, given in (
        ("rounded", rounding, None),
        ("searched", RECIPES["int4"], None),
        ("calibrated", RECIPES["int4"], windows),
        ("high", RECIPES["int4-high"], windows),
        ("int8", RECIPES["int8"], None),
    ):
        pack(source, tmp_path / name, recipe, given)
        candidate = checkpoint.load(tmp_path / name)
        set_backend(candidate, "torch")
        losses[name] = quality.compare(reference, candidate, text, 512).kl_mean
    assert list(losses) == sorted(losses, key=losses.__getitem__, reverse=True)
    assert losses["calibrated"] < 0.8 * losses["rounded"]
    assert losses["high"] < 0.7 * losses["calibrated"]


@pytest.mark.parametrize("recipe", ["int4", "int4-high"])
def test_what_matrices_share_is_factored_once(plain, tmp_path, monkeypatch, recipe):
    """q, k and v have the same inputs, and so do the first matrices of all experts; 8 bits need no factor."""
    factored, factor = [], search.inverse_factor
    monkeypatch.setattr(search, "inverse_factor", lambda c: (factored.append(len(c)), factor(c))[1])
    pack(open_source(plain), tmp_path / "m", RECIPES[recipe], WINDOWS)
    config = ModelConfig.from_file(plain / "config.json")
    d, f, experts = config.hidden_size, config.intermediate_size, config.num_experts
    attention, ends = ([d, d], [d]) if recipe == "int4" else ([], [])
    layer = [d, *[f] * experts, *attention]
    assert factored == layer * config.num_hidden_layers + ends


def test_real_shapes_stay_below_their_budget():
    config = ModelConfig()
    for name, most in (("int8", 8.51), ("int4", 4.535), ("int4-high", 4.785), ("q4_0", 4.51)):
        table = TensorTable(config, RECIPES[name].layout())
        tensors = packed_file.file_tensors(table, torch.bfloat16)
        size = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in tensors.values())
        assert describe(table, tensors, size).bits_per_weight < most
        codes = [torch.Size(shape).numel() for shape, dtype in tensors.values() if dtype == torch.uint8]
        assert all(n % 64 == 0 for n in codes)  # so that each tensor starts at a cache line


def test_packing_a_packed_model_to_the_same_format_changes_little(plain, tmp_path):
    pack(open_source(plain), tmp_path / "a", RECIPES["int8"])
    pack(open_source(tmp_path / "a"), tmp_path / "b", RECIPES["int8"])
    first, second = (checkpoint.load(tmp_path / n) for n in "ab")
    report = quality.compare(first, second, WINDOWS[0], 40)
    assert report.kl_mean < 1e-5


class Blocks(HFFolder):
    """A source that stores everything in Q4_0 already, as a GGUF file would."""

    def stored_as(self, parameter, expert=None):
        return ("Q4_0",)

    def blocks(self, parameter, expert=None):
        weight = super().read(parameter, expert)
        codes = Q4_0().encode(weight)[CODES]
        return Q4_0().to_gguf(codes, *weight.shape).numpy()


def test_chat_templates_travel(plain, tmp_path):
    source = shutil.copytree(plain, tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "chat_template.jinja").write_text("D", encoding="utf-8")
    (source / "additional_chat_templates/rag.jinja").write_text("R", encoding="utf-8")
    pack(open_source(source), tmp_path / "m", RECIPES["int8"])
    assert (tmp_path / "m/chat_template.jinja").read_text(encoding="utf-8") == "D"
    assert (tmp_path / "m/additional_chat_templates/rag.jinja").read_text(encoding="utf-8") == "R"


def test_blocks_of_the_source_travel_without_rounding_again(plain, tmp_path):
    pack(open_source(plain), tmp_path / "rounded", RECIPES["q4_0"])
    pack(Blocks(plain), tmp_path / "blocks", RECIPES["int4"])
    rounded, blocks = stored(tmp_path / "rounded"), stored(tmp_path / "blocks")
    for name in rounded:
        if name not in ("lm_head.weight", "model.embed_tokens.weight"):  # int4 stores those in 8 bits
            assert torch.equal(rounded[name], blocks[name]), name


# ---- what goes wrong ----


def test_an_old_packed_folder_is_replaced_and_a_foreign_one_is_not(plain, tmp_path):
    for recipe in ("int8", "int4"):
        pack(open_source(plain), tmp_path / "m", RECIPES[recipe])
    assert packed_file.PackedFile(tmp_path / "m").layout.recipe == "int4"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(CheckpointError, match="holds other files and no config.json"):
        pack(open_source(plain), tmp_path / "photos", RECIPES["int8"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "photos"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space left on device"), UserError)],
    ids=str,
)
def test_an_interrupt_and_a_full_disk_leave_nothing_behind(plain, tmp_path, monkeypatch, error, raised):
    written = []

    def write(self, name, piece, offset=0):
        written.append(name)
        if len(written) == 5:
            raise error

    monkeypatch.setattr(TensorWriter, "write", write)
    with pytest.raises(raised):
        pack(open_source(plain), tmp_path / "m", RECIPES["int8"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    folder = plain_folder(tmp_path / "plain", **WHOLE)
    raw = bytearray((folder / "model.safetensors").read_bytes())
    start = TensorFile(folder / "model.safetensors").entries["model.layers.1.self_attn.v_proj.weight"].start
    raw[start : start + 2] = torch.tensor([value]).bfloat16().view(torch.uint8).numpy().tobytes()
    (folder / "model.safetensors").write_bytes(raw)
    for recipe, windows in (("int8", None), ("int4", None), ("int4", WINDOWS)):
        with pytest.raises(CheckpointError, match="v_proj.weight holds values that are not finite"):
            pack(open_source(folder), tmp_path / "m", RECIPES[recipe], windows)
    assert not (tmp_path / "m").exists()


def test_a_checkpoint_that_packing_did_not_write_is_replaced_on_request_alone(plain, tmp_path):
    pack(open_source(plain), tmp_path / "noted", RECIPES["int8"])
    (tmp_path / "noted" / "notes.txt").write_text("mine")
    export.save(make_model(), tmp_path / "tuned")
    for name in ("noted", "tuned"):
        assert "overwrite=True" in refused(lambda name=name: pack(open_source(plain), tmp_path / name, RECIPES["int8"]))
    assert "notes.txt" in refused(lambda: pack(open_source(plain), tmp_path / "noted", RECIPES["int8"], overwrite=True))
    assert "SRC and DST" in refused(
        lambda: pack(open_source(tmp_path / "tuned"), tmp_path / "tuned", RECIPES["int8"], overwrite=True)
    )
    pack(open_source(plain), tmp_path / "tuned", RECIPES["int8"], overwrite=True)
    assert checkpoint.Checkpoint(tmp_path / "tuned").layout is not None


def test_what_somebody_put_there_meanwhile_stays(plain, tmp_path):
    target = tmp_path / "m"

    def progress(done, total):
        target.mkdir(exist_ok=True)
        (target / "notes.txt").write_text("mine")

    refused(lambda: pack(open_source(plain), target, RECIPES["int8"], progress=progress))
    assert (target / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


# ---- the library call ----


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_library_call_writes_what_the_command_does(tmp_path, tokenizer_file, capsys):
    import olmoe
    from olmoe.cli.main import main

    plain, text = plain_folder(tmp_path / "plain", tokenizer_file, **WHOLE), tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl. The dog ran to the ball.\n" * 6, encoding="utf-8")
    seen = []
    written = olmoe.quantize(
        str(plain), tmp_path / "m", calibration=text, progress=lambda done, total: seen.append((done, total))
    )
    assert written.formats == ["bfloat16", "q4_0", "q5_0"]
    assert seen[-1][0] == seen[-1][1] == ModelConfig.from_file(plain / "config.json").num_parameters
    command = ["quantize", str(plain), str(tmp_path / "c"), "--format", "int4", "--calibration", str(text), "--quiet"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{written.table()}\n"
    assert files_of(tmp_path / "m") == files_of(tmp_path / "c")
    olmoe.quantize(open_source(plain), tmp_path / "t", calibration=[text.read_text(encoding="utf-8")])
    assert files_of(tmp_path / "t") == files_of(tmp_path / "m")
    olmoe.quantize(plain, tmp_path / "n", calibration=None)
    assert files_of(tmp_path / "n") != files_of(tmp_path / "m")
    olmoe.quantize(plain, tmp_path / "d")  # the sample that is shipped
    assert files_of(tmp_path / "d").keys() == files_of(tmp_path / "m").keys()


def test_the_library_call_takes_recipes_and_names_of_formats(plain, tmp_path):
    import olmoe

    assert olmoe.quantize(plain, tmp_path / "q5", "q5_0").formats == ["bfloat16", "q5_0"]
    assert packed_file.PackedFile(tmp_path / "q5").layout.recipe == "q5_0"
    recipe = Recipe("mine", "q8_0", {"*.mlp.experts.*": "q4_0"})
    assert olmoe.quantize(plain, tmp_path / "m", recipe).kinds["experts, down"][0] == "q4_0"


def test_the_library_call_refuses_what_the_command_does(plain, tmp_path):
    import olmoe

    olmoe.quantize(plain, tmp_path / "m", "int8")
    before = files_of(tmp_path / "m")
    cases = [
        (("nowhere/at/all", tmp_path / "new"), {}, "There is no folder"),
        ((plain, tmp_path / "new", "int3"), {}, "packed as 'int3'; choose one of int8, int4, int4-high, q4_0"),
        ((plain, tmp_path / "new", None), {}, "packed as None"),
        ((plain, tmp_path / "new", "fp4"), {}, "packed as 'fp4'"),
        ((plain, tmp_path / "new"), {}, "has no tokenizer.json"),
        ((plain, tmp_path / "m", "int8"), {}, "overwrite=True"),
        ((plain, plain, "int8"), {"overwrite": True}, "are both"),
    ]
    for arguments, options, sentence in cases:
        with pytest.raises(UserError, match=sentence) as refusal:
            olmoe.quantize(*arguments, **options)
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "new").exists()
    assert files_of(tmp_path / "m") == before
    olmoe.quantize(plain, tmp_path / "m", "q4_0", overwrite=True)
    assert packed_file.PackedFile(tmp_path / "m").layout.recipe == "q4_0"


def test_empty_calibration_text_is_refused(tmp_path, tokenizer_file):
    import olmoe

    plain = plain_folder(tmp_path / "plain", tokenizer_file, **WHOLE)
    for documents in ([], [" "]):
        with pytest.raises(UserError, match="calibration text is empty"):
            olmoe.quantize(plain, tmp_path / "m", calibration=documents)
    assert not (tmp_path / "m").exists()
