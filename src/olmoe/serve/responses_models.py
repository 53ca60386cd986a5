"""The body of POST /v1/responses, OpenAI's newer protocol: what a client may send, and which of it is unsupported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator

from olmoe.errors import shown
from olmoe.serve.dialects import TAG, AsText, Body, Part, TextOrList, kind_of, known

_TEXT_ONLY = "the model reads only text (input_text, output_text)."
_ITEMS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")
_FORMATS = ("text", "json_object", "json_schema")


class TextPart(Part):
    """A text within a message."""

    type: Literal["input_text", "output_text", "text", "summary_text"] = "input_text"
    text: str


class RefusalPart(Part):
    """The assistant's refusal, in the content of its message."""

    type: Literal["refusal"]
    refusal: str


def _part_kind(value: object) -> str:
    return kind_of(value) if kind_of(value) == f"{TAG}refusal" else f"{TAG}text part"


def _known_part(value: object) -> object:
    return known(value, ("input_text", "output_text", "text", "summary_text", "refusal"), "A part", _TEXT_ONLY)


ContentPart = Annotated[
    Annotated[TextPart, Tag(f"{TAG}text part")] | Annotated[RefusalPart, Tag(f"{TAG}refusal")],
    Discriminator(_part_kind),
    BeforeValidator(_known_part),
]
Content = Annotated[AsText | Annotated[list[ContentPart], Tag(f"{TAG}list")], TextOrList]


class Message(Part):
    """One message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: str | None = None
    status: str | None = None


class FunctionCall(Part):
    """The assistant's request to call a function."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class FunctionCallOutput(Part):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: str | None = None
    status: str | None = None


class Reasoning(Part):
    """The reasoning of another model, which clients send back with its answer. Our model does not read it."""

    type: Literal["reasoning"]
    id: str | None = None


class ItemReference(Part):
    """An item of a response that the server has stored."""

    type: Literal["item_reference"] | None = "item_reference"
    id: str


def _item_kind(value: object) -> str:
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    if kind is None and isinstance(value, Mapping):
        kind = "message" if "role" in value or "id" not in value else "item_reference"
    return f"{TAG}{kind}"


def _known_item(value: object) -> object:
    if isinstance(value, Mapping) and _item_kind(value).removeprefix(TAG) not in _ITEMS:
        raise ValueError(f"An item of type {shown(value.get('type'))} is not supported; send {', '.join(_ITEMS)}.")
    return value


Item = Message | FunctionCall | FunctionCallOutput | Reasoning | ItemReference
InputItem = Annotated[
    Annotated[Message, Tag(f"{TAG}message")]
    | Annotated[FunctionCall, Tag(f"{TAG}function_call")]
    | Annotated[FunctionCallOutput, Tag(f"{TAG}function_call_output")]
    | Annotated[Reasoning, Tag(f"{TAG}reasoning")]
    | Annotated[ItemReference, Tag(f"{TAG}item_reference")],
    Discriminator(_item_kind),
    BeforeValidator(_known_item),
]
Input = Annotated[AsText | Annotated[list[InputItem], Tag(f"{TAG}list")], TextOrList]


class FunctionTool(Part):
    """A function that the model may ask the client to call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


def _known_tool(value: object) -> object:
    return known(value, ("function",), "A tool", "declare it as a function.")


Tool = Annotated[FunctionTool, BeforeValidator(_known_tool)]


class FunctionChoice(Part):
    """Call this function."""

    type: Literal["function"]
    name: str


class AllowedTools(Part):
    """Call one of these functions, or perhaps none."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"] = "auto"
    tools: list[dict[str, Any]]


def _known_choice(value: object) -> object:
    return known(value, ("function", "allowed_tools"), "A tool choice", "choose a function.")


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(f"{TAG}word")]
    | Annotated[FunctionChoice, Tag(f"{TAG}function")]
    | Annotated[AllowedTools, Tag(f"{TAG}allowed_tools")],
    Discriminator(
        lambda value: kind_of(value) if kind_of(value) in (f"{TAG}function", f"{TAG}allowed_tools") else f"{TAG}word"
    ),
    BeforeValidator(_known_choice),
]


class PlainFormat(Part):
    """Any text."""

    type: Literal["text"]


class JsonFormat(Part):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Part):
    """JSON described by a schema."""

    type: Literal["json_schema"]
    name: str = "answer"
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


def _known_format(value: object) -> object:
    return known(value, _FORMATS, "A format", f"ask for {', '.join(_FORMATS)}.")


Format = Annotated[
    Annotated[PlainFormat, Tag(f"{TAG}text")]
    | Annotated[JsonFormat, Tag(f"{TAG}json_object")]
    | Annotated[SchemaFormat, Tag(f"{TAG}json_schema")],
    Discriminator(kind_of),
    BeforeValidator(_known_format),
]


class TextConfig(Part):
    """What the text of the answer must look like."""

    format: Format | None = None
    verbosity: str | None = None


class ReasoningConfig(Part):
    """How much to think, for models that do."""

    effort: str | None = None
    summary: str | None = None


class StreamOptions(Part):
    """Accepted because clients send it: our streams have no padding."""

    include_obfuscation: bool | None = None


class CountInputRequest(Body):
    """The body of POST /v1/responses/input_tokens: a request without the fields about the answer."""

    model: str | None = None
    input: Input | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    text: TextConfig | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None
    truncation: Literal["auto", "disabled"] | None = None


class ResponsesRequest(CountInputRequest):
    """The body of POST /v1/responses. Some fields are accepted only to be refused."""

    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    max_tool_calls: int | None = None
    background: bool | None = None
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None

    @field_validator("metadata")
    @classmethod
    def _small(cls, metadata: dict[str, str] | None) -> dict[str, str] | None:
        if metadata and (
            len(metadata) > 16 or any(len(key) > 64 or len(value) > 512 for key, value in metadata.items())
        ):
            raise ValueError("at most 16 entries, of keys of 64 characters and values of 512, can be kept.")
        return metadata

    @property
    def stored(self) -> bool:
        """Whether the response is kept for `previous_response_id`; the default is yes."""
        return self.store is not False

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer's tokens come with log-probabilities."""
        return "message.output_text.logprobs" in (self.include or ()) or bool(self.top_logprobs)
