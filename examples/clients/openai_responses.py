"""OpenAI's Responses interface: an answer, and one as it comes.

olmoe serve --model olmoe-tiny, then: python examples/clients/openai_responses.py
"""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
model = client.models.list().data[0].id

response = client.responses.create(
    model=model, instructions="You tell stories.", input="Tell me one about a fox.", max_output_tokens=40
)
print(response.output_text, response.usage.total_tokens)

for event in client.responses.create(model=model, input="And one about a king.", max_output_tokens=40, stream=True):
    if event.type == "response.output_text.delta":
        print(event.delta, end="", flush=True)
print()
