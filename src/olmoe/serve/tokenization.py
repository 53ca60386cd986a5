"""/tokenize, /detokenize and /tokenizer_info, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from olmoe.chat_template import OLMOE_CHAT_TEMPLATE
from olmoe.serve.chat_run import chat_prompt
from olmoe.serve.errors import invalid
from olmoe.serve.protocol import ChatRequest
from olmoe.serve.state import CallContext, ServerState
from olmoe.serve.wire import token_text


class TokenizeRequest(BaseModel):
    """The body of POST /tokenize: a text, or a chat as its template writes it."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class DetokenizeRequest(BaseModel):
    """The body of POST /detokenize."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    tokens: list[int]


async def tokenize(state: ServerState, body: TokenizeRequest, context: CallContext) -> dict[str, Any]:
    """The ids of a text or a chat. OLMoE's tokenizer adds no special tokens, whatever `add_special_tokens` says."""
    state.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("Give either prompt or messages.", "prompt")
    if body.prompt is not None:
        (ids,) = await state.encode([body.prompt])
    else:
        chat = ChatRequest.model_validate(body.model_dump(exclude={"prompt", "return_token_strs"}, exclude_none=True))
        ids, _ = await chat_prompt(state, chat)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": state.context_length, "tokens": ids}
    return answer | {"token_strs": [token_text(state.tokenizer, i) for i in ids] if body.return_token_strs else None}


async def detokenize(state: ServerState, body: DetokenizeRequest, context: CallContext) -> dict[str, Any]:
    """The text of ids, special tokens included."""
    state.check_model(body.model)

    def text() -> str:
        size = state.tokenizer.vocab_size
        wrong = next((i for i in body.tokens if not 0 <= i < size), None)
        if wrong is not None:
            raise invalid(f"tokens holds the id {wrong}, but the tokenizer has {size}.", "tokens")
        return state.tokenizer.decode(body.tokens, skip_special_tokens=False)

    return {"prompt": await state.off_loop(text)}  # there may be millions


def tokenizer_info(state: ServerState) -> dict[str, Any]:
    """What a client needs to build prompts itself: special tokens, the template, the context."""
    tokenizer = state.tokenizer
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.special_tokens(),
        "eos_token_ids": list(tokenizer.eos_ids),
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": state.context_length,
        "chat_template": tokenizer.chat_template or OLMOE_CHAT_TEMPLATE,
    }
