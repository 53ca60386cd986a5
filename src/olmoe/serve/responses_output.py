"""From chat events to a response object, and to the events of a stream of POST /v1/responses.

A response is a list of items: messages of the assistant and calls of functions. Each is opened, grows by deltas, and is
closed before the next one opens; the final event repeats the whole response.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from olmoe.engine.request import Routing, TokenLogprob
from olmoe.serve.chat_run import ChatEvent, Finished, TextDelta, ToolCallDelta, Usage
from olmoe.serve.responses_models import FunctionCall, Item, Message, ResponsesRequest

Event = dict[str, Any]


def new_id(prefix: str) -> str:
    """A new id, such as `resp_...`."""
    return f"{prefix}_{uuid.uuid4().hex}"


def response_object(request: ResponsesRequest, model: str) -> dict[str, Any]:
    """A response that has just started; it repeats the request's settings, as clients expect."""
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": request.stored,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": _text_config(request),
        "tool_choice": request.tool_choice
        if isinstance(request.tool_choice, str)
        else "auto"
        if request.tool_choice is None
        else request.tool_choice.model_dump(),
        "tools": [tool.model_dump() for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": request.truncation or "disabled",
        "usage": None,
        "user": request.user,
    }


def _text_config(request: ResponsesRequest) -> dict[str, Any]:
    wanted = request.text.format if request.text is not None else None
    form = {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)
    return {"format": form, "verbosity": "medium"}


def usage_object(usage: Usage) -> dict[str, Any]:
    """The usage, in the fields of this protocol."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def output_items(response: dict[str, Any]) -> list[Item]:
    """The items of a response, as the next request of the conversation sends them."""
    items: list[Item] = []
    for each in response["output"]:
        if each["type"] == "message":
            items.append(Message.model_validate(each))
        else:
            items.append(FunctionCall.model_validate(each))
    return items


class ResponseWriter:
    """Builds `response` from chat events, and yields the stream's events for each.

    `describe` turns the log-probability of a token into JSON, `encode` the routing of several.
    """

    def __init__(
        self,
        response: dict[str, Any],
        *,
        describe: Callable[[TokenLogprob], dict[str, Any]],
        encode: Callable[[list[Routing]], dict[str, Any] | None],
        logprobs: bool = False,
        routing: bool = False,
    ) -> None:
        self.response = response
        self._describe = describe
        self._encode = encode
        self._logprobs = logprobs
        self._routing: list[Routing] | None = [] if routing else None
        self._item: dict[str, Any] | None = None  # the open one
        self._call = -1  # number of the open call
        self._texts: list[str] = []  # of the open item, joined when it closes
        self._tokens: list[dict[str, Any]] = []  # log-probabilities and routing of tokens not yet in a delta:
        self._routes: list[Routing] = []  # the text of the first may have to wait for the next
        self._events = 0
        self._finished: Finished | None = None

    def start(self) -> Iterator[Event]:
        """The events before the first token."""
        yield self._event("response.created", response=self._snapshot())
        yield self._event("response.in_progress", response=self._snapshot())

    def write(self, news: ChatEvent) -> Iterator[Event]:
        """The events that report `news`."""
        match news:
            case TextDelta():
                yield from self._text(news)
            case ToolCallDelta():
                yield from self._tool_call(news)
            case Finished():
                self._finished = news
                if self._item is None and not self.response["output"] and news.reason not in ("error", "cancelled"):
                    yield from self._open_message()  # an empty answer is an answer
                    yield from self._tell("")
                yield from self._close("incomplete" if news.reason in ("length", "error", "cancelled") else "completed")
            case Usage():
                self.response["usage"] = usage_object(news)

    def end(self) -> Iterator[Event]:
        """The last event: the whole response, with how it ended."""
        news = self._finished or Finished(0, "error", "The answer broke off.")
        response = self.response
        if self._item is not None:
            yield from self._close("incomplete")
        if self._routing is not None:
            response["routing"] = self._encode(self._routing)
        if news.reason in ("error", "cancelled"):
            response["status"] = "failed"
            response["error"] = {"code": "server_error", "message": news.error or "The request was cancelled."}
        elif news.reason == "length":
            response["status"] = "incomplete"
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["status"] = "completed"
            response["completed_at"] = int(time.time())
        yield self._event(f"response.{response['status']}", response=self._snapshot())

    # ---- parts ----

    def _text(self, news: TextDelta) -> Iterator[Event]:
        if self._routing is not None:
            self._routing += news.routing
        in_message = self._item is not None and self._item["type"] == "message"
        if self._item is not None and not in_message:
            self._forget()  # of a call, whose tokens are not reported
        self._tokens += self._describe_all(news)
        self._routes += news.routing if self._routing is not None else []
        if not in_message:
            if not news.text:
                return  # perhaps bytes of an unfinished character
            yield from self._close("completed")
            yield from self._open_message()
        yield from self._tell(news.text)

    def _tell(self, text: str) -> Iterator[Event]:
        """A delta of the open message, with what is reported about its tokens; nothing if there is nothing to send."""
        more = {"routing": self._encode(self._routes)} if self._routes else {}
        if not (text or self._tokens or more):
            return
        assert self._item is not None
        self._item["content"][0]["logprobs"] += self._tokens
        self._texts.append(text)
        place = self._place() | {"content_index": 0}
        yield self._event("response.output_text.delta", **place, delta=text, logprobs=self._tokens, **more)
        self._forget()

    def _describe_all(self, news: TextDelta) -> list[dict[str, Any]]:
        return [self._describe(each) for each in news.logprobs] if self._logprobs else []

    def _forget(self) -> None:
        self._tokens, self._routes = [], []

    def _tool_call(self, news: ToolCallDelta) -> Iterator[Event]:
        if self._item is None or self._item["type"] != "function_call" or news.call != self._call:
            self._forget()
            yield from self._close("completed")
            yield from self._open(
                {
                    "id": new_id("fc"),
                    "type": "function_call",
                    "status": "in_progress",
                    "call_id": news.id or new_id("call"),
                    "name": news.name or "",
                    "arguments": "",
                }
            )
            self._call = news.call
        if news.arguments:
            self._texts.append(news.arguments)
            yield self._event("response.function_call_arguments.delta", **self._place(), delta=news.arguments)

    def _open_message(self) -> Iterator[Event]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        message: dict[str, Any] = {"id": new_id("msg"), "type": "message", "status": "in_progress"}
        yield from self._open(message | {"role": "assistant", "content": []})
        assert self._item is not None
        yield self._event("response.content_part.added", **self._place(), content_index=0, part=dict(part))
        self._item["content"].append(part)

    def _open(self, item: dict[str, Any]) -> Iterator[Event]:
        self._item = item
        self._texts = []
        self.response["output"].append(item)
        index = len(self.response["output"]) - 1
        yield self._event("response.output_item.added", output_index=index, item=_copy(item))

    def _close(self, status: str) -> Iterator[Event]:
        item, self._item = self._item, None
        if item is None:
            return
        text = "".join(self._texts)
        place = {"item_id": item["id"], "output_index": len(self.response["output"]) - 1}
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            part["text"] = text
            place_of_part = place | {"content_index": 0}
            yield self._event("response.output_text.done", **place_of_part, text=text, logprobs=list(part["logprobs"]))
            yield self._event("response.content_part.done", **place_of_part, part=dict(part))
        else:
            item["arguments"] = text
            yield self._event("response.function_call_arguments.done", **place, name=item["name"], arguments=text)
        yield self._event("response.output_item.done", output_index=place["output_index"], item=_copy(item))

    def _place(self) -> dict[str, Any]:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": len(self.response["output"]) - 1}

    def _snapshot(self) -> dict[str, Any]:
        return self.response | {"output": [_copy(item) for item in self.response["output"]]}

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._events, **fields}
        self._events += 1
        return event


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """The item as it is now: an event waiting to be sent must not change."""
    if "content" in item:
        return item | {"content": [dict(part) for part in item["content"]]}
    return dict(item)
