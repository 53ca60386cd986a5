"""Adapters in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.

PEFT stores a stack of experts as one matrix: A (E * r, C), and B (R, r * E) with the expert's number innermost. Its
experts module wraps the one for `gate_up_proj` in one for `down_proj`, hence `experts.base_layer` for the former.
The layout "per_expert" has an A and a B for each expert's gate, up and down matrix, as other software needs them; gate
and up then share A.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from olmoe.adapters.adapter import TARGETS, Adapter, Factors
from olmoe.config import ModelConfig
from olmoe.errors import CheckpointError, shown
from olmoe.io.json_file import read_optional_object
from olmoe.weights.export import save_tensors
from olmoe.weights.names import DOWN, EXPERTS, GATE_UP, parameter_shapes

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
LAYOUTS = ("fused", "per_expert")
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
_ONE_EXPERT = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj")
# Other features of PEFT that would change the numbers.
_PLAIN = {
    "use_dora": False, "bias": "none", "lora_bias": False, "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "layer_replication": None, "alora_invocation_tokens": None, "use_qalora": False,
    "trainable_token_indices": None, "arrow_config": None,
}  # fmt: skip
# Ways to begin that take away from the model's weights what the adapter starts with.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (Path(folder) / CONFIG_NAME).is_file()


def base_of(folder: str | Path) -> str:
    """The model that the adapter in a folder names as its base. Raises `CheckpointError` if it names none."""
    settings = _read_config(Path(folder).expanduser())
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{folder} does not name the model that it adapts; give that model as well.")
    return base


def _read_config(folder: Path) -> dict[str, Any]:
    if not is_adapter(folder):
        best = folder / "best"  # of a run of `olmoe sft`
        remedy = f"give {best}" if is_adapter(best) else "give the folder of one"
        raise CheckpointError(f"{folder} holds no adapter: there is no {CONFIG_NAME} in it; {remedy}.")
    return read_optional_object(folder / CONFIG_NAME, CheckpointError)


def read_adapter(folder: str | Path, config: ModelConfig) -> Adapter:
    """The LoRA adapter in a folder, for a model of this configuration.

    Raises `CheckpointError` if there is none, or if it belongs to another model.
    """
    folder = Path(folder).expanduser()
    settings = _read_config(folder)
    rank, alpha = _rank_and_alpha(settings, folder)
    try:
        tensors = load_file(folder / WEIGHTS_NAME)
    except FileNotFoundError:
        raise CheckpointError(f"There is no {folder / WEIGHTS_NAME}, which an adapter needs.") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_NAME} cannot be read ({str(error).rstrip('.')}).") from None
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key.removeprefix(_PREFIX))
        if match is None:
            raise CheckpointError(f"{folder} has the tensor {shown(key)}, which is not LoRA of OLMoE.")
        pairs.setdefault(match["module"], {})[match["factor"]] = value
    _check_rank(pairs, rank, config, folder)
    factors = _one_by_one(pairs, config, folder) | _fused(pairs, config, folder)
    if not factors:
        raise CheckpointError(f"{folder / WEIGHTS_NAME} holds no adapted matrix.")
    shapes = parameter_shapes(config)
    for name, (a, b) in factors.items():
        shape = shapes.get(name, ())
        *stack, rows, columns = shape if len(shape) > 1 else (0, 0)
        if tuple(a.shape) != (*stack, a.shape[-2], columns) or tuple(b.shape) != (*stack, rows, a.shape[-2]):
            raise CheckpointError(
                f"{folder} does not fit this model: its factors of {name} are {list(a.shape)} and {list(b.shape)}."
            )
    return Adapter(rank, alpha, factors)


def write_adapter(adapter: Adapter, folder: Path, base: str, layout: str = "fused") -> None:
    """Write an adapter into an existing folder; `base` names the model that it belongs to.

    Raises `CheckpointError` if its matrices differ in rank, since it could not be read back.
    """
    for name, (a, _) in adapter.factors.items():
        if a.shape[-2] != adapter.rank:
            raise CheckpointError(
                f"The adapter's factors of {name} have the rank {a.shape[-2]} and not {adapter.rank}, which the file "
                "cannot say; merge it instead."
            )
    tensors = fused_tensors(adapter) if layout == "fused" else per_expert_tensors(adapter)
    named = {_PREFIX + key: value.contiguous() for key, value in tensors.items()}
    save_tensors(named, folder / WEIGHTS_NAME, {"format": "pt"})
    text = json.dumps(_settings(adapter, base, layout), indent=2, sort_keys=True)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def fused_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """PEFT's tensors of the layout "fused", without their common prefix."""
    tensors = {}
    for name, (a, b) in adapter.factors.items():
        owner, _, leaf = name.rpartition(".")
        if a.dim() == 3:
            inner = leaf == GATE_UP and f"{owner}.{DOWN}" in adapter.factors
            module = f"{owner}.base_layer" if inner else owner
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        else:
            module = owner
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a.cpu(), b.cpu()
    return tensors


def per_expert_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """PEFT's tensors with a module for each matrix of each expert, without their common prefix."""
    tensors = {}
    for name, (a, b) in adapter.factors.items():
        owner, _, leaf = name.rpartition(".")
        if a.dim() == 2:
            parts = {owner: (a, b)}
        elif leaf == DOWN:
            parts = {f"{owner}.{e}.down_proj": (a[e], b[e]) for e in range(len(a))}
        else:
            gate, up = b.chunk(2, dim=1)
            parts = {f"{owner}.{e}.gate_proj": (a[e], gate[e]) for e in range(len(a))}
            parts |= {f"{owner}.{e}.up_proj": (a[e].clone(), up[e]) for e in range(len(a))}
        for module, (left, right) in parts.items():
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = left.cpu(), right.cpu()
    return tensors


def _settings(adapter: Adapter, base: str, layout: str) -> dict[str, Any]:
    ends = [end for ends in TARGETS.values() for end in ends if any(name.endswith(end) for name in adapter.factors)]
    modules = [end.split(".")[1] for end in ends if end.startswith("self_attn")]
    parameters = [end for end in ends if not end.startswith("self_attn")]
    if layout == "per_expert":
        parts = {GATE_UP: ["gate_proj", "up_proj"], DOWN: ["down_proj"]}
        modules += [part for leaf, names in parts.items() if f"{EXPERTS}.{leaf}" in ends for part in names]
        modules += ["gate"] if TARGETS["router"][0] in ends else []
        parameters = []
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": adapter.rank,
        "target_modules": modules,
        "target_parameters": parameters or None,
        "task_type": "CAUSAL_LM",
    }


def _rank_and_alpha(settings: dict[str, Any], folder: Path) -> tuple[int, float]:
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{folder} holds an adapter of the type {shown(settings.get('peft_type'))}; only LORA is read."
        )
    for key, plain in _PLAIN.items():
        if settings.get(key) not in (plain, None):
            raise CheckpointError(
                f"{folder} has {key} = {shown(settings[key])}, which is not supported; merge it with PEFT first."
            )
    begun = settings.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{folder} has init_lora_weights = {shown(begun)}, which changes the model's own weights as well; merge it "
            "with PEFT first."
        )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1 or not math.isfinite(alpha):
        raise CheckpointError(f"{folder / CONFIG_NAME} has r = {shown(rank)} and lora_alpha = {shown(alpha)}.")
    # The scale of rank-stabilised LoRA is alpha / sqrt(r).
    return rank, float(alpha) * (rank**0.5 if settings.get("use_rslora") else 1.0)


def _check_rank(pairs: dict[str, dict[str, Tensor]], rank: int, config: ModelConfig, folder: Path) -> None:
    """Refuse factors of another rank than the settings', by which alpha is divided."""
    for module, pair in pairs.items():
        a, _ = _pair(pair, module, folder)
        stack = config.num_experts if module.removesuffix(".base_layer").endswith(EXPERTS) else 1
        if len(a) % stack == 0 and len(a) != stack * rank:
            raise CheckpointError(
                f"{folder} has factors of {module} of the rank {len(a) // stack}, but {CONFIG_NAME} says r = {rank}."
            )


def _fused(pairs: dict[str, dict[str, Tensor]], config: ModelConfig, folder: Path) -> dict[str, Factors]:
    """Matrices and stacks as PEFT stores them."""
    factors, e = {}, config.num_experts
    for module, pair in pairs.items():
        if _ONE_EXPERT.fullmatch(module):
            continue
        a, b = _pair(pair, module, folder)
        if not module.removesuffix(".base_layer").endswith(EXPERTS):
            factors[f"{module}.weight"] = Factors(a, b)
            continue
        owner = module.removesuffix(".base_layer")
        leaf = DOWN if b.shape[0] == config.hidden_size and a.shape[1] == config.intermediate_size else GATE_UP
        if a.shape[0] % e or b.shape[1] != a.shape[0]:
            raise CheckpointError(f"{folder} does not fit this model: {module} has no factors of {e} experts.")
        rank = a.shape[0] // e
        stack = b.reshape(b.shape[0], rank, e).permute(2, 0, 1).contiguous()
        factors[f"{owner}.{leaf}"] = Factors(a.reshape(e, rank, -1), stack)
    return factors


def _one_by_one(pairs: dict[str, dict[str, Tensor]], config: ModelConfig, folder: Path) -> dict[str, Factors]:
    """Stacks of experts from separate modules for each matrix; experts without one get zeros."""
    found: dict[str, dict[str, dict[int, Factors]]] = {}
    for module, pair in pairs.items():
        if match := _ONE_EXPERT.fullmatch(module):
            parts = found.setdefault(match["experts"], {})
            parts.setdefault(match["part"], {})[int(match["expert"])] = _pair(pair, module, folder)
    factors, e = {}, config.num_experts
    d, f = config.hidden_size, config.intermediate_size
    for owner, parts in found.items():
        if odd := [n for part in parts.values() for n in part if n >= e]:
            raise CheckpointError(f"{folder} adapts the expert {odd[0]}, but the model has {e}.")
        if "down" in parts:
            factors[f"{owner}.{DOWN}"] = _stacked(parts["down"], e, d, f)
        if "gate" in parts or "up" in parts:
            halves = [_stacked(parts.get(part, {}), e, f, d) for part in ("gate", "up")]
            factors[f"{owner}.{GATE_UP}"] = _joined(*halves)
    return factors


def _stacked(parts: dict[int, Factors], experts: int, rows: int, columns: int) -> Factors:
    rank = max((part.a.shape[0] for part in parts.values()), default=0)
    a, b = torch.zeros(experts, rank, columns), torch.zeros(experts, rows, rank)
    for e, (left, right) in parts.items():
        a[e, : left.shape[0]], b[e, :, : left.shape[0]] = left, right
    return Factors(a, b)


def _joined(gate: Factors, up: Factors) -> Factors:
    """Factors of gate's rows stacked on up's: of the same rank if they share A, else of the sum of their ranks."""
    if torch.equal(gate.a, up.a):
        return Factors(gate.a, torch.cat((gate.b, up.b), dim=1))
    a = torch.cat((gate.a, up.a), dim=1)
    upper = torch.cat((gate.b, gate.b.new_zeros(*gate.b.shape[:2], up.b.shape[2])), dim=2)
    lower = torch.cat((up.b.new_zeros(*up.b.shape[:2], gate.b.shape[2]), up.b), dim=2)
    return Factors(a, torch.cat((upper, lower), dim=1))


def _pair(pair: dict[str, Tensor], module: str, folder: Path) -> Factors:
    if set(pair) != {"A", "B"} or any(factor.dim() != 2 for factor in pair.values()):
        raise CheckpointError(f"{folder} lacks one of the two factors of {module}.")
    return Factors(pair["A"], pair["B"])
