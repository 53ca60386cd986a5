"""Held-out evaluation: bits per byte of text, and how the experts share the load."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from olmoe import ops
from olmoe.model import CausalLM
from olmoe.runtime import no_grad
from olmoe.train.data import TokenFile, Tokens
from olmoe.train.document_mask import positions_and_attention
from olmoe.train.ranks import ALONE, Ranks

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Evaluation:
    """One file's result.

    `bits_per_byte` divides the bits of all predicted tokens, EOS included, by the UTF-8 bytes of the
    documents (nan for token files whose text is unknown); `loss` is nats per token. `counts_LE` counts the
    tokens that each expert of each layer received.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    counts_LE: Tensor


@no_grad  # not inference mode: sharded parameters gathered in it could not be trained
def evaluate(
    model: CausalLM,
    file: TokenFile,
    tokens: Tokens,
    length: int,
    windows: int = 0,
    ranks: Ranks = ALONE,
    eos_id: int | None = None,
) -> Evaluation:
    """Predict a token file in consecutive windows of `length` inputs, or in `windows` of them (0: all).

    Every token but the file's first is predicted once, from the tokens before it in its window. A partial
    last window is included if all windows are requested. Fewer are taken at even distances over the whole
    file, since its start can be much easier than the rest. With `eos_id` each token is predicted from its own document
    alone, and a document's first from the end of the one before, as in training. `ranks` share the windows; each gets
    the whole result.
    """
    config, device = model.config, next(model.parameters()).device
    total = len(tokens) - 1
    chosen = _windows(total, length, windows)
    predicted = sum(min(start + length, total) - start for start in chosen)
    nats, counts_LE = 0.0, torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.long, device=device)
    for starts, counts in ranks.share(_batches(chosen, total, length)):
        rows = [torch.from_numpy(tokens[s : min(s + length, total) + 1].astype("int64")) for s in starts]
        ids = torch.stack(rows).to(device)
        inputs, labels = ids[:, :-1], ids[:, 1:]
        positions, attend = positions_and_attention(inputs, eos_id, model.lm_head.products)
        output = model(inputs, positions, attend)
        if not counts:
            continue
        nats += float(
            ops.linear_cross_entropy(
                output.hidden.flatten(0, 1), model.lm_head.weight, labels.flatten(), products=model.lm_head.products
            )
        )
        for layer, router in enumerate(output.routers):
            counts_LE[layer] += torch.bincount(router.expert_ids.flatten(), minlength=config.num_experts)
    (nats,) = ranks.sum(torch.tensor([nats], dtype=torch.float64)).tolist()
    counts_LE = ranks.sum(counts_LE)
    # A share of the file counts the same share of its bytes.
    text_bytes = math.nan if file.text_bytes is None else file.text_bytes * predicted / total
    return Evaluation(nats / predicted, nats / math.log(2) / text_bytes, predicted, counts_LE.cpu())


def evaluate_all(
    model: CausalLM,
    held_out: list[tuple[TokenFile, Tokens]],
    length: int,
    windows: int,
    ranks: Ranks = ALONE,
    eos_id: int | None = None,
) -> dict[str, Evaluation]:
    """`evaluate` each held-out file; results are by file name."""
    return {file.name: evaluate(model, file, tokens, length, windows, ranks, eos_id) for file, tokens in held_out}


def summary(results: dict[str, Evaluation]) -> dict[str, dict[str, float | None]]:
    """Loss and bits per byte by file, as metrics records hold them; null for bits of unknown bytes."""
    bits = {name: r.bits_per_byte for name, r in results.items()}
    return {
        "held_out_loss": {name: round(r.loss, 5) for name, r in results.items()},
        "bits_per_byte": {name: round(b, 5) if math.isfinite(b) else None for name, b in bits.items()},
    }


def _windows(total: int, length: int, windows: int) -> list[int]:
    """Starts of the windows to predict, `windows` of them at even distances, or all."""
    full = total // length
    if windows == 0 or windows > full:
        return list(range(0, total, length))
    return [i * full // windows * length for i in range(windows)]


def _batches(starts: list[int], total: int, length: int) -> list[list[int]]:
    """Windows that fit one batch; a shorter last window is a batch of its own."""
    full = [start for start in starts if start + length <= total]
    size = max(1, BATCH_TOKENS // length)
    batches = [full[i : i + size] for i in range(0, len(full), size)]
    return batches if len(full) == len(starts) else [*batches, starts[-1:]]
