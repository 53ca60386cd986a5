"""What two processes with one distributed model compute, for tests/hf/test_model_distributed.py.

A module of its own because spawned processes import their function by name.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from configurations import VOCAB_SIZE
from olmoe import BitsAndBytesConfig, OlmoeForCausalLM
from olmoe.errors import UserError

PROCESSES = 2
LEARNING_RATE = 0.5
IDS = torch.randint(2, VOCAB_SIZE - 1, (2, 9), generator=torch.Generator().manual_seed(0))

# Arguments of from_pretrained for each way to distribute a model.
WAYS = {
    "tensor": {"tp_plan": "auto"},
    "tensor and expert": {"distributed_config": {"tp_size": 2, "ep_size": 2}},
    "the older flag": {"distributed_config": {"tp_plan": "auto", "enable_expert_parallel": True}},
    "fsdp": {"distributed_config": {"fsdp_size": 2}},
    "fsdp and expert": {"distributed_config": {"fsdp_size": 2, "ep_size": 2}},
}


def whole(tensor):
    """The full value of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def evaluate(model):
    """What a model computes: logits, a generated text, the training loss and its gradients."""
    model.eval()
    with torch.no_grad():
        found = {"logits": model(IDS).logits}
    found["text"] = model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None)
    model.train()
    loss = model(IDS, labels=IDS, output_router_logits=True).loss
    loss.backward()
    found["loss"] = loss.detach()
    found["gradients"] = {name: whole(p.grad) for name, p in model.named_parameters()}
    return found


def step(model, ids):
    """The weights after one step of gradient descent."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    return {name: whole(p.detach()) for name, p in model.named_parameters()}


def switch(model):
    """Logits by another experts implementation and by ours again, and the calls of the other one in between."""
    calls = []

    def counted(*args):
        calls.append(1)
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](*args)

    ALL_EXPERTS_FUNCTIONS.register("counted", counted)
    model.eval()
    found = []
    with torch.no_grad():
        for name in ("counted", "eager"):
            model.set_experts_implementation(name)
            found += [model(IDS).logits, len(calls)]
    return found


def refusal(folder):
    """The message for a quantized model that is to be distributed."""
    try:
        OlmoeForCausalLM.from_pretrained(
            folder, tp_plan="auto", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )
    except UserError as error:
        return str(error)
    return None


def work(rank, folder):
    """One of the processes: everything it found goes to `rank<n>.pt` in `folder`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=60),
    )
    results = {}
    for way, options in WAYS.items():
        if "distributed_config" in options:
            options = {"distributed_config": DistributedConfig(**options["distributed_config"])}
        model = OlmoeForCausalLM.from_pretrained(folder, **options)
        results[way] = evaluate(model)
        results[way]["held"] = {
            name: (p.to_local().numel() if isinstance(p, DTensor) else p.numel()) / p.numel()
            for name, p in model.named_parameters()
        }
        results[way]["switched"] = switch(model)
        model.save_pretrained(folder / way)
    model = OlmoeForCausalLM.from_pretrained(folder)
    blocks = {name: m for name, m in model.named_modules() if type(m).__name__ in model._no_split_modules}
    for block in blocks.values():
        fully_shard(block)
    fully_shard(model)
    results["blocks"] = list(blocks)
    results["step"] = step(model, IDS[rank : rank + 1])  # each process learns from its own half of the batch
    results["refusal"] = refusal(folder)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def run(folder: Path):
    """The results of each process for the model in `folder`."""
    mp.spawn(work, (folder,), nprocs=PROCESSES)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(PROCESSES)]
