"""Tools: the model calls a function with arguments that match its schema, and gets the result.

olmoe serve --model olmoe-tiny, then: python examples/clients/openai_tools.py
"""

import json
import os

from openai import OpenAI

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a town.",
            "parameters": {
                "type": "object",
                "properties": {
                    "town": {"type": "string", "maxLength": 20},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["town", "days"],
                "additionalProperties": False,
            },
        },
    }
]

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
model = client.models.list().data[0].id
messages = [{"role": "user", "content": "How will the weather be in Oslo?"}]

# "auto" lets the model decide, which a model must have been trained for; "required" makes it call one.
answer = client.chat.completions.create(
    model=model,
    messages=messages,
    tools=TOOLS,
    tool_choice="required",
    parallel_tool_calls=False,  # one call
    max_tokens=200,
    temperature=0,
)
message = answer.choices[0].message
call = message.tool_calls[0]
arguments = json.loads(call.function.arguments)
print(answer.choices[0].finish_reason, call.function.name, arguments)

messages += [
    message.model_dump(exclude_none=True),
    {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"sky": "clear"})},
]
final = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, tool_choice="none", max_tokens=30)
print(final.choices[0].message.content)
