"""litellm, whose provider hosted_vllm speaks to any server of OpenAI's protocol.

olmoe serve --model olmoe-tiny, then: python examples/clients/litellm_chat.py
"""

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # before the import: its prices are not asked for online

import litellm

call = {
    "model": "hosted_vllm/" + os.environ.get("MODEL", "olmoe-tiny"),
    "api_base": os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    "api_key": os.environ.get("OPENAI_API_KEY", "none"),
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "max_tokens": 40,
}

answer = litellm.completion(**call)
print(answer.choices[0].message.content, answer.usage.total_tokens)

for chunk in litellm.completion(**call, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
