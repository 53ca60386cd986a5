"""Where checkpoint files are: a local folder, a shipped model, or a Hugging Face hub id."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olmoe.errors import CheckpointError, shown
from olmoe.io import foreign

_ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED_NAME = "olmoe-tiny"
SHIPPED = _ASSETS / SHIPPED_NAME
SHIPPED_CHAT_NAME = "olmoe-tiny-instruct"  # packed in int8; what `olmoe chat` talks to where no model is named
SHIPPED_CHAT = _ASSETS / SHIPPED_CHAT_NAME
_SHIPPED_FOLDERS = {SHIPPED_NAME: SHIPPED, SHIPPED_CHAT_NAME: SHIPPED_CHAT}
# What a load may read; other frameworks' weights on the hub are left there.
PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# The released models, which all have the same architecture: 1b-7b for short, or as the hub names them.
_RELEASED = re.compile(r"1b-7b|(allenai/)?olmoe-1b-7b(-\d{4})?(-(sft|dpo|instruct|rlvr\d*))?", re.IGNORECASE)
_RELEASED_ID = re.compile(r"allenai/olmoe-1b-7b((?:-\d{4})?(?:-(?:sft|dpo|instruct))?)", re.IGNORECASE)
_SPELLING = {"sft": "SFT", "dpo": "DPO", "instruct": "Instruct"}


def is_released(name: str) -> bool:
    """Whether `name` is that of a released model, in upper or lower case, and no file here has that name."""
    return _RELEASED.fullmatch(name) is not None and not os.path.exists(os.path.expanduser(name))


def is_shipped(name: str | Path) -> bool:
    """Whether `name` is that of a shipped model, in letters of either case, and no folder here is called so."""
    return str(name).lower() in _SHIPPED_FOLDERS and not os.path.exists(name)


def folder_or_id(name: Any) -> Any:
    """The folder of a shipped model where `name` is its name; anything else as it is."""
    if isinstance(name, str | Path) and is_shipped(name):
        return str(_SHIPPED_FOLDERS[str(name).lower()])
    return name


def resolve(
    model_id: str | Path, *, revision: str | None = None, token: str | None = None, local_files_only: bool = False
) -> Path:
    """The folder with a model's files, which are downloaded from the hub if `model_id` is not a local folder.

    "olmoe-tiny" and "olmoe-tiny-instruct" are shipped. `HF_HUB_OFFLINE`, `HF_TOKEN` and the hub's cache settings are
    honoured by the hub library. Raises `CheckpointError` if there is no such folder, repository or revision, or no
    access to it.
    """
    found = _local_folder(str(model_id), revision)
    if found is not None:
        return found
    name = _hub_id(str(model_id), revision)
    # Imported here: most runs read a local folder and need not pay for the hub library.
    from huggingface_hub import snapshot_download

    with _hub_errors(name, revision):
        folder = Path(
            snapshot_download(
                name, revision=revision, token=token, local_files_only=local_files_only, allow_patterns=PATTERNS
            )
        )
    foreign.check_folder(folder)
    return folder


def resolve_config(
    model_id: str, *, revision: str | None = None, token: str | None = None, local_files_only: bool = False
) -> Path:
    """The folder of a model, with only its `config.json` if its weights would have to be downloaded.

    Errors are those of `resolve`.
    """
    found = _local_folder(model_id, revision)
    if found is not None:
        return found
    name = _hub_id(model_id, revision)
    with contextlib.suppress(CheckpointError):
        folder = resolve(name, revision=revision, local_files_only=True)
        if any(folder.glob("*.safetensors")):
            return folder
    from huggingface_hub import hf_hub_download

    with _hub_errors(name, revision):
        return Path(
            hf_hub_download(name, "config.json", revision=revision, token=token, local_files_only=local_files_only)
        )


def _local_folder(name: str, revision: str | None) -> Path | None:
    """The folder on this machine that `name` means; None if it can only be a hub id."""
    if not name:  # Path("") would be the current folder
        raise CheckpointError("The name of the model is empty; give a folder or a hub id of the form owner/name.")
    path = Path(os.path.expanduser(folder_or_id(name)))
    # os.path answers "no" where Path would raise: names too long, folders that cannot be entered.
    if os.path.isdir(path):
        if revision is not None:
            raise CheckpointError(f"A revision ({revision!r}) was given, but {path} is a local folder, which has none.")
        foreign.check_folder(path)
        return path
    if name.lower().endswith(".gguf"):
        if not os.path.exists(path):
            raise CheckpointError(f"There is no file {shown(name)}; check the path of the GGUF file.")
        raise CheckpointError(
            f"{path} is a GGUF file; pack it with `olmoe quantize FILE DIR --format int4` (or int8), or unpack it with "
            "`olmoe convert FILE DIR`, and give the folder DIR."
        )
    if os.path.exists(path):
        raise CheckpointError(f"{path} is a file; give the folder that holds config.json and the safetensors files.")
    return None


def _hub_id(name: str, revision: str | None) -> str:
    """`name` if it can be a hub id."""
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise CheckpointError(f"There is no folder {shown(name)}, and it is not a hub id of the form owner/name.")
    if revision == "":
        raise CheckpointError("The revision is empty; give a branch, tag or commit, or leave it out.")
    released = _RELEASED_ID.fullmatch(name)
    if released is None:
        return name
    # The hub ignores case, but its cache on this machine does not.
    return "allenai/OLMoE-1B-7B" + "".join(_SPELLING.get(part, part) for part in re.split("(-)", released[1].lower()))


@contextlib.contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turn the hub library's errors into one sentence."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise CheckpointError(f"{name} is gated on the hub: request access, then pass a token.") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{name} on the hub has no revision {revision!r}.") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"There is no folder {name!r} and no such repository on the hub (or it is private)."
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        wanted = name if revision is None else f"{name} at revision {revision!r}"
        raise CheckpointError(
            f"There is no folder {name!r}, and the hub model {wanted} is neither complete in the local cache nor "
            "reachable (offline mode, or no network); check the name, or download it where there is a network."
        ) from None
    except EntryNotFoundError:
        raise CheckpointError(f"{name} on the hub has no config.json, so it is not a model that can be read.") from None
    except HFValidationError:
        raise CheckpointError(f"There is no folder {shown(name)}, and it is not a valid hub id.") from None
    except Exception as error:
        # Whatever the hub's HTTP client (which differs from release to release), its transfer library or the
        # disk raised: the files are not here. The cause stays attached for those who need it.
        reason = next(iter(str(error).splitlines()), "").rstrip(". ") or type(error).__name__
        raise CheckpointError(f"{name} could not be fetched from the hub: {reason}.") from error
