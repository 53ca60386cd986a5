"""The registry of formats, and a format from outside on its way through everything that handles formats."""

from __future__ import annotations

import pytest
import torch

from olmoe import LLM, SamplingParams, ops
from olmoe.analysis import quality
from olmoe.errors import BackendUnavailableError, ConfigError
from olmoe.model import set_backend
from olmoe.ops.cpu import extension
from olmoe.quant import PackedLayout, PackedModule
from olmoe.quant.formats import (
    CODES,
    FORMATS,
    BlockFormat,
    Format,
    layout_formats,
    make_format,
    register_format,
    saved_formats,
)
from olmoe.quant.formats import registry as registry_module
from olmoe.quant.formats.blocks import BLOCK, GROUP
from olmoe.runner import TorchRunner, make_runner
from olmoe.weights import checkpoint
from olmoe.weights.checkpoint import open_source
from olmoe.weights.contents import contents_of
from olmoe.weights.gguf.source import GGUFSource
from olmoe.weights.gguf.to_gguf import to_gguf
from olmoe.weights.quantize import pack
from olmoe.weights.recipes import Recipe
from olmoe.weights.source import load_model
from olmoe.weights.to_folder import to_folder
from packed_folders import WHOLE, decoded, plain_folder
from runner_calls import chunked, prompt

LEVELS = torch.tensor([-1.0, -0.25, 0.25, 1.0])


class SignScale(Format):
    """Two bits a weight: its sign, and whether it is large; one fp16 scale, the largest magnitude, for 32 columns."""

    name = "sign2"
    bits = 2

    def fits(self, rows, columns):
        return columns % 32 == 0

    def parts(self, rows, columns):
        return {CODES: ((rows, columns // 4), torch.uint8), "scale": ((rows, columns // 32), torch.float16)}

    def encode(self, weight):
        blocks = weight.float().unflatten(1, (-1, 32))
        scales = blocks.abs().amax(-1)
        shares = blocks / scales.clamp(min=1e-30).unsqueeze(-1)
        codes = torch.bucketize(shares, torch.tensor([-0.625, 0.0, 0.625])).to(torch.uint8).view(len(weight), -1, 4)
        packed = codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6
        return {CODES: packed, "scale": scales.half()}

    def decode(self, parts, rows, columns, dtype):
        codes = parts[CODES].unsqueeze(-1) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8) & 3
        values = LEVELS[codes.int()].view(rows, -1, 32) * parts["scale"].float().unsqueeze(-1)
        return values.view(rows, columns).to(dtype)


RECIPE = Recipe("tiny2", "sign2", {"lm_head": "q8_0", "model.layers.1.self_attn.o_proj": "bf16"}, searches=True)


@pytest.fixture
def toy(monkeypatch):
    """`SignScale`, registered for the length of a test."""
    before = dict(registry_module._REGISTRY)
    register_format(SignScale)
    yield SignScale()
    registry_module._REGISTRY.clear()
    registry_module._REGISTRY.update(before)


@pytest.fixture
def folders(toy, tmp_path, tokenizer_file):
    """An ordinary checkpoint, and what packing makes of it in the toy format, along a forward pass."""
    plain = plain_folder(tmp_path / "plain", tokenizer_file, **WHOLE)
    windows = torch.randint(0, 320, (3, 40), generator=torch.Generator().manual_seed(0)).tolist()
    written = pack(open_source(plain), tmp_path / "packed", RECIPE, windows)
    assert written.kinds["experts, down"][0] == "sign2"
    return plain, tmp_path / "packed"


def test_ours_are_known_by_what_layouts_say_of_them():
    assert layout_formats() == ("q8_0", "q5_0", "q4_0")
    assert saved_formats() == ("nf4", "fp4", "int8")
    assert [make_format(name).name for name in FORMATS] == list(FORMATS)
    assert list(make_format("nf4", double_quant=True).parts(4, 64)) == [CODES, "absmax", "nested_absmax", "offset"]


@pytest.mark.skipif(not extension.available(), reason="the kernels were not built")
def test_the_kernels_have_the_same_table_as_the_registry():
    """The C++ traits name their formats and say how large blocks are; Python keeps no second list."""
    blocks = {name: kind for name in FORMATS if isinstance(kind := make_format(name), BlockFormat)}
    assert {name: kind.block_bytes for name, kind in blocks.items()} == {
        name: size for name, (_, size) in extension.packed_formats().items()
    }
    types = [number for number, _ in extension.packed_formats().values()]
    assert len({*types, *extension.FLOAT_TYPES.values()}) == len(types) + len(extension.FLOAT_TYPES)
    assert extension.kernels().block_shape == (GROUP, BLOCK)
    for name, kind in blocks.items():
        assert kind.parts(33, 64)[CODES][0] == extension.packed_shape(name, 33, 64)


def test_without_the_kernels_the_registry_is_all_there_is(monkeypatch):
    monkeypatch.setattr(extension, "_load", lambda: (None, "there are none"))
    assert extension.packed_formats() == {}
    codes = make_format("q4_0").encode(torch.ones(16, 32))
    assert torch.equal(make_format("q4_0").decode(codes, 16, 32, torch.float32), torch.ones(16, 32))


@pytest.mark.parametrize("name", ["q4_0", "bf16", "float32", "Q2", "", "a" * 41, "x*", None, 3])
def test_a_name_that_is_taken_or_none_is_refused(name):
    kind = type("Another", (SignScale,), {"name": name})
    with pytest.raises(ConfigError, match="exists already" if name == "q4_0" else "cannot be called"):
        register_format(kind)
    assert register_format(type(make_format("q4_0"))) is type(make_format("q4_0"))  # once more is no mistake


@pytest.mark.parametrize("name", ["sign2", "bf16", None, ["q4_0"]])
def test_an_unknown_name_says_which_there_are(name):
    with pytest.raises(ConfigError, match=r"is unknown; choose nf4 or .* or q4_0\."):
        make_format(name)


def test_layouts_know_a_format_from_outside(toy):
    layout = PackedLayout("q4_0", {"lm_head": "sign2"})
    assert PackedLayout.from_dict(layout.to_dict()) == layout
    assert isinstance(layout.format_of("lm_head.weight", 5, 64), SignScale)
    assert layout.format_of("lm_head.weight", 5, 48) is None  # as the format says


def test_packing_writes_what_the_format_encodes(toy, folders):
    plain, folder = (checkpoint.load(f) for f in folders)
    kinds = set()
    for name, module in folder.named_modules():
        for leaf, format in module.formats.items() if isinstance(module, PackedModule) else ():
            kinds.add(format.name)
            if format.name == "q8_0":
                continue
            original = plain.get_submodule(name).get_parameter(leaf)
            for e in range(len(original)) if original.dim() == 3 else [None]:
                matrix = original if e is None else original[e]
                expected = toy.decode(toy.encode(matrix), *matrix.shape, torch.float32)
                assert torch.equal(module.decode(leaf, torch.float32, e), expected), (name, leaf)
    assert kinds == {"sign2", "q8_0"}
    assert not isinstance(folder.get_submodule("model.layers.1.self_attn.o_proj"), PackedModule)
    opened = checkpoint.Checkpoint(folders[1])
    assert opened.config == plain.config
    assert contents_of(opened).formats == ["bfloat16", "q8_0", "sign2"]
    loaded = load_model(open_source(folders[1]), torch.float32)
    for name, parameter in decoded(folder).named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
def test_a_runner_computes_with_the_decoded_weights(folders, backend):
    model = checkpoint.load(folders[1])
    runner = make_runner(model, backend)
    assert isinstance(runner, TorchRunner)  # the C++ kernels do not know the format
    runner.cache_dtype = torch.float32
    ids = prompt(70)
    expected = chunked(TorchRunner(decoded(model), "reference"), ids, [70])
    # "auto" multiplies with the q8_0 head in the kernels, which quantize its inputs.
    near = {"rtol": 0, "atol": 0.02 if backend == "auto" else 2e-5}
    torch.testing.assert_close(chunked(runner, ids, [70]), expected, **near)
    torch.testing.assert_close(chunked(runner, ids, [33, 37]), expected, **near)


def test_the_kernels_refuse_it_by_name(folders):
    with pytest.raises(BackendUnavailableError, match="sign2"):
        make_runner(checkpoint.load(folders[1]), "cpu")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_modules_and_gradients(folders, backend):
    model = checkpoint.load(folders[1])
    set_backend(model, backend)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = layer.decode("weight", torch.float32)
    torch.testing.assert_close(layer(x), ops.linear(x, weight, backend="reference"))
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, -1))


def test_generation_reports_and_other_faces(folders, tmp_path):
    from olmoe import OlmoeForCausalLM

    plain, folder = folders
    llm = LLM(folder, backend="torch")
    assert len(llm.generate("Hello", SamplingParams(max_new_tokens=3), show_progress=False)[0].token_ids) == 3
    report = quality.compare(checkpoint.load(plain), checkpoint.load(folder), prompt(64), 32)
    assert report.kl_mean > 0
    model = OlmoeForCausalLM.from_pretrained(folder)
    ours = checkpoint.load(folder)
    for name, module in ours.named_modules():
        for leaf in module.shapes if isinstance(module, PackedModule) else ():
            theirs = model.get_submodule(name).get_stored(leaf)
            assert torch.equal(theirs, module.get_stored(leaf)), (name, leaf)
    assert torch.isfinite(model(torch.tensor([prompt(20)])).logits).all()
    model.save_pretrained(tmp_path / "saved")
    again = checkpoint.load(tmp_path / "saved")
    assert isinstance(again.model.layers[0].mlp.experts.formats["down_proj"], SignScale)
    assert checkpoint.Checkpoint(tmp_path / "saved").layout is not None


def test_gguf_gets_the_decoded_values(folders, tmp_path):
    to_gguf(folders[1], tmp_path / "m.gguf")
    to_folder(GGUFSource(tmp_path / "m.gguf"), tmp_path / "back")
    back, model = checkpoint.load(tmp_path / "back"), decoded(checkpoint.load(folders[1]))
    name = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(back.get_parameter(name).float(), model.get_parameter(name).bfloat16().float())
