"""What the other protocols' endpoints share: reading a body into a model, and naming the field that was wrong.

A dialect (OpenAI's responses, Anthropic's messages) is translated into a chat request, and the answer back. If a body
is invalid, the client must be told the name of the field that *it* wrote: `parse` turns pydantic's findings into one
sentence, `renamed` turns the names of the chat request's fields into the dialect's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Tag, ValidationError
from pydantic_core import from_json

from olmoe.errors import shown
from olmoe.serve.endpoint import Endpoint
from olmoe.serve.errors import ApiError, invalid
from olmoe.serve.protocol import ChatRequest, Ids
from olmoe.serve.router_policy import RouterPolicyModel

# Tags of our unions start with this, to distinguish them from fields in the path of an error.
TAG = "as "

Model = TypeVar("Model", bound=BaseModel)


class Part(BaseModel):
    """A part of a body. Fields unknown to us are ignored."""

    model_config = ConfigDict(extra="ignore")


class Body(BaseModel):
    """A whole body, with our own and vLLM's fields, which mean the same in every dialect as in a chat request."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    allowed_token_ids: Ids | None = None
    bad_words: list[str] | None = None
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    frequency_penalty: float | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[str, float] | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    priority: int | None = None
    repetition_penalty: float | None = None
    router_policy: RouterPolicyModel | None = None
    routing: bool | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Ids | None = None
    structured_outputs: dict[str, Any] | None = None
    top_k: int | None = None

    def shared_fields(self) -> dict[str, Any]:
        """The values of the fields above."""
        return self.model_dump(include=set(Body.model_fields), exclude_none=True)


@dataclass(frozen=True)
class DialectEndpoint(Endpoint):
    """An endpoint whose errors use the field names of its dialect."""

    def parse(self, content: bytes) -> BaseModel:
        """The body as its model. Raises `ApiError` (400) with the field that is wrong."""
        try:
            body = from_json(content, allow_inf_nan=False)
        except ValueError as error:
            raise invalid(f"The body is not valid JSON ({error}).") from None
        return parse(self.model, body, dotted=self.dialect.anthropic)


def parse(model: type[Model], body: object, *, dotted: bool = False) -> Model:
    """The body as a `model`. Raises `ApiError` (400) that names the first invalid field.

    Fields are named as OpenAI does, `input[0].role`; `dotted` as Anthropic does, `messages.0.role`.
    """
    if not isinstance(body, Mapping):
        raise invalid(f"The body must be a JSON object, not {shown(body)}.")
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = path([step for step in first["loc"] if not _is_type(step)], dotted=dotted)
        raise invalid(f"{param}: {_sentence(first)}", param) from None


def chat_request(body: Mapping[str, Any], names: Mapping[str, str]) -> ChatRequest:
    """The chat request of a translated body. Raises `ApiError` with the dialect's `names` of its fields.

    The messages have been checked in the dialect; there may be many, so they are not checked twice.
    """
    with renaming(names):
        chat = parse(ChatRequest, {**body, "messages": []})
    chat.messages = body["messages"]
    return chat


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """A context whose errors use the dialect's `names` for the chat request's fields."""
    try:
        yield
    except ApiError as error:
        raise renamed(error, names) from None


def _is_type(step: int | str) -> bool:
    """Whether a step of a pydantic location names one of several types, not a field."""
    return isinstance(step, str) and (step.startswith(TAG) or "[" in step or step in ("str", "int", "float", "bool"))


def path(steps: list[int | str] | tuple[int | str, ...], *, dotted: bool = False) -> str:
    """`input[0].role`, or `input.0.role` if `dotted`."""
    text = ""
    for step in steps:
        if isinstance(step, int) and not dotted:
            text += f"[{step}]"
        else:
            text += f".{step}" if text else str(step)
    return text


def _sentence(finding: Mapping[str, Any]) -> str:
    if finding["type"] == "value_error":  # raised by one of our validators, whose text is already a sentence
        return str(finding["ctx"]["error"])
    if finding["type"] == "missing":
        return "this field is required."
    return f"{str(finding['msg']).rstrip('.')}."


# Where a chat request nests what is flat in dialects.
_NESTED = (
    (re.compile(r"\btools\[(\d+)\]\.function\b"), r"tools[\1]"),
    (re.compile(r"\btool_choice\.(?:function|allowed_tools)\b"), "tool_choice"),
)


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The same error, with the dialect's names for the fields of the chat request.

    An error inside a field with another name is reported for the whole field, since its parts differ.
    """
    param, message = error.param, error.message
    if not param:
        return error
    head = re.split(r"[.\[]", param, maxsplit=1)[0]
    if head in names:
        message = re.sub(rf"(?<![\w.]){re.escape(param)}(?![\w\[])", names[head], message)
        param = names[head]
    for pattern, replacement in _NESTED:
        param, message = pattern.sub(replacement, param), pattern.sub(replacement, message)
    if schema := names.get("parameters"):
        param, message = (re.sub(r"(\btools\[\d+\]\.)parameters", rf"\1{schema}", text) for text in (param, message))
    return ApiError(error.status, message, error.type, param, error.code, error.headers)


def known(value: object, supported: tuple[str, ...], what: str, remedy: str) -> object:
    """The value, whose `type` must be one of those supported. Raises `ValueError` with a sentence for the client."""
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    if isinstance(value, Mapping | BaseModel) and kind not in supported:
        raise ValueError(f"{what} of type {shown(kind)} is not supported; {remedy}")
    return value


def kind_of(value: object) -> str:
    """The tag for an object that has a `type`."""
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return f"{TAG}{kind}"


def text_or_list(value: object) -> str:
    """The tag for what may be a text, or a list of parts."""
    return f"{TAG}text" if isinstance(value, str) else f"{TAG}list"


def function_tool(name: str, description: str | None, parameters: Any, strict: bool | None) -> dict[str, Any]:
    """A tool in the form of a chat request."""
    function: dict[str, Any] = {"name": name}
    if description is not None:
        function["description"] = description
    if parameters is not None:
        function["parameters"] = parameters
    if strict is not None:
        function["strict"] = strict
    return {"type": "function", "function": function}


def tool_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A tool call in the form of an assistant's chat message."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def joined(texts: list[str]) -> str | list[dict[str, str]]:
    """Texts as the content of a chat message."""
    if len(texts) == 1:
        return texts[0]
    return [{"type": "text", "text": text} for text in texts]


AsText = Annotated[str, Tag(f"{TAG}text")]
TextOrList = Discriminator(text_or_list)
