"""From a prompt's ids and parameters to a `Request`, or to one sentence that says why there is none. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from olmoe.config import ModelConfig
from olmoe.engine.request import Request
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import UserError
from olmoe.tokenizer import Tokenizer

if TYPE_CHECKING:
    from olmoe.runner.policy import ResolvedPolicy


def new_request(
    prompt_ids: list[int],
    params: SamplingParams,
    config: ModelConfig,
    tokenizer: Tokenizer,
    context_length: int,
    *,
    where: str = "",
    priority: int = 0,
    cache_salt: str = "",
    router_policy: ResolvedPolicy | None = None,
) -> Request:
    """A request that the model can run. Raises `UserError` for one that it never can.

    If the context has no room for all new tokens, the request's `limit` says how many there will be.
    `router_policy` applies if the parameters have none.
    """
    known = tokenizer.vocab_size
    if not prompt_ids:
        raise UserError("The prompt is empty; give at least one character.")
    room = context_length - len(prompt_ids)
    if room < 1:  # before all its ids are checked, which may be millions
        raise UserError(
            f"The prompt has {len(prompt_ids)} tokens, but the model's context ends at {context_length}; shorten it."
        )
    if min(prompt_ids) < 0 or max(prompt_ids) >= config.vocab_size:
        foreign = next(i for i in prompt_ids if not 0 <= i < config.vocab_size)
        raise UserError(f"The prompt holds the id {foreign}, outside the vocabulary of {config.vocab_size}.")
    for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
        unknown = [i for i in getattr(params, name) or () if i >= known]
        if unknown:
            raise UserError(f"{name} holds the id {unknown[0]}, but the tokenizer has {known} ids.")
    policy = router_policy
    if params.router_policy is not None:
        given: Any = params.router_policy  # a policy, whatever it was made from
        policy = given.resolve(config)
    if policy is not None and not policy.changes(config):
        policy = None  # which costs nothing, and shares prefixes
    return Request(prompt_ids, params, min(params.max_new_tokens, room), where, priority, cache_salt, policy)
