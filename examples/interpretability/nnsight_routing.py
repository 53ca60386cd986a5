"""The same questions asked with nnsight: read a router, see which experts a prediction rests on, and steer it.

nnsight (pip install nnsight) runs the body of a `with` block beside the model: what a module gives can be read, kept
and replaced there. It takes olmoe's models as they are.

python examples/interpretability/nnsight_routing.py ["The beginning of a story"]
"""

from __future__ import annotations

import sys

import nnsight
import torch

from olmoe import AutoModelForCausalLM, AutoTokenizer

TEXT = "Once upon a time there was a little girl named Lily. She loved to play with her"

network = AutoModelForCausalLM.from_pretrained("olmoe-tiny", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained("olmoe-tiny")
model = nnsight.TransformersModel(network, tokenizer=tokenizer)
routers = [layer.mlp.gate for layer in model.model.layers]


def most_likely(logits: torch.Tensor, count: int = 4) -> str:
    """The likeliest next tokens with their probabilities."""
    best = logits.softmax(dim=-1).topk(count)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return ", ".join(f"{tokenizer.decode([token])!r} {share:.1%}" for token, share in pairs)


def routed_without(output: tuple[torch.Tensor, ...], expert: int) -> tuple[torch.Tensor, ...]:
    """What a router returns that cannot choose an expert: logits, weights and ids."""
    logits = output[0].index_fill(-1, torch.tensor(expert), -torch.inf)
    return logits, *logits.softmax(dim=-1).topk(output[2].shape[-1])


text = sys.argv[1] if len(sys.argv) > 1 else TEXT

# 1. Read: what every router chose for every token, and what comes next. The weights of chosen experts get gradients,
# which say how much the likeliest next token rests on each expert.
with model.trace(text):
    chosen = nnsight.save([])
    weights = nnsight.save([])
    for router in routers:
        chosen.append(router.output[2])
        weights.append(router.output[1])
    logits = model.output.logits[0, -1].save()
    with logits.log_softmax(dim=-1).max().backward():
        gradients = nnsight.save([])
        for chosen_weights in reversed(weights):  # the order in which gradients come
            gradients.append(chosen_weights.grad)
gradients.reverse()
best = int(logits.argmax())
print(f"{text!r} goes on with {most_likely(logits)}")
tokens = tokenizer(text)["input_ids"]
print(f"\nThe first choice of the last {min(6, len(tokens))} tokens in each layer:")
for place in range(max(0, len(tokens) - 6), len(tokens)):
    firsts = "  ".join(f"layer {layer}: {int(ids[place, 0]):2d}" for layer, ids in enumerate(chosen))
    print(f"  {tokenizer.decode([tokens[place]])!r:12} {firsts}")

# 2. Attribute: weight times gradient, for the experts of the last token.
print(
    f"\nHow much {tokenizer.decode([best])!r} rests on the last token's experts (weight x gradient, the largest three):"
)
rests_on: dict[tuple[int, int], float] = {}
for layer, ids in enumerate(chosen):
    values = (weights[layer] * gradients[layer])[-1].tolist()
    parts = dict(zip(ids[-1].tolist(), values, strict=True))
    rests_on |= {(layer, expert): value for expert, value in parts.items()}
    largest = sorted(parts, key=lambda e: -parts[e])[:3]
    print(f"  layer {layer}: " + "  ".join(f"expert {expert}: {parts[expert]:+.3f}" for expert in largest))
layer, expert = max(rests_on, key=lambda place: rests_on[place])

# 3. Patch: the same text without that expert.
with model.trace(text):
    router = routers[layer]
    router.output = routed_without(router.output, expert)
    patched = model.output.logits[0, -1].save()
before, after = (float(each.detach().log_softmax(dim=-1)[best]) for each in (logits, patched))
print(f"\nWithout expert {expert} of layer {layer}: {most_likely(patched)}")
print(f"  {tokenizer.decode([best])!r}: {before:.2f} -> {after:.2f} nats")

# 4. Steer: in every step of a generation.
STEPS = 20
with model.generate(text, max_new_tokens=STEPS, do_sample=False) as tracer:
    plain = tracer.result.save()
with model.generate(text, max_new_tokens=STEPS, do_sample=False) as tracer:
    seen = nnsight.save([])
    for _ in tracer.iter[:STEPS]:
        router = routers[layer]
        router.output = routed_without(router.output, expert)
        seen.append(router.output[2])
    steered = tracer.result.save()
assert not any((ids == expert).any() for ids in seen)
print("\nThe story goes on:")
print(f"  as it is: {tokenizer.decode(plain[0, len(tokens) :]).strip()!r}")
print(f"  without expert {expert}: {tokenizer.decode(steered[0, len(tokens) :]).strip()!r}")
