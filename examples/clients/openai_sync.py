"""OpenAI's Python client: a chat, a continuation with log-probabilities, a stream, an error.

olmoe serve --model olmoe-tiny, then: python examples/clients/openai_sync.py
"""

import os

from openai import BadRequestError, OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),  # any, where the server has no keys
)
model = client.models.list().data[0].id

answer = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "Tell me a story."}], max_tokens=40, temperature=0.7, seed=1
)
print(answer.choices[0].message.content, answer.usage.total_tokens)

completion = client.completions.create(
    model=model,
    prompt="Once upon a time",
    max_tokens=8,
    temperature=0,
    logprobs=2,
    extra_body={"top_k": 40, "min_tokens": 4},  # what OpenAI's interface does not have goes here
)
for token, logprob in zip(
    completion.choices[0].logprobs.tokens, completion.choices[0].logprobs.token_logprobs, strict=True
):
    print(f"{logprob:8.3f} {token!r}")

stream = client.completions.create(
    model=model,
    prompt="The king said",
    max_tokens=30,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].text, end="", flush=True)
    elif chunk.usage:
        print(f"\n{chunk.usage.completion_tokens} tokens")

try:
    client.completions.create(model=model, prompt="Once", temperature=-1)
except BadRequestError as error:
    print(error.param, error.message)
