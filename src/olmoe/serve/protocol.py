"""The bodies of /v1/completions and /v1/chat/completions, and what they mean to the engine.

Fields are those of OpenAI and the extensions of vLLM; `routing`, `prompt_routing` and `router_policy` are ours. Unknown
fields are ignored and logged once. A known but unsupported field is refused if its value would change the answer.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from olmoe.engine.request import Request
from olmoe.engine.sampling_params import Grammar, SamplingParams
from olmoe.errors import UserError, shown
from olmoe.serve.errors import ApiError, from_user_error, invalid, unsupported
from olmoe.serve.router_policy import RouterPolicyModel, router_policy

_log = logging.getLogger("olmoe")

MOST_CHOICES = 16
MOST_LOGPROBS = 20
# Limits on stop strings: all of them are compared with the text at each token.
_MOST_STOPS, _MOST_STOP_CHARACTERS = 64, 2**14
# Limits on listed ids and biases: for one text, and for all texts of a body together, since each text has its own.
_MOST_IDS, _MOST_IDS_IN_ALL = 2**16, 2**20
_MOST_NAMES_LOGGED = 100
_logged: set[str] = set()

# The smallest share, which keeps one token: OpenAI's interface writes 0 for it.
_LEAST_TOP_P = 1e-9

# Known but unsupported fields, and the values with which they change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "best_of": (None,),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1.0),
    "functions": (None, []),
    "function_call": (None, "none"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "web_search_options": (None,),
    "reasoning_effort": (None, "none"),
    "chat_template": (None,),
    "logits_processors": (None, []),
    "skip_special_tokens": (None, True),
    "prompt_embeds": (None,),
    "kv_transfer_params": (None,),
    "mm_processor_kwargs": (None, {}),
}


def _read_prompt(value: Any) -> Any:
    """A text, texts, ids or lists of ids. Checked by hand, since a prompt may have a million ids."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists")
    if all(type(item) is int for item in value) or all(isinstance(item, str) for item in value):
        return value
    if all(isinstance(item, list) and all(type(i) is int for i in item) for item in value):
        return value
    if all(isinstance(item, str) or (isinstance(item, list) and all(type(i) is int for i in item)) for item in value):
        return value
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists")


_IDS_SCHEMA: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Prompt = Annotated[
    Any,
    BeforeValidator(_read_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                _IDS_SCHEMA,
                {"type": "array", "items": _IDS_SCHEMA, "minItems": 1},
            ]
        }
    ),
]


Ids = Annotated[list[int], Field(max_length=_MOST_IDS)]


class StreamOptions(BaseModel):
    """What a stream sends besides the text: a last chunk with the usage, or the usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Body(BaseModel):
    """What bodies have in common. `extra` keeps other fields, to log unknown ones and refuse known ones."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    response_format: dict[str, Any] | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: Ids | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    allowed_token_ids: Ids | None = None
    bad_words: Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=256)] | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    return_token_ids: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    structured_outputs: dict[str, Any] | None = None
    # ours
    routing: bool | None = None
    prompt_routing: bool | None = None
    router_policy: RouterPolicyModel | None = None

    @property
    def choices(self) -> int:
        """How many texts each prompt gets."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionRequest(_Body):
    """The body of POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    suffix: str | None = None
    best_of: int | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens to generate: 16 by default, as in the protocol."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens are reported at each position; None for no log-probabilities."""
        return self.logprobs


class ChatRequest(_Body):
    """The body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    echo: Literal[False] | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens to generate; None for as many as fit the context."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens are reported at each position; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


Body = CompletionRequest | ChatRequest


def check_fields(body: BaseModel) -> None:
    """Refuse known but unsupported fields whose values would change something; log unknown ones once.

    Raises `ApiError` (400).
    """
    for name, neutral in _UNSUPPORTED.items():
        value = getattr(body, name, None)
        if value not in neutral and not (name == "best_of" and value == getattr(body, "choices", None)):
            raise unsupported(name)
    for name in (body.model_extra or {}).keys() - _UNSUPPORTED.keys():
        if name not in _logged and len(_logged) < _MOST_NAMES_LOGGED:
            _logged.add(name)
            _log.warning("ignored an unknown field of a request: %s", shown(name))


def sampling_params(
    body: Body, *, room: int, texts: int = 1, grammar: Grammar | None = None, layers: int = 0, experts: int = 0
) -> SamplingParams:
    """The engine's parameters for a body's `texts`; see `of_choice`. Raises `ApiError` (400) with the field's name.

    `room` is the limit if the body has none. Temperature is 1 by default, as in OpenAI's interface. `layers` and
    `experts` are the model's, for router policies.
    """
    limit = room if body.limit is None else body.limit
    _check_stops(body.stop)
    _check_ids(body, texts)
    try:
        return SamplingParams(
            max_new_tokens=max(limit, 1),
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=0 if body.top_k in (None, -1) else body.top_k,
            top_p=1.0 if body.top_p is None else body.top_p or _LEAST_TOP_P,
            min_p=body.min_p or 0.0,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias={_token_id(i): x for i, x in body.logit_bias.items()} if body.logit_bias else None,
            seed=None if body.seed is None else body.seed % 2**63,
            stop=body.stop or (),
            ignore_eos=bool(body.ignore_eos),
            logprobs=body.top,
            stop_token_ids=body.stop_token_ids or (),
            include_stop=bool(body.include_stop_str_in_output),
            min_tokens=body.min_tokens or 0,
            prompt_logprobs=_prompt_logprobs(body),
            allowed_token_ids=body.allowed_token_ids,
            grammar=grammar,
            router_policy=router_policy(body.router_policy, layers, experts),
            routing=bool(body.routing),
            prompt_routing=bool(body.prompt_routing),
        )
    except UserError as error:
        raise from_user_error(error) from None


def of_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """The parameters of one of several texts for a prompt: the i-th has the seed + i."""
    return params if params.seed is None or not choice else params.with_seed((params.seed + choice) % 2**63)


def limited(request: Request, body: Body) -> Request:
    """The request, changed to generate nothing if the body says so: then its prompt is only scored."""
    if body.limit == 0:
        request.limit = 0
    return request


def _token_id(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise invalid(f"logit_bias has the key {shown(text)}; keys are token ids.", "logit_bias")
    return number


def _check_stops(stop: str | list[str] | None) -> None:
    texts = [stop] if isinstance(stop, str) else stop or []
    if len(texts) > _MOST_STOPS or sum(map(len, texts)) > _MOST_STOP_CHARACTERS:
        raise invalid(
            f"stop holds {len(texts)} strings of {sum(map(len, texts))} characters in all; at most {_MOST_STOPS} of "
            f"{_MOST_STOP_CHARACTERS} are allowed.",
            "stop",
        )


def _check_ids(body: Body, texts: int) -> None:
    lists = {name: len(getattr(body, name) or ()) for name in ("logit_bias", "allowed_token_ids", "stop_token_ids")}
    longest = max(lists, key=lambda name: lists[name])
    most = min(_MOST_IDS, _MOST_IDS_IN_ALL // texts)
    if lists[longest] > most:
        many = f", and a call for {texts} texts may have {most}" if most < _MOST_IDS else f", more than {most}"
        raise invalid(f"{longest} has {lists[longest]} entries{many}.", longest)


def _prompt_logprobs(body: Body) -> int | None:
    """Those requested, and those that an echo with log-probabilities shows."""
    asked = [] if body.prompt_logprobs is None else [body.prompt_logprobs]
    if isinstance(body, CompletionRequest) and body.echo and body.logprobs is not None:
        asked.append(body.logprobs)
    return max(asked, default=None)


def salt_of(context_salt: str, body: Body) -> str:
    """What keeps a request's prefix cache separate: its key, and its own `cache_salt`."""
    return f"{context_salt}\0{body.cache_salt}" if body.cache_salt else context_salt


__all__ = [
    "ApiError",
    "Body",
    "ChatRequest",
    "CompletionRequest",
    "StreamOptions",
    "check_fields",
    "limited",
    "of_choice",
    "sampling_params",
]
