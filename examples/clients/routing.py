"""What no other server reports: the experts of every token, and the same text with some of them banned.

olmoe serve --model olmoe-tiny, then: python examples/clients/routing.py
"""

import base64
import os
from collections import Counter

import numpy as np
from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
model = client.models.list().data[0].id


def unpack(routing: dict) -> tuple[np.ndarray, np.ndarray]:
    """Expert ids and their weights, both of shape (tokens, layers, k)."""
    shape = routing["tokens"], routing["layers"], routing["k"]
    ids = np.frombuffer(base64.b64decode(routing["experts"]), np.dtype(routing["dtype"]).newbyteorder("<"))
    weights = np.frombuffer(base64.b64decode(routing["weights"]), "<f2")
    return ids.reshape(shape), weights.reshape(shape)


def tell(**extra: object) -> tuple[str, np.ndarray, np.ndarray]:
    """A story with its experts."""
    answer = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=40, temperature=0, extra_body={"routing": True, **extra}
    )
    return answer.choices[0].text, *unpack(answer.choices[0].routing)


text, ids, weights = tell()
print(text)
print(
    "experts of the first token in layer 0:",
    dict(zip(ids[0, 0].tolist(), weights[0, 0].round(3).tolist(), strict=True)),
)

# The expert of each layer that most tokens chose.
busiest = [Counter(ids[:, layer].flatten().tolist()).most_common(1)[0][0] for layer in range(ids.shape[1])]
banned = {"ban": [{"layer": layer, "expert": expert} for layer, expert in enumerate(busiest)]}
text, ids, _ = tell(router_policy=banned)
print(f"without experts {busiest}:", text)
assert not any(expert in ids[:, layer] for layer, expert in enumerate(busiest))
