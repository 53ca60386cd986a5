"""Structured output: an answer that is a pydantic model, and one that is a choice or matches a pattern.

olmoe serve --model olmoe-tiny, then: python examples/clients/openai_structured.py
"""

import os
from typing import Literal

from openai import OpenAI
from pydantic import BaseModel, Field


class Animal(BaseModel):
    """What the answer must look like."""

    kind: Literal["dog", "cat", "fox"]
    name: str = Field(max_length=12)
    legs: int = Field(ge=0, le=8)


client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
model = client.models.list().data[0].id
messages = [{"role": "user", "content": "Describe the animal of the story."}]

parsed = client.chat.completions.parse(
    model=model, messages=messages, response_format=Animal, max_tokens=100, temperature=0
)
print(parsed.choices[0].message.parsed)

for constraint in ({"choice": ["yes", "no"]}, {"regex": "[0-9]{4}-[0-9]{2}"}):
    answer = client.chat.completions.create(
        model=model, messages=messages, max_tokens=20, extra_body={"structured_outputs": constraint}
    )
    print(constraint, answer.choices[0].message.content)
