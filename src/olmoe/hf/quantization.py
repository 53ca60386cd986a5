"""4-bit and 8-bit loading: transformers' `BitsAndBytesConfig` with our packed layers, experts included.

transformers' own integration replaces plain `nn.Linear` modules, so in a mixture of experts it quantizes the
attention and leaves out the experts, 93 % of OLMoE. Here `from_pretrained` of our classes turns the same
configuration into a `PackedConfig`, and `PackedQuantizer` packs attention and experts while they load: each
weight is encoded as soon as its tensors are read, so that at most one layer's experts exist unpacked. The router
and norms are never packed, and `lm_head`, a classifier's `score` and the embeddings stay plain, as transformers
documents. bitsandbytes itself is not needed.

A folder packed by `olmoe quantize` loads the same way (`olmoe.weights.packed_file`): its `quantization_config` names
a format for every matrix, and embeddings and `lm_head` may be packed too.

Nothing is registered with transformers before the first `from_pretrained` of one of our classes, which adds the
method "olmoe" to its table of quantization methods.
"""

from __future__ import annotations

import copy
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationMethod

from olmoe.errors import CheckpointError, ConfigError, shown
from olmoe.hf.adapted import Trained, notice_adapters, plain_module, shown_head, unwrapped
from olmoe.hf.switching import describe
from olmoe.io.hub import folder_or_id
from olmoe.model import Experts, Linear
from olmoe.quant import (
    FORMATS,
    FourBit,
    PackedEmbedding,
    PackedExperts,
    PackedLayout,
    PackedModule,
    SavedLayout,
    layout_formats,
    make_format,
)
from olmoe.quant.swap import pack_modules
from olmoe.weights.names import DOWN, GATE_UP

METHOD = "olmoe"
_COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PackedConfig(BitsAndBytesConfig):
    """How a model is packed, as stored in `config.json`: a `BitsAndBytesConfig` under its own method name.

    Under bitsandbytes' name, other software would look for bitsandbytes' tensors in our files.
    """

    def __init__(
        self,
        weight_format: str | None = None,
        double_quant: bool = False,
        compute_dtype: str | None = None,
        skip_modules: list[str] | None = None,
        quant_method: str = METHOD,
        overrides: dict[str, str] | None = None,
        recipe: str | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ConfigError(
                f"quantization_config holds {shown(sorted(unknown)[0])}, which this version of olmoe does not know; "
                "load the model with the version that saved it."
            )
        if weight_format not in FORMATS:
            raise ConfigError(f"The weight format {shown(weight_format)} is unknown; choose {' or '.join(FORMATS)}.")
        if compute_dtype is not None and compute_dtype not in _COMPUTE_DTYPES:
            raise ConfigError(
                f"bnb_4bit_compute_dtype {shown(compute_dtype)} is not one that models compute in; "
                f"choose {' or '.join(_COMPUTE_DTYPES)}."
            )
        self.layout: PackedLayout | None = None
        if weight_format in layout_formats():
            if skip_modules is not None or double_quant:
                raise ConfigError(
                    f"{weight_format} has neither skip_modules nor double_quant; name the matrices that stay plain "
                    "in overrides, as bf16."
                )
            self.layout = PackedLayout(weight_format, overrides or {}, recipe)
        elif overrides:
            raise ConfigError(
                f"Only {', '.join(layout_formats())} support overrides, not {weight_format}; leave them out."
            )
        format = make_format(weight_format)
        four_bit = format.bits < 8
        super().__init__(
            load_in_4bit=four_bit,
            load_in_8bit=not four_bit,
            llm_int8_skip_modules=skip_modules,
            bnb_4bit_quant_type=format.name if isinstance(format, FourBit) else "fp4",
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_use_double_quant=double_quant,
        )
        self.quant_method, self.weight_format, self.compute_dtype = quant_method, format.name, compute_dtype

    @classmethod
    def translate(cls, config: BitsAndBytesConfig) -> PackedConfig:
        """The same settings for our layers. Options that only make sense for bitsandbytes' GPU kernels are refused."""
        if isinstance(config, PackedConfig):
            return config
        if not config.load_in_4bit and not config.load_in_8bit:
            raise ConfigError(
                "BitsAndBytesConfig asks for neither load_in_4bit nor load_in_8bit; set one of them to True, "
                "or leave quantization_config out."
            )
        if config.llm_int8_has_fp16_weight:
            raise ConfigError(
                "llm_int8_has_fp16_weight=True keeps the weights in 16 bits for bitsandbytes' GPU training; "
                "leave it out, or load the model without quantization_config."
            )
        if config.llm_int8_enable_fp32_cpu_offload:
            raise ConfigError(
                "llm_int8_enable_fp32_cpu_offload=True leaves the modules of a CPU unquantized, because bitsandbytes "
                "needs a GPU; ours run on both, so leave it out."
            )
        if config.load_in_8bit:
            return cls("int8", skip_modules=config.llm_int8_skip_modules)
        if config.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ConfigError(f"bnb_4bit_quant_type {shown(config.bnb_4bit_quant_type)} is unknown; choose nf4 or fp4.")
        if config.bnb_4bit_quant_storage != torch.uint8:
            raise ConfigError(
                f"bnb_4bit_quant_storage {config.bnb_4bit_quant_storage} is not supported: packed weights are stored "
                "as torch.uint8, so leave it out."
            )
        return cls(
            config.bnb_4bit_quant_type,
            double_quant=config.bnb_4bit_use_double_quant,
            compute_dtype=str(config.bnb_4bit_compute_dtype).removeprefix("torch."),
            skip_modules=config.llm_int8_skip_modules,
        )

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds; the constructor takes the same names."""
        if self.layout is not None:
            chosen = {} if self.compute_dtype is None else {"compute_dtype": self.compute_dtype}
            return self.layout.to_dict() | chosen
        return {
            "quant_method": self.quant_method,
            "weight_format": self.weight_format,
            "double_quant": self.bnb_4bit_use_double_quant,
            "compute_dtype": self.compute_dtype,
            "skip_modules": self.llm_int8_skip_modules,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: every value matters to a reader of packed files."""
        return self.to_dict()


class PackWeights(ConversionOps):
    """Encodes what the loader has read for one parameter into the parts of its packed module."""

    def convert(self, input_dict: dict[str, Any], *, model: nn.Module, **context: Any) -> dict[str, Tensor]:
        """{full parameter name: weight} -> {full name of each part: tensor}."""
        packed: dict[str, Tensor] = {}
        for full_name in list(input_dict):
            value = input_dict.pop(full_name)  # so that the unpacked weight dies with this iteration
            module, name = get_module_from_name(model, full_name)
            value = value[0] if isinstance(value, list) else value
            expected = (*module.stack, *module.shapes[name])
            if value.shape != expected:
                raise CheckpointError(f"{full_name} is {tuple(value.shape)} and the configuration says {expected}.")
            parts = module.encode(name, value)
            del value
            prefix = full_name.removesuffix(name)
            packed |= {prefix + part: nn.Parameter(t, requires_grad=False) for part, t in parts.items()}
        return packed


class PackedQuantizer(HfQuantizer):
    """Swaps packed modules in before weights load, and encodes weights that are not packed yet."""

    requires_calibration = False
    quantization_config: PackedConfig

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        """Without a device map a GPU is used if there is one, as transformers does for bitsandbytes."""
        if device_map is None and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    def validate_environment(self, *, device_map: Any = None, **context: Any) -> None:
        """Refuse disk offloading: transformers' loader would write those weights to the disk unpacked."""
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError(
                "Weights cannot be quantized on their way to disk; load the model without offloading, save it with "
                "save_pretrained, and load that with this device_map."
            )

    def param_needs_quantization(self, model: Any, param_name: str, **context: Any) -> bool:
        """Whether a weight of this name is packed."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, PackedModule) and name in module.shapes

    def get_quantize_ops(self) -> ConversionOps:
        """What the loader calls on weights that are not packed yet."""
        return PackWeights()

    def is_serializable(self) -> bool:
        """Packed parameters are saved like any others."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: gradients reach adapters through packed layers."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **context: Any) -> Any:
        config = self.quantization_config
        skipped = self.get_modules_to_not_convert(model, config.llm_int8_skip_modules, model._keep_in_fp32_modules)
        if not any(isinstance(module, Experts) for module in model.modules()):
            raise ConfigError(
                f"{type(model).__name__} cannot load weights that olmoe packed; use the class of that name in olmoe."
            )
        pack(model, config, skipped)
        for module in model.modules():
            if isinstance(module, PackedExperts):
                describe(module, model.config)
        return model

    def _process_model_after_weight_loading(self, model: Any, **context: Any) -> Any:
        four_bit = self.quantization_config.load_in_4bit
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = four_bit, not four_bit
        # Other parts of transformers ask for this method by name before they would cast weights.
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        # Packed stacks are saved under their own names, not taken apart expert by expert.
        model._weight_conversions = []
        notice_adapters()
        head = model.get_output_embeddings()
        if (shown := shown_head(head)) is not head:
            model.set_output_embeddings(shown)
        norm = model.base_model.norm.weight
        for module in model.modules():
            if isinstance(module, PackedModule):
                module.plain = (norm,)
                for name, parameter in module.named_parameters(recurse=False):
                    parameter.requires_grad_(_is_plain(module, name))
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ConfigError(
                "A model that is partly offloaded cannot be dequantized; load it without a device_map that offloads."
            )
        unpack(model, dtype or model.dtype)
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
        del model._weight_conversions
        return model


def pack(model: nn.Module, config: PackedConfig, skipped: list[str]) -> None:
    """Replace modules whose matrices will be packed with packed ones, which have no values yet.

    Layouts of packed checkpoints say which matrices are packed, embeddings and head included, and decode to fp32; with
    other formats all `Linear` and `Experts` modules are packed except those that match a pattern in `skipped`.
    """
    prefix = "" if hasattr(model, "model") else "model."
    compute_dtype = None if config.compute_dtype is None else _COMPUTE_DTYPES[config.compute_dtype]
    if config.layout is not None:
        pack_modules(model, config.layout, prefix, compute_dtype or torch.float32)
        return
    names = [
        f"{prefix}{name}.{matrix}"
        for name, module in model.named_modules()
        if isinstance(module, Linear | Experts) and should_convert_module(name, skipped)
        for matrix in ((GATE_UP, DOWN) if isinstance(module, Experts) else ("weight",))
    ]
    layout = SavedLayout(config.weight_format, config.bnb_4bit_use_double_quant, compute_dtype, frozenset(names))
    pack_modules(model, layout, prefix, compute_dtype)


def _packed_matrices(module: nn.Module) -> list[str]:
    """Names of a module's parameters that hold the codes of packed matrices."""
    return list(module.shapes) if isinstance(module, PackedModule) else []


def _is_plain(module: nn.Module, name: str) -> bool:
    """Whether a module's own parameter is an ordinary one: not codes, scales or any other part of a format."""
    return not any(name == matrix or name.startswith(f"{matrix}_") for matrix in _packed_matrices(module))


def unpack(model: Any, dtype: torch.dtype) -> None:
    """Put back plain `Linear` and `Experts` modules with the decoded weights; adapters around them are kept."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedModule):
            model.set_submodule(name, plain_module(module, dtype))
    if model.config.tie_word_embeddings and hasattr(model, "lm_head"):
        unwrapped(model.lm_head).weight = unwrapped(model.get_input_embeddings()).weight


class PackedLoading:
    """Mixed into our pre-trained classes: a `from_pretrained` that packs, and a parameter count that knows of it."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        found = getattr(config, "quantization_config", None)
        if isinstance(found, BitsAndBytesConfig) and not isinstance(found, PackedConfig):
            raise ConfigError(
                "This checkpoint was quantized by bitsandbytes itself; load the unquantized one with "
                "quantization_config=BitsAndBytesConfig(...), which quantizes the experts too."
            )
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # transformers' class follows

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Self:
        """See transformers' documentation. `BitsAndBytesConfig` quantizes the experts too (`olmoe.hf.quantization`)."""
        _register()
        asked = kwargs.get("quantization_config")
        if isinstance(asked, dict) and (
            asked.get("load_in_4bit") or asked.get("load_in_8bit") or asked.get("quant_method") == "bitsandbytes"
        ):
            asked = BitsAndBytesConfig.from_dict(asked)
        if isinstance(asked, BitsAndBytesConfig):
            kwargs["quantization_config"] = PackedConfig.translate(asked)
        config: Any = kwargs.get("config")
        if isinstance(getattr(config, "quantization_config", None), PackedConfig):
            # It comes from a model that was loaded before; transformers expects what a file would hold.
            kwargs["config"] = config = copy.copy(config)
            config.quantization_config = config.quantization_config.to_dict()
        name = folder_or_id(pretrained_model_name_or_path)
        return super().from_pretrained(name, *model_args, **kwargs)  # type: ignore[misc]

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """transformers' hook that applies parallelism to a new model; its plans cannot shard packed weights."""
        if mesh_manager is not None and any(isinstance(module, PackedModule) for module in model.modules()):
            raise ConfigError(
                "A quantized model cannot be distributed over processes; leave out quantization_config, or tp_plan and "
                "distributed_config."
            )
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)  # type: ignore[misc]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """transformers' hook that initialises what a checkpoint lacks; packed weights cannot be initialised."""
        if isinstance(module, PackedModule):
            for name, parameter in module.named_parameters(recurse=False):
                # Weights that are offloaded to disk are on the meta device here.
                if name != "bias" and not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False):
                    raise CheckpointError(
                        f"The checkpoint lacks {name} ({module.extra_repr()}), and quantized weights cannot start from "
                        "random ones; check that the folder is complete and belongs to this configuration."
                    )
        super()._initialize_weights(module, is_custom_code)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """See transformers' documentation. A packed checkpoint only says how whole kinds of modules are packed."""
        assert isinstance(self, nn.Module)
        trained = [name for name, module in self.named_modules() if isinstance(module, Trained)]
        adapters = getattr(self, "_hf_peft_config_loaded", False)  # only they are saved
        if trained and not adapters and any(isinstance(module, PackedModule) for module in self.modules()):
            raise ConfigError(
                f"{trained[0]} was trained as a whole and is not packed, so it cannot be saved among packed ones; call "
                "dequantize() on the model first."
            )
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """See transformers' documentation. Rows cannot be added to packed embeddings or removed from them."""
        embeddings: Any = self.get_input_embeddings()  # type: ignore[attr-defined]
        table = unwrapped(embeddings)
        asked = new_num_tokens if new_num_tokens is not None or not (args or kwargs) else "padded"
        if isinstance(table, PackedEmbedding):
            if asked in (None, table.num_embeddings):
                return embeddings
            raise ConfigError(
                f"The embeddings are packed as {table.formats['weight'].name}, so their {table.num_embeddings} rows "
                f"cannot become {asked}; call dequantize() on the model first, or resize the unquantized model."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)  # type: ignore[misc]

    def get_submodule(self, target: str) -> nn.Module:
        """See `nn.Module`. PEFT first asks for embeddings by BERT's name; its guess at ours fails for packed ones."""
        assert isinstance(self, nn.Module)
        if target == "embeddings.word_embeddings":
            embeddings: nn.Module = self.get_input_embeddings()  # type: ignore[operator]
            if isinstance(unwrapped(embeddings), PackedModule):
                return embeddings
        return super().get_submodule(target)  # type: ignore[misc]

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """See transformers' documentation. Packed weights count as the weights they encode."""
        assert isinstance(self, nn.Module)
        embeddings = [m for m in self.modules() if isinstance(m, nn.Embedding)] if exclude_embeddings else []
        excluded = {id(p) for module in embeddings for p in module.parameters()}
        total = 0
        for module in self.modules():
            codes = {id(module._parameters[name]): name for name in _packed_matrices(module)}
            others = {id(p) for name, p in module.named_parameters(recurse=False) if not _is_plain(module, name)}
            for parameter in module.parameters(recurse=False):
                if id(parameter) in excluded or id(parameter) in others - codes.keys():
                    continue
                excluded.add(id(parameter))  # tied weights count once
                if id(parameter) in codes:
                    assert isinstance(module, PackedModule)
                    count = prod(module.stack) * prod(module.shapes[codes[id(parameter)]])
                else:
                    count = parameter.numel()
                if parameter.requires_grad or not only_trainable:
                    total += count
        return total


def _register() -> None:
    """Register the method of packed files with transformers' loader."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(PackedQuantizer)
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(PackedConfig)
