"""Packing a model: from any weight source into a packed folder, one matrix at a time.

Nothing but one matrix, one expert and the small tensors exists in memory. With calibration text the model runs over
it layer by layer while it is packed: hidden states of all windows wait in memory, a layer's attention is read whole
and its experts one by one, and each matrix is encoded with what is then known about its inputs (`olmoe.quant.search`).

Shapes legend: B windows, T tokens of a window, N tokens, D hidden, E experts, K experts per token, F expert width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from olmoe.config import ModelConfig
from olmoe.errors import CheckpointError, UserError, shown
from olmoe.io import targets
from olmoe.io.atomic import atomic_folder
from olmoe.io.documents import Chat
from olmoe.io.tensor_file import DTYPES, TensorWriter
from olmoe.model import DecoderLayer, RMSNorm, RotaryEmbedding, activation, causal_attend
from olmoe.quant import BlockFormat, Format, layout_formats, search
from olmoe.quant.formats import CODES
from olmoe.quant.modules import part_name
from olmoe.weights import packed, sample_text
from olmoe.weights.checkpoint import Checkpoint
from olmoe.weights.recipes import RECIPES, Recipe
from olmoe.weights.source import BlockSource, WeightSource, open_source, tokenizer_of
from olmoe.weights.table import TensorTable

__all__ = ["RECIPES", "Packed", "Recipe", "contents_of", "describe", "pack", "quantize"]


# Tokens that recipes are calibrated on; more cost time, and hardly help.
CALIBRATION_TOKENS = 8192
WINDOW = 512


@dataclass(frozen=True)
class Packed:
    """What was written: bytes and weights by kind of tensor, and the size of the file."""

    kinds: dict[str, tuple[str, int, int]]  # kind -> its formats, its weights, its bytes
    file_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file for each weight, header and all."""
        return 8 * self.file_bytes / sum(weights for _, weights, _ in self.kinds.values())

    @property
    def formats(self) -> list[str]:
        """The names of all formats that occur."""
        return sorted({name for formats, _, _ in self.kinds.values() for name in formats.split()})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Format, weights and bytes by kind of tensor, for JSON."""
        return {k: {"format": f, "weights": w, "bytes": b} for k, (f, w, b) in self.kinds.items()}

    def table(self) -> str:
        """Kinds of tensors with their formats, weights, bytes and bits a weight, as a Markdown table."""
        lines = ["| tensors | format | weights | bytes | bits a weight |", "| --- | --- | ---: | ---: | ---: |"]
        for kind, (formats, weights, size) in self.kinds.items():
            lines.append(f"| {kind} | {formats} | {weights:,} | {size:,} | {8 * size / weights:.2f} |")
        weights = sum(weights for _, weights, _ in self.kinds.values())
        lines.append(f"| file | | {weights:,} | {self.file_bytes:,} | {self.bits_per_weight:.2f} |")
        return "\n".join(lines)


def quantize(
    source: str | os.PathLike[str] | WeightSource,
    target: str | os.PathLike[str],
    format: str | Recipe = "int4",
    *,
    calibration: str | os.PathLike[str] | Iterable[str | Chat] | None = sample_text.CALIBRATION,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Packed:
    """Pack a model into a folder of fewer bits a weight, which `LLM`, `OlmoeForCausalLM` and all commands load.

    >>> olmoe.quantize("allenai/OLMoE-1B-7B-0924", "olmoe-int4").bits_per_weight     # doctest: +SKIP

    `source` is a checkpoint folder, a hub id (of `revision`, with `token`; `local_files_only` fetches nothing), a .gguf
    file, or a `WeightSource` that is open already. `format` is "int4", "int4-high", "int8", "q4_0", a `Recipe`, or the
    name of a weight format, which then takes every matrix.

    `calibration` is text like that the model will meet, for recipes that choose codes by their effect (int4 and
    int4-high): a file (text, or .jsonl with text or messages), or texts and chats themselves. Default is a short
    public-domain sample; None does without. `progress(done, total)` is called after each matrix, in weights.

    `target` is written whole or not at all. What exists there is refused unless `overwrite`, and then only files of a
    model are replaced. Raises `UserError` subclasses for what is wrong with source, target or text.
    """
    recipe = _recipe(format)
    target = Path(os.path.expanduser(target))
    if not overwrite:  # before a source is fetched
        path = os.path.expanduser(source) if isinstance(source, str | os.PathLike) else source.path
        targets.check_folder(target, (), overwrite=False, source=path)
    if isinstance(source, str | os.PathLike):
        source = open_source(source, revision=revision, token=token, local_files_only=local_files_only)
    # Before hours of work, and without the exception that `pack` makes for its own folders.
    names = {packed.FILE_NAME, "config.json", *source.files()}
    targets.check_folder(target, names, overwrite=overwrite, source=source.path)
    windows = None
    if recipe.searches and calibration is not None:
        windows = _windows(source, calibration)
    return pack(source, target, recipe, windows, progress, overwrite=overwrite)


def _recipe(format: str | Recipe) -> Recipe:
    """The recipe that a name means. Raises `UserError` if it means none."""
    if isinstance(format, Recipe):
        return format
    if isinstance(format, str) and format in RECIPES:
        return RECIPES[format]
    if isinstance(format, str) and format in layout_formats():
        return Recipe(format, format)
    known = dict.fromkeys((*RECIPES, *layout_formats()))
    raise UserError(f"Nothing can be packed as {shown(format)}; choose one of {', '.join(known)}.")


def _windows(source: WeightSource, calibration: str | os.PathLike[str] | Iterable[str | Chat]) -> list[list[int]]:
    """Windows of token ids of calibration text, equally long."""
    tokenizer = tokenizer_of(source)
    if isinstance(calibration, str | os.PathLike):
        ids = sample_text.read_ids(calibration, tokenizer)
    else:
        ids = sample_text.ids_of(calibration, tokenizer)
        if not ids:
            raise UserError("The calibration text is empty; give a few sentences, or calibration=None to do without.")
    length = min(WINDOW, source.config.max_position_embeddings)
    return sample_text.windows(ids, length, CALIBRATION_TOKENS // length)


def pack(
    source: WeightSource,
    target: Path,
    recipe: Recipe,
    calibration: list[list[int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    overwrite: bool = False,
) -> Packed:
    """Write the packed folder `target`, whole or not at all.

    An old packed folder there is replaced if it holds nothing else; another checkpoint only with `overwrite`, and
    never what packing does not write itself.

    `calibration` are windows of token ids (equally long), used by recipes that search. `progress(done, total)` is
    called after each matrix, in weights. Raises `UserError` subclasses for what is wrong with source or target.
    """
    target = Path(os.path.expanduser(target))
    texts = source.files()
    _check_target(source, target, {*texts, packed.FILE_NAME, "config.json"}, overwrite)
    packer = _Packer(source, recipe, progress)
    with atomic_folder(target) as temporary:
        with packed.writer(temporary / packed.FILE_NAME, packer.tensors) as writer:
            packer.run(writer, calibration if recipe.searches else None)
        for name, text in texts.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text, encoding="utf-8")
        norms = packer.tensors["model.norm.weight"][1]
        text = packed.config_text(source.config, recipe.layout(), norms)
        (temporary / "config.json").write_text(text, encoding="utf-8")
        size = (temporary / packed.FILE_NAME).stat().st_size
        # Hours may have passed, in which somebody put something there.
        _check_target(source, target, {*texts, packed.FILE_NAME, "config.json"}, overwrite)
    return describe(packer.table, packer.tensors, size)


def _check_target(source: WeightSource, target: Path, names: set[str], overwrite: bool) -> None:
    """Raise `UserError` if packing into `target` would lose anything; see `pack`."""
    targets.check_is_checkpoint(target, "packing")
    ours = target.is_dir() and (target / "config.json").is_file() and packed.is_packed(target)
    if ours and not overwrite:
        overwrite = not targets.foreign_entries(target, names)
    targets.check_folder(target, names, overwrite=overwrite, source=source.path)


def describe(table: TensorTable, tensors: packed.Tensors, file_bytes: int) -> Packed:
    """What a packed file of the `tensors` of a table holds, by kind."""
    kinds: dict[str, tuple[set[str], int, int]] = {}
    for name, (row, _, _) in table.parts().items():
        (shape, dtype) = tensors[name]
        format = str(dtype).removeprefix("torch.") if row.format is None else row.format.name
        weights = row.weights if name == row.name else 0  # what else it stores stands for none
        formats, others, size = kinds.get(_kind(name), (set(), 0, 0))
        kinds[_kind(name)] = formats | {format}, others + weights, size + math.prod(shape) * dtype.itemsize
    return Packed({k: (" ".join(sorted(f)), w, b) for k, (f, w, b) in kinds.items()}, file_bytes)


def contents_of(checkpoint: Checkpoint) -> Packed:
    """What a packed checkpoint holds, from its headers alone. Raises what loading it would."""
    assert checkpoint.layout is not None, f"{checkpoint.folder} is not packed"
    files = checkpoint.packed_files
    table = packed.check(checkpoint.config, checkpoint.layout, files.entries, files.path)
    tensors = {name: (entry.shape, DTYPES[entry.dtype]) for name, entry in files.entries.items()}
    return describe(table, tensors, files.num_bytes)


def _kind(name: str) -> str:
    """The row of the table that a parameter belongs to."""
    for mark, kind in (
        ("embed_tokens", "embeddings"),
        ("lm_head", "output head"),
        ("_proj.weight", "attention"),
        ("gate_up_proj", "experts, gate and up"),
        ("down_proj", "experts, down"),
        ("mlp.gate", "routers"),
    ):
        if mark in name:
            return kind
    return "norms and biases"


class _Packer:
    """Writes every tensor of one packed file; see the module."""

    def __init__(self, source: WeightSource, recipe: Recipe, progress: Callable[[int, int], None] | None) -> None:
        self.source, self.recipe, self._progress = source, recipe, progress
        self.table = TensorTable(source.config, recipe.layout())
        plain = {name: source.read(name, self._first(name)).dtype for name in self.table if self._format(name) is None}
        self.tensors = packed.file_tensors(self.table, plain)
        self._done, self._total = 0, source.config.num_parameters
        self._left = dict.fromkeys(self.table)

    def run(self, writer: TensorWriter, windows: list[list[int]] | None) -> None:
        """Write all tensors; with windows of token ids, those of the decoder along its forward pass."""
        if windows:
            self._along_forward_pass(writer, torch.tensor(windows))
        for name in list(self._left):
            experts = self.source.config.num_experts if self._first(name) == 0 else None
            for expert in [None] if experts is None else range(experts):
                self.put(writer, name, expert)

    def put(
        self,
        writer: TensorWriter,
        name: str,
        expert: int | None = None,
        weight: Tensor | None = None,
        inputs: search.Inputs | None = None,
    ) -> None:
        """Encode and write one matrix, or one expert's; `weight` is what the source would give, if it was read."""
        format = self._format(name)
        parts = None if format is None else self._stored_parts(name, expert, format)
        if parts is None:
            weight = self.read(name, expert) if weight is None else weight
            parts = {CODES: weight} if format is None else self._encode(name, format, weight, inputs)
        for part, value in parts.items():
            writer.write(part_name(name, part), value, (expert or 0) * value.nbytes)
        self._left.pop(name, None)
        self._done += math.prod(self.source_shape(name))
        if self._progress is not None:
            self._progress(self._done, self._total)

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """What the source gives. Raises `CheckpointError` for a weight that is not finite."""
        weight = self.source.read(name, expert)
        if not all(map(torch.isfinite, torch.aminmax(weight))):
            raise CheckpointError(f"{name} holds values that are not finite; check the checkpoint.")
        return weight

    def source_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a matrix (of one expert's, in a stack) or vector before packing."""
        return self.table[name].shape

    def _encode(self, name: str, format: Format, weight: Tensor, inputs: search.Inputs | None) -> dict[str, Tensor]:
        try:
            if self.recipe.searches and isinstance(format, BlockFormat):
                return {CODES: search.encode(format, weight, inputs)}
            return format.encode(weight)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None

    def _format(self, name: str) -> Format | None:
        return self.table[name].format

    def _stored_parts(self, name: str, expert: int | None, format: Format) -> dict[str, Tensor] | None:
        """The parts of a matrix that its source stores in this format already."""
        source = self.source
        if not isinstance(source, BlockSource) or not isinstance(format, BlockFormat):
            return None
        if set(source.stored_as(name)) != {format.name.upper()}:
            return None
        return {CODES: format.from_gguf(torch.from_numpy(np.array(source.blocks(name, expert))))}

    def _first(self, name: str) -> int | None:
        """0 for a stack of experts, which is read one by one; None for others."""
        return None if self.table[name].experts is None else 0

    # ---- with calibration text ----

    @torch.inference_mode()
    def _along_forward_pass(self, writer: TensorWriter, ids_BT: Tensor) -> None:
        """Run the unquantized model over windows (B, T), writing each matrix when its inputs are known."""
        config = self.source.config
        embedding = self.read("model.embed_tokens.weight")
        x_BTD = embedding[ids_BT].float()
        self.put(writer, "model.embed_tokens.weight", weight=embedding)
        del embedding
        positions = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
        rope = RotaryEmbedding(config.rope, config.head_dim, config.max_position_embeddings)(positions)
        for i in range(config.num_hidden_layers):
            prefix = f"model.layers.{i}."
            experts = _StreamedExperts(self, writer, f"{prefix}mlp.experts.", config)
            layer, inputs = self._layer(i, prefix, experts)
            x_BTD, _ = layer(x_BTD, rope, causal_attend)
            for which, watched in (("q", "q"), ("k", "q"), ("v", "q"), ("o", "o")):
                name = f"{prefix}self_attn.{which}_proj.weight"
                self.put(writer, name, inputs=inputs[watched])
        if not config.tie_word_embeddings:
            norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            norm.weight = nn.Parameter(self.read("model.norm.weight").float())
            self.put(writer, "lm_head.weight", inputs=_inputs(norm(x_BTD).flatten(0, 1)))

    def _layer(self, i: int, prefix: str, experts: nn.Module) -> tuple[DecoderLayer, dict[str, search.Inputs]]:
        """A block with its weights in fp32, and what a forward pass leaves about the inputs of attention."""
        with torch.device("meta"):
            layer = DecoderLayer(self.source.config, i)
        layer.mlp.experts = experts  # type: ignore[assignment]  # the same call
        for name, _ in list(layer.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            value = nn.Parameter(self.read(prefix + name).float(), requires_grad=False)
            setattr(layer.get_submodule(owner), leaf, value)
        seen: dict[str, search.Inputs] = {}

        def watch(which: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                seen[which] = _inputs(inputs[0].flatten(0, -2))

            return hook

        layer.self_attn.q_proj.register_forward_pre_hook(watch("q"))  # k and v have the same inputs
        layer.self_attn.o_proj.register_forward_pre_hook(watch("o"))
        return layer, seen


class _StreamedExperts(nn.Module):
    """`Experts` whose weights are read one expert at a time, used, and written packed."""

    def __init__(self, packer: _Packer, writer: TensorWriter, prefix: str, config: ModelConfig) -> None:
        super().__init__()
        self._packer, self._writer, self._prefix = packer, writer, prefix
        self._count, self._activation = config.num_experts, activation(config.hidden_act)

    def forward(self, x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """x (N, D), expert ids and weights (N, K) -> (N, D)."""
        packer, writer = self._packer, self._writer
        gate_up_name, down_name = f"{self._prefix}gate_up_proj", f"{self._prefix}down_proj"
        # Of all tokens: an expert's own inputs are few, and hardly different.
        inputs = _inputs(x_ND)
        out_ND = torch.zeros_like(x_ND)
        for e in range(self._count):
            gate_up, down = packer.read(gate_up_name, e), packer.read(down_name, e)
            tokens, ranks = (expert_ids_NK == e).nonzero(as_tuple=True)
            gate, up = (x_ND[tokens] @ gate_up.float().T).chunk(2, dim=-1)
            hidden = self._activation(gate).mul_(up)
            y = (hidden @ down.float().T).mul_(weights_NK[tokens, ranks].unsqueeze(1))
            out_ND.index_add_(0, tokens, y)
            packer.put(writer, gate_up_name, e, gate_up, inputs)
            packer.put(writer, down_name, e, down, _inputs(hidden) if len(tokens) else None)
        return out_ND


def _inputs(x: Tensor) -> search.Inputs:
    """What is known of inputs (N, C): E[x x^T]."""
    return search.Inputs(x.T @ x / len(x))
