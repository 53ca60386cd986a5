"""Structured output: what `response_format`, `structured_outputs` and their predecessors ask for, as a grammar.

All are compiled off the event loop. Errors are answered with 400 and the name of the field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from olmoe.engine import structured
from olmoe.engine.json_schemas import prepared
from olmoe.errors import UserError, shown
from olmoe.serve.errors import from_user_error, invalid, unsupported

if TYPE_CHECKING:
    from olmoe.engine.sampling_params import Grammar
    from olmoe.serve.protocol import Body
    from olmoe.serve.state import ServerState
    from olmoe.serve.tool_text import Calls
    from olmoe.tokenizer import Tokenizer

Kind = Literal["json", "json_object", "regex", "choice", "grammar"]

# The constraining fields of vLLM's `structured_outputs`, and their older names -> what they hold.
_KINDS: dict[str, Kind] = {
    "json": "json",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "lark": "grammar",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "structural_tag": (None,),
    "whitespace_pattern": (None,),
    "disable_additional_properties": (None, False),
    "disable_fallback": (None, False, True),  # there is one backend, and nothing to fall back to
    "backend": (None, "auto", "guidance", "llguidance"),
    "decoding_backend": (None, "auto", "guidance", "llguidance"),
}
_FORMATS = "text, json_object or json_schema"


@dataclass(frozen=True)
class Wanted:
    """What a text must be, and the field that says so. `strict` refuses schemas that cannot be fully enforced."""

    kind: Kind
    value: Any
    param: str
    strict: bool = True
    blanks: bool = True

    def compile(self, tokenizer: Tokenizer) -> Grammar:
        """Its grammar. Raises `UserError`."""
        if self.kind in ("json", "json_object"):
            return structured.json_schema(self._schema(), tokenizer, strict=self.strict)
        if self.kind == "regex":
            return structured.regex(self.value, tokenizer)
        if self.kind == "choice":
            return structured.choice(self.value, tokenizer)
        return structured.grammar(self.value, tokenizer)

    def rule(self) -> str:
        """The same as a rule of a Lark grammar, for answers that may also be a call. Raises `UserError`."""
        if self.kind in ("json", "json_object"):
            return f"%json {prepared(self._schema(), strict=self.strict)}"
        if self.kind == "regex":
            return structured.regex_terminal(self.value)
        if self.kind == "choice":
            return structured.choice_rule(self.value)
        raise UserError("A grammar cannot be combined with tools; leave out one of them.")

    def _schema(self) -> Any:
        schema = {"type": "object"} if self.kind == "json_object" else self.value
        if self.blanks:
            return schema
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError):
                return schema  # which `prepared` refuses
        return {**schema, "x-guidance": {"whitespace_flexible": False}} if isinstance(schema, Mapping) else schema


async def grammar(state: ServerState, body: Body, calls: Calls | None = None) -> Grammar | None:
    """The grammar of a request's texts, None if any text will do. Raises `ApiError` (400).

    `calls` are the tools that an answer may call, in addition to or instead of what the body asks for.
    """
    asked = wanted(body)
    if calls is not None:
        return await state.compiled(_with_calls, asked, calls, state.tokenizer)
    if asked is None:
        return None
    return await state.compiled(_told(asked.compile, asked.param), state.tokenizer)


def _with_calls(asked: Wanted | None, calls: Calls, tokenizer: Tokenizer) -> Grammar:
    """The grammar of answers that may be calls. If a call is required, what else the body asks for is left out."""
    content = None
    if asked is not None and calls.mode == "auto":
        _told(asked.compile, asked.param)(tokenizer)  # so that its own errors name its own field
        content = _told(asked.rule, asked.param)()
    for tool in calls.tools:  # one at a time, so that the one at fault is named
        param = f"{tool.where}.parameters"
        try:
            structured.json_schema(tool.parameters, tokenizer, strict=tool.strict, name=param)
        except UserError as error:
            raise from_user_error(error, param) from None
    return _told(lambda: structured.assembled(calls.lark(content), tokenizer), "tools")()


def _told(function: Callable[..., Any], param: str) -> Callable[..., Any]:
    """The function, whose `UserError` becomes an `ApiError` that names the field."""

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError as error:
            raise from_user_error(error, param) from None

    return call


def wanted(body: Body) -> Wanted | None:
    """What a body wants its texts to be; None for any text. Raises `ApiError` (400) for more than one constraint."""
    wishes = [
        *_response_format(body.response_format),
        *_structured_outputs(body.structured_outputs or {}, "structured_outputs."),
        *_guided(body.model_extra or {}),
    ]
    if len(wishes) > 1:
        names = " and ".join(wish.param for wish in wishes)
        raise invalid(f"{names} exclude each other; give one of them.", wishes[1].param)
    return wishes[0] if wishes else None


def _response_format(given: Mapping[str, Any] | None) -> list[Wanted]:
    where = "response_format"
    if given is None or given.get("type") == "text":
        return []
    kind = given.get("type")
    if kind == "json_object":  # llama-server takes a schema here
        schema = given.get("schema")
        return [
            Wanted("json_object", None, where)
            if schema is None
            else Wanted("json", schema, f"{where}.schema", strict=False)
        ]
    if kind != "json_schema":
        raise invalid(f"{where}.type must be {_FORMATS}, not {shown(kind)}.", f"{where}.type")
    holder = given.get("json_schema")
    if not isinstance(holder, Mapping) or holder.get("schema", holder.get("json_schema")) is None:
        raise invalid(f"{where}.json_schema must be an object with a name and a schema.", f"{where}.json_schema")
    strict = holder.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise invalid(f"{where}.json_schema.strict must be true or false.", f"{where}.json_schema.strict")
    return [
        Wanted(
            "json", holder.get("schema", holder.get("json_schema")), f"{where}.json_schema.schema", strict=bool(strict)
        )
    ]


def _structured_outputs(given: Mapping[str, Any], where: str) -> list[Wanted]:
    """vLLM's fields, one of which may be set."""
    blanks = True
    wishes = []
    for name, value in given.items():
        param = f"{where}{name}"
        if name in _KINDS:
            if value is None or (name == "json_object" and value is False):
                continue
            if name == "json_object" and value is not True:
                raise invalid(f"{param} must be true or false, not {shown(value)}.", param)
            wishes.append((name, value, param))
        elif name == "disable_any_whitespace":
            blanks = not value
        elif name not in _NEUTRAL:
            raise invalid(f"{param} is unknown; give one of {', '.join(_KINDS)}.", param)
        elif value not in _NEUTRAL[name]:
            raise unsupported(param)
    return [Wanted(_KINDS[name], value, param, blanks=blanks) for name, value, param in wishes]


def _guided(extra: Mapping[str, Any]) -> list[Wanted]:
    """The `guided_*` fields of older clients."""
    prefix = "guided_"
    found = {name.removeprefix(prefix): value for name, value in extra.items() if name.startswith(prefix)}
    known = {name: value for name, value in found.items() if name in _KINDS or name in _NEUTRAL}
    return _structured_outputs(known, prefix)
