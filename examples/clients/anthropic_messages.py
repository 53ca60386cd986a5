"""Anthropic's client on /v1/messages: an answer, and one as it comes.

olmoe serve --model olmoe-tiny, then: python examples/clients/anthropic_messages.py
"""

import os

from anthropic import Anthropic

# Its addresses end before /v1.
base_url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1").removesuffix("/v1")
client = Anthropic(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
model = client.models.list().data[0].id
messages = [{"role": "user", "content": "Tell me a story."}]

message = client.messages.create(
    model=model,
    system="You tell stories.",
    messages=messages,
    max_tokens=40,
    extra_body={"temperature": 0},  # the likeliest answer
)
print(message.content[0].text, message.usage.output_tokens)

with client.messages.stream(model=model, messages=messages, max_tokens=40) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
print()
