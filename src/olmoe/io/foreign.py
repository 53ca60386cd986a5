"""Recognises files, folders and tensors that are not checkpoints of ours, and says how to turn them into one.

Used only after something did not fit: then the user learns what is there instead of what is missing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from olmoe.errors import CheckpointError, shown

# How a file starts -> what it is, and what to do.
_CONTENTS = (
    (b"version https://git-lfs", "a Git LFS pointer to one; fetch it with `git lfs pull`"),
    (b"<!doctype html", "a web page (an error of a download, most likely); fetch the file again"),
    (b"<html", "a web page (an error of a download, most likely); fetch the file again"),
    (b"<?xml", "an XML document (an error of a download, most likely); fetch the file again"),
    (b"pk\x03\x04", "a file of torch.save under another name; load it with torch and save it as safetensors"),
    (b'{"error', "an error message of a download; fetch the file again"),
)

# Weights that are not safetensors, by the ends of their names.
_OTHER_WEIGHTS = (".bin", ".pth", ".pt", ".ckpt", ".msgpack", ".h5", ".distcp", ".npz", ".gguf")

_REMEDY_WRAPPER = "save the model inside the wrapper"
_WRAPPERS = {
    "_orig_mod.": ("torch.compile", f"{_REMEDY_WRAPPER} (`model._orig_mod.save_pretrained(DIR)`)"),
    "module.": ("DataParallel or DeepSpeed", f"{_REMEDY_WRAPPER} (`model.module.save_pretrained(DIR)`)"),
    "_fsdp_wrapped_module.": ("FSDP", "save a full state dict of the model inside (`get_model_state_dict`)"),
    "_checkpoint_wrapped_module.": ("activation checkpointing", _REMEDY_WRAPPER),
    "_forward_module.": ("Lightning", _REMEDY_WRAPPER),
    "pretrained_model.": ("TRL's value head", f"{_REMEDY_WRAPPER} (`model.pretrained_model.save_pretrained(DIR)`)"),
    "language_model.": ("a model of several parts", "save its language model alone"),
}
_MERGE = "give it as --adapter, or merge it first with `olmoe convert DIR NEW --merge`"
_MERGE_WEIGHTS = "merge them first (`model.merge_and_unload().save_pretrained(NEW)`)"
_ADAPTER = re.compile(
    r"^base_model\.model\.|\.(lora_|base_layer\.|modules_to_save\.|original_module\.|hada_|ia3_|oft_)"
)
_QUANTIZED = {
    re.compile(r"\.(qweight|qzeros|g_idx)$"): "GPTQ or AWQ",
    re.compile(r"\.quant_state\.bitsandbytes|\.weight\.(absmax|nested_absmax|quant_map)$|\.SCB$"): "bitsandbytes",
    re.compile(r"\.weight_(packed|scale_inv)$"): "compressed-tensors or FP8",
}


def check_contents(path: Path, wanted: str) -> None:
    """Raise `CheckpointError` if a file that could not be read as a `wanted` one is of another known kind."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return
    for mark, what in _CONTENTS:
        if start.lstrip().lower().startswith(mark):
            raise CheckpointError(f"{path} is not a {wanted} but {what}.")


def check_folder(folder: Path) -> None:
    """Raise `CheckpointError` if a folder is of a known kind other than a checkpoint."""
    try:
        names = set(os.listdir(folder))
    except OSError:
        return
    weights = any(name.endswith(".safetensors") and name.startswith("model") for name in names)
    if "adapter_config.json" in names and not weights:
        raise CheckpointError(f"{folder} is an adapter{_base_of(folder)}, not a whole model; {_MERGE}.")
    if "config.json" in names:
        return
    for kind in (_cache_of_the_hub, _folder_of_checkpoints, _other_format):
        what = kind(folder, names)
        if what is not None:
            raise CheckpointError(f"{folder} {what}.")


def other_weights(folder: Path) -> str:
    """What to say about a folder without safetensors: which weights it holds instead, and what to do with them."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return ""
    found = [name for name in names if name.endswith(_OTHER_WEIGHTS) and name != "training_args.bin"]
    if not found:
        return ""
    if found[0].endswith(".gguf"):
        return f" but {found[0]}; give that file to `olmoe quantize` or `olmoe convert`, and the folder they write here"
    kind = Path(found[0]).suffix
    return (
        f" but {kind} files; convert them to safetensors first, with transformers: "
        "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
    )


_HEADS = {
    "score.": "a classifier; load it with olmoe.OlmoeForSequenceClassification",
    "v_head.": "a model with TRL's value head; save the language model inside it (`model.pretrained_model`)",
}


def check_names(names: Iterable[str]) -> None:
    """Raise `CheckpointError` if tensors have the names of a wrapper, an adapter or a quantized model."""
    names = list(names)
    for name in names:
        if ".mlp.shared_expert" in name:
            raise CheckpointError(
                f"The checkpoint holds the tensor {shown(name)} of a shared expert, which OLMoE does not have; what "
                "was trained with one can be measured by its own training run, but not be run, exported or packed."
            )
        if _ADAPTER.search(name):
            raise CheckpointError(
                f"The checkpoint holds the tensor {shown(name)}, which belongs to an adapter of PEFT or to the "
                f"layer under one; {_MERGE_WEIGHTS}."
            )
        for pattern, method in _QUANTIZED.items():
            if pattern.search(name):
                raise CheckpointError(
                    f"The checkpoint holds the tensor {shown(name)}, so it was quantized by {method}; load the "
                    "unquantized one and pack it with `olmoe quantize`."
                )
    for name in names:
        for prefix, (what, remedy) in _WRAPPERS.items():
            if name.startswith(prefix) or f".{prefix}" in name:
                raise CheckpointError(
                    f"The checkpoint holds the tensor {shown(name)}, whose {prefix!r} comes from {what}; {remedy}."
                )
        for prefix, what in _HEADS.items():
            if name.startswith(prefix):
                raise CheckpointError(f"The checkpoint holds the tensor {shown(name)}, so it is {what}.")
    if any(re.match(r"(transformer\.)?blocks\.\d+\.", name) for name in names):
        raise CheckpointError(
            "The checkpoint is in OLMo's own training format (transformer.blocks...); convert it with transformers' "
            "convert_olmoe_weights_to_hf.py first."
        )
    if any(re.match(r"layers\.\d+\.", name) for name in names) or "embed_tokens.weight" in names:
        raise CheckpointError(
            "The checkpoint holds a decoder without its output head (its names lack 'model.'), so it cannot write "
            "text; save the whole OlmoeForCausalLM."
        )


def _base_of(folder: Path) -> str:
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f" for {shown(base)}" if base else ""


def _cache_of_the_hub(folder: Path, names: set[str]) -> str | None:
    """A folder of the hub library's cache: of one repository, a part of one, or the whole cache."""
    repository = next((p for p in (folder, *folder.absolute().parents) if p.name.startswith("models--")), None)
    if repository is not None and (repository / "snapshots").is_dir():
        found = sorted(p.name for p in (repository / "snapshots").iterdir())
        hub_id = repository.name.removeprefix("models--").replace("--", "/")
        snapshot = f", or its snapshot {repository / 'snapshots' / found[0]}" if found else ""
        if folder.parent.name != "snapshots":
            return f"belongs to the cache of the hub; give the hub id {hub_id}{snapshot}"
    if any(name.startswith("models--") for name in names):
        first = min(name for name in names if name.startswith("models--"))
        hub_id = first.removeprefix("models--").replace("--", "/")
        return f"is the cache of the hub, with several models; give the hub id of one, such as {hub_id}"
    return None


def _folder_of_checkpoints(folder: Path, names: set[str]) -> str | None:
    """The output folder of a training run, which contains checkpoints."""
    if any((folder / "best" / name).is_file() for name in ("config.json", "adapter_config.json")):
        return f"is the output of a training run; give one of its checkpoints, such as {folder / 'best'}"
    steps = [name for name in names if re.fullmatch(r"(checkpoint|step)-\d+", name)]
    steps = [name for name in steps if (folder / name / "config.json").is_file()]
    if not steps and (folder / "checkpoints").is_dir():
        return _folder_of_checkpoints(folder / "checkpoints", set(os.listdir(folder / "checkpoints")))
    if steps:
        newest = max(steps, key=lambda name: int(name.rpartition("-")[2]))
        return f"holds checkpoints of a training run; give one of them, such as {folder / newest}"
    return None


def _other_format(folder: Path, names: set[str]) -> str | None:
    """Weights in a format that is not Hugging Face's, without its config.json."""
    if any(name.endswith(".distcp") for name in names) or any(name.startswith("global_step") for name in names):
        return (
            "holds a distributed checkpoint (torch.distributed or DeepSpeed), one part per process; gather it into "
            "safetensors with save_pretrained first"
        )
    if "config.yaml" in names and names & {"model.pt", "model.safetensors"}:
        return "is in OLMo's own training format; convert it with transformers' convert_olmoe_weights_to_hf.py first"
    if "params.json" in names or "consolidated.00.pth" in names:
        return "is in the original format of its authors; convert it to Hugging Face's first"
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
    if ggufs and not any(name.endswith(".safetensors") for name in names):
        return (
            f"holds the GGUF file {ggufs[0]}; pack it with `olmoe quantize FILE DIR --format int4` (or int8), or "
            "unpack it with `olmoe convert FILE DIR`, and give the folder DIR"
        )
    return None
