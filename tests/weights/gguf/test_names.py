"""Names and shapes of tensors against the tables of the `gguf` package and the parameters of the network."""

from __future__ import annotations

import math

import gguf
import pytest

from configurations import small_config
from olmoe.weights.gguf.names import tensor_names, tensor_shapes
from olmoe.weights.names import parameter_shapes


def test_names_are_those_that_llama_cpp_knows():
    config = small_config()
    table = gguf.constants.MODEL_TENSORS[gguf.MODEL_ARCH.OLMOE]
    templates = {gguf.TENSOR_NAMES[tensor] for tensor in table}
    known = {f"{t.format(bid=i)}.weight" for t in templates for i in range(config.num_hidden_layers)}
    assert set(tensor_shapes(config)) == known


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_held_once_and_whole(tied):
    config = small_config(tie_word_embeddings=tied)
    names, shapes, parameters = tensor_names(config), tensor_shapes(config), parameter_shapes(config)
    assert set(names) == set(parameters)
    assert sorted(name for parts in names.values() for name in parts) == sorted(shapes)
    for parameter, parts in names.items():
        assert sum(math.prod(shapes[name]) for name in parts) == math.prod(parameters[parameter])
        assert {shapes[name][-1] for name in parts} == {parameters[parameter][-1]}


def test_parameters_map_to_the_tensors_that_the_converter_of_llama_cpp_chooses():
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.OLMOE, 2)
    for parameter, parts in tensor_names(small_config()).items():
        if not parameter.endswith("_proj"):  # stacks of experts are our own and transformers 5's
            assert (table.get_name(parameter, try_suffixes=(".weight",)),) == parts
