"""The body of Anthropic's POST /v1/messages: what a client may send, and which of it is not supported."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from olmoe.serve.dialects import TAG, AsText, Body, Part, TextOrList, kind_of, known


class TextBlock(Part):
    """A text."""

    type: Literal["text"]
    text: str


class ToolUseBlock(Part):
    """The assistant's request to use a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


def _known_result_part(value: object) -> object:
    return known(value, ("text",), "A tool result's block", "the model reads only text.")


ResultPart = Annotated[TextBlock, BeforeValidator(_known_result_part)]


class ToolResultBlock(Part):
    """What a tool returned."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[AsText | Annotated[list[ResultPart], Tag(f"{TAG}list")], TextOrList] | None = None
    is_error: bool | None = None


class ThinkingBlock(Part):
    """The reasoning of another model, which clients send back with its answer. Our model does not read it."""

    type: Literal["thinking", "redacted_thinking"]


_BLOCKS = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")


def _known_block(value: object) -> object:
    return known(value, _BLOCKS, "A content block", "the model reads text, tool_use and tool_result.")


def _block_kind(value: object) -> str:
    return kind_of(value).replace("redacted_", "")


Block = Annotated[
    Annotated[TextBlock, Tag(f"{TAG}text")]
    | Annotated[ToolUseBlock, Tag(f"{TAG}tool_use")]
    | Annotated[ToolResultBlock, Tag(f"{TAG}tool_result")]
    | Annotated[ThinkingBlock, Tag(f"{TAG}thinking")],
    Discriminator(_block_kind),
    BeforeValidator(_known_block),
]


class MessageParam(Part):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[AsText | Annotated[list[Block], Tag(f"{TAG}list")], TextOrList]

    @property
    def blocks(self) -> list[TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock]:
        """The content as blocks: a plain text is a single block."""
        return [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class ToolParam(Part):
    """A tool that the client runs for the model."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


def _known_tool(value: object) -> object:
    return known(value, ("custom", None), "A tool", "declare it with name and input_schema.")  # type: ignore[arg-type]


class ToolChoice(Part):
    """Whether to use a tool, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class SchemaFormat(Part):
    """JSON described by a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Part):
    """What the answer must look like, and how much effort to spend on it."""

    format: SchemaFormat | None = None
    effort: str | None = None


class Thinking(Part):
    """Whether to think first, for models that do."""

    type: str


class CountTokensRequest(Body):
    """The body of POST /v1/messages/count_tokens: a message request without the fields about the answer."""

    model: str | None = None
    messages: list[MessageParam]
    system: Annotated[AsText | Annotated[list[ResultPart], Tag(f"{TAG}list")], TextOrList] | None = None
    tools: list[Annotated[ToolParam, BeforeValidator(_known_tool)]] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    output_format: SchemaFormat | None = None
    thinking: Thinking | None = None


class MessagesRequest(CountTokensRequest):
    """The body of POST /v1/messages. Some fields are accepted only to be refused."""

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    speed: str | None = None
    container: Any = None
    mcp_servers: Any = None
    context_management: Any = None
