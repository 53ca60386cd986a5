"""What a forward pass derives from its inputs before the first layer: positions, masks; and what it keeps at the end.

Shapes legend: B batch, T sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.utils.import_utils import is_tracing

from olmoe.errors import UserError
from olmoe.hf.cache_name import CACHE, is_paged


def positions_of(x: Tensor, given: Tensor | None, cache_position: Tensor | None, cache: Any) -> Tensor:
    """The positions (B or 1, T) of x (B, T, D): those given, or the next ones after what is cached."""
    if given is not None:
        return given
    if cache_position is not None:
        return cache_position.unsqueeze(0)
    seen = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(x.shape[1], device=x.device) + seen).unsqueeze(0)


def causal_mask(
    config: Any,
    x: Tensor,
    mask: Any,
    cache: Any,
    positions: Tensor,
    options: Mapping[str, Any],
    made: bool,
    given: bool,
) -> Any:
    """The mask of this pass in the form that `config`'s attention implementation takes; None for a plain causal one.

    x (B, T, D); `mask` and `options` are the caller's, as are `positions` (B or 1, T) if `given`, and the cache unless
    it was `made` for this pass.
    Texts that share a row, with positions that start again, do not see each other, whatever cache or mask there is.
    Raises `UserError` if they cannot be kept apart.
    """
    if is_paged(cache):
        return mask
    if not options.get("is_causal", True):
        return create_bidirectional_mask(config, x, mask, **{CACHE: cache})
    flash = "flash" in str(config._attn_implementation)
    texts = texts_of(x, mask, cache, positions if given else None, options, made)
    if texts is None or (flash and len(x) == 1):  # flash attention reads the positions itself
        return create_causal_mask(config, x, mask, cache, position_ids=positions)
    if flash:
        raise UserError(
            f"{config._attn_implementation} cannot keep apart the texts in {len(x)} rows of a batch whose positions "
            "start again; give one row, or call model.set_attn_implementation('sdpa') first."
        )
    last = texts.shape[1] - 1

    def same_text(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return texts[batch, query] == texts[batch, key.clamp(max=last)]  # a static cache has empty slots at its end

    # Without positions: transformers would look for texts in them itself.
    return create_causal_mask(config, x, mask, cache, position_ids=None, and_mask_function=same_text)


def texts_of(
    x: Tensor, mask: Any, cache: Any, positions: Tensor | None, options: Mapping[str, Any], made: bool
) -> Tensor | None:
    """The number of the text (B, T) that each token belongs to, if a row holds several; None if no row does.

    Also None where transformers' own rule applies: without mask and cache it reads the positions itself, and a mask of
    four dimensions is used as the caller gave it.
    """
    batch, count = x.shape[:2]
    if count < 2 or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)):
        return None
    if (numbers := _numbered(options, batch, count, x.device)) is not None:
        return numbers if cache is None or made or not int(cache.get_seq_length()) else None
    if positions is None or positions.dim() != 2 or (mask is None and cache is None):
        return None
    tracing = is_tracing(positions)
    if tracing and not (cache is None or made):
        return None  # whether positions start again cannot be determined
    restarts_BT = restarts(positions.expand(batch, -1), mask)
    if tracing:
        return restarts_BT.cumsum(-1)
    if not bool(restarts_BT.any()):
        return None
    if cache is not None and int(cache.get_seq_length()):
        raise UserError(
            f"position_ids start again within a row, but the cache holds {int(cache.get_seq_length())} tokens that "
            "only its first text continues; give texts that share a row without a cache."
        )
    return restarts_BT.cumsum(-1)


def _numbered(options: Mapping[str, Any], batch: int, count: int, device: torch.device) -> Tensor | None:
    """The number of each token's text (B, T), from what transformers' flattening collator adds for flash kernels."""
    numbers, ends = options.get("seq_idx"), options.get("cu_seq_lens_q")
    if isinstance(numbers, Tensor) and numbers.shape == (batch, count):
        return numbers.to(device)
    if isinstance(ends, Tensor) and batch == 1:
        return torch.searchsorted(ends.to(device)[1:], torch.arange(count, device=device), right=True).unsqueeze(0)
    return None


def restarts(positions_BT: Tensor, mask: Tensor | None) -> Tensor:
    """Where a token's position is not larger than that of the token before it (B, T). Padding is ignored."""
    batch, count = positions_BT.shape
    index_T = torch.arange(count, device=positions_BT.device)
    if mask is None:
        real_BT = torch.ones_like(positions_BT, dtype=torch.bool)
    else:
        real_BT = mask[:, -count:].to(positions_BT.device).bool()
    latest_BT = torch.where(real_BT, index_T, -1).cummax(-1).values
    before_BT = torch.cat([latest_BT.new_full((batch, 1), -1), latest_BT[:, :-1]], dim=1)
    position_before_BT = positions_BT.gather(1, before_BT.clamp(min=0))
    return real_BT & (before_BT >= 0) & (positions_BT <= position_before_BT)


def kept(hidden: Tensor, logits_to_keep: Any) -> Tensor:
    """The positions whose logits are wanted: the last n (0: all), a slice, or those of an index tensor.

    A tensor has one index for all rows, indices for each row, or (bool) marks which positions of each row to keep.
    """
    if isinstance(logits_to_keep, Tensor) and logits_to_keep.dim() == 2:
        if logits_to_keep.dtype == torch.bool:
            return hidden[logits_to_keep]
        return torch.take_along_dim(hidden, logits_to_keep[..., None], dim=1)
    return hidden[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
