"""Where checkpoint files are: a local folder, the shipped model, or a Hugging Face hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from olmoe import foreign
from olmoe.errors import CheckpointError, shown

SHIPPED = Path(__file__).parent / "assets" / "olmoe-tiny"
# What a load may read; other frameworks' weights on the hub are left there.
PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve(
    model_id: str | Path, *, revision: str | None = None, token: str | None = None, local_files_only: bool = False
) -> Path:
    """The folder with a model's files, downloading them from the hub if `model_id` is no local folder.

    `HF_HUB_OFFLINE`, `HF_TOKEN` and the hub's cache settings are honoured by the hub library. Raises
    `CheckpointError` if there is no such folder, repository or revision, or no access to it.
    """
    name = str(model_id)
    if not name:  # Path("") would be the current folder
        raise CheckpointError("The name of the model is empty; give a folder or a hub id of the form owner/name.")
    path = Path(os.path.expanduser(name))
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
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise CheckpointError(f"There is no folder {shown(name)}, and it is not a hub id of the form owner/name.")
    if revision == "":
        raise CheckpointError("The revision is empty; give a branch, tag or commit, or leave it out.")
    # Imported here: most runs read a local folder and need not pay for the hub library.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(
            snapshot_download(
                name, revision=revision, token=token, local_files_only=local_files_only, allow_patterns=PATTERNS
            )
        )
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
            "reachable (offline mode, or no network)."
        ) from None
    except HFValidationError:
        raise CheckpointError(f"There is no folder {shown(name)}, and it is not a valid hub id.") from None
    except Exception as error:
        # Whatever the hub's HTTP client (which changed from release to release), its transfer library or the
        # disk came up with: the files are not here. The cause stays attached for who wants to look.
        reason = next(iter(str(error).splitlines()), "").rstrip(". ") or type(error).__name__
        raise CheckpointError(f"{name} could not be fetched from the hub: {reason}.") from error
    foreign.check_folder(folder)
    return folder
