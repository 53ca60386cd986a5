"""JSON schemas prepared for a grammar: bounded whitespace, and no formats that are mere annotations. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from olmoe.errors import UserError, shown

LARGEST_SCHEMA = 2**17  # characters of JSON
LARGEST_REGEX, _LARGEST_REGEXES = 2**12, 2**14  # characters of one regular expression, and of all in a schema
_DEEPEST = 60  # levels; the compiler's own JSON reader refuses 128, and every array in a schema nests two

# Without a bound, a model that likes spaces writes them until its tokens run out.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,8}"

# `format` is an annotation unless a validator is told otherwise; these, OpenAPI's, do not constrain the text.
_REMARKS = frozenset("int32 int64 float double decimal byte binary password".split())
_ONE = frozenset("additionalProperties additionalItems items contains not if then else propertyNames".split())
_MANY = frozenset("anyOf oneOf allOf prefixItems items".split())
_NAMED = frozenset("properties patternProperties $defs definitions dependentSchemas".split())
_BOUNDS = ("minimum", "maximum", "exclusiveminimum", "exclusivemaximum")
_EXACT = 2**53
_OPTIONS = ("whitespace_flexible", "coerce_one_of", "lenient")


def prepared(schema: object, *, strict: bool = True, name: str = "The JSON schema") -> str:
    """The text of a schema as the grammar compiler takes it. Raises `UserError` if it is not a JSON schema.

    `schema` is an object, a boolean, or a text that holds one. Unless `strict`, keywords that the compiler lacks are
    left out, so that a text may violate them; if `strict`, compiling refuses them.
    """
    if isinstance(schema, str | bytes):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name} is not JSON ({error}).") from None
    if not isinstance(schema, Mapping | bool):
        raise UserError(f"{name} must be an object, not {shown(schema)}.")
    if schema is False:
        raise UserError(f"{name} is false: nothing satisfies it.")
    given: Mapping[str, Any] = {} if schema is True else schema
    plain = _Walk(name).copy(given, 0)
    options = given.get("x-guidance")
    own: dict[str, Any] = {}
    if isinstance(options, Mapping):
        own = {key: options[key] for key in _OPTIONS if isinstance(options.get(key), bool)}
    if own.get("whitespace_flexible", True):
        own["whitespace_pattern"] = WHITESPACE
    if not strict:
        own |= {"lenient": True, "coerce_one_of": True}
    plain["x-guidance"] = own
    try:
        text = json.dumps(plain, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON ({error}).") from None
    if len(text) > LARGEST_SCHEMA:
        raise UserError(f"{name} has {len(text)} characters; at most {LARGEST_SCHEMA} are supported.")
    return text


def patterns(text: str) -> list[str]:
    """The regular expressions in a `prepared` schema, each once."""
    found: dict[str, None] = {}
    open_values = [json.loads(text)]
    while open_values:
        value = open_values.pop()
        if isinstance(value, dict):
            found.update(dict.fromkeys(p for p in (value.get("pattern"),) if isinstance(p, str)))
            named = value.get("patternProperties")
            found.update(dict.fromkeys(named if isinstance(named, dict) else ()))
            open_values += value.values()
        elif isinstance(value, list):
            open_values += value
    return [pattern for pattern in found if len(pattern) <= LARGEST_REGEX]


def _exact(key: object, value: Any, name: str) -> Any:
    """A keyword's value, if the compiler's numbers, float64 or int64, can hold it.

    Bounds beyond 2^53 become 2^53. Raises `UserError` if only numbers beyond it would satisfy the schema.
    """
    if key in ("const", "enum") and (large := _inexact(value)) is not None:
        raise UserError(f"{name} asks for {shown(large)}; whole numbers beyond 2^53 are not supported there.")
    if not isinstance(key, str) or key.lower() not in _BOUNDS or isinstance(value, bool):
        return value
    if not isinstance(value, int | float) or not abs(value) > _EXACT:  # NaN too, which is refused later
        return value
    if (value > 0) is key.lower().endswith("minimum"):
        raise UserError(f"{name} has a {key} of {shown(value)}; beyond 2^53 there are no exact numbers.")
    return _EXACT if value > 0 else -_EXACT


def _inexact(value: Any) -> int | None:
    """A whole number in a JSON value that a float64 cannot hold exactly."""
    if isinstance(value, int):
        return value if abs(value) > _EXACT else None
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((found for item in inner if (found := _inexact(item)) is not None), None)


class _Walk:
    """Copies a schema without mere annotations. Raises `UserError` if it is too deep or too complex."""

    def __init__(self, name: str) -> None:
        self._name, self._regexes = name, 0

    def copy(self, schema: Any, depth: int) -> Any:
        """A copy of a schema that is `depth` levels below the outermost one."""
        if depth > _DEEPEST:
            raise UserError(f"{self._name} is nested more than {_DEEPEST} levels deep; make it flatter, or use $ref.")
        if not isinstance(schema, Mapping):
            return schema
        result: dict[Any, Any] = {}
        for key, value in schema.items():
            if key == "x-guidance" or (key == "uniqueItems" and value is False):
                continue
            if key == "format" and isinstance(value, str) and value in _REMARKS:
                continue
            if key == "pattern" and isinstance(value, str):
                self._count(value)
            if key == "patternProperties" and isinstance(value, Mapping):
                for pattern in value:
                    self._count(str(pattern))
            result[key] = self._keyword(key, _exact(key, value, self._name), depth + 1)
        return result

    def _keyword(self, key: object, value: Any, depth: int) -> Any:
        if key in _MANY and isinstance(value, list | tuple):
            return [self.copy(item, depth) for item in value]
        if key in _NAMED and isinstance(value, Mapping):
            return {inner: self.copy(item, depth) for inner, item in value.items()}
        return self.copy(value, depth) if key in _ONE else value

    def _count(self, pattern: str) -> None:
        self._regexes += len(pattern)
        if len(pattern) > LARGEST_REGEX or self._regexes > _LARGEST_REGEXES:
            raise UserError(
                f"{self._name} has a pattern of {len(pattern)} characters, {self._regexes} with those before it; at "
                f"most {LARGEST_REGEX} and {_LARGEST_REGEXES} are supported."
            )
