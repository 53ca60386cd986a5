"""Errors of the HTTP interface: what a client is told, in the shape of OpenAI's or Anthropic's protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from olmoe.errors import UserError

INVALID = "invalid_request_error"
# The protocols' error types by status; others are "api_error".
_TYPES = {
    400: INVALID,
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: INVALID,
    408: "timeout_error",
    413: "request_too_large",
    415: INVALID,
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An answer with an HTTP status: one sentence, and where in the request (`param`) the mistake is."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = type or _TYPES.get(status, "api_error")
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's shape, in which its clients find `.param` and `.code`."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        """Anthropic's shape."""
        return {"type": "error", "error": {"type": self.type, "message": self.message}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A mistake in the request: status 400."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, why: str = "") -> ApiError:
    """A field that other servers have and this one lacks, with a value that would change the answer."""
    return invalid(
        f"{param} is not supported{f' ({why})' if why else ''}; leave it out.", param, "unsupported_parameter"
    )


def overloaded(message: str, retry_after: int = 1) -> ApiError:
    """More work than this server accepts at once: status 503, with the time to wait before trying again."""
    return ApiError(503, message, code="server_overloaded", headers={"Retry-After": str(retry_after)})


# Parameters of the engine whose names differ on the wire.
_WIRE = {"max_new_tokens": "max_tokens", "include_stop": "include_stop_str_in_output"}
_PARAMS = frozenset(
    "temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty logit_bias seed stop logprobs "
    "stop_token_ids min_tokens prompt_logprobs allowed_token_ids priority cache_salt router_policy prompt messages "
    "ignore_eos routing prompt_routing bad_words".split()
)


def from_user_error(error: UserError, param: str | None = None) -> ApiError:
    """A `UserError` from the layers below as it goes over the wire; its first word may name the field."""
    message = str(error)
    words = message.split(maxsplit=1)
    first = words[0].rstrip(",:") if words else ""
    if message.startswith("A router"):
        return invalid(message, "router_policy")
    if first in _WIRE:
        return invalid(message.replace(first, _WIRE[first], 1), param or _WIRE[first])
    return invalid(message, param or (first if first in _PARAMS else None))
