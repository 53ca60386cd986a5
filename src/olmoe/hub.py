"""Where checkpoint files are: a local folder, the shipped model, or a Hugging Face hub id."""

from __future__ import annotations

import re
from pathlib import Path

from olmoe.errors import CheckpointError

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
    path = Path(model_id).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"A revision ({revision!r}) was given, but {path} is a local folder, which has none.")
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the folder that holds config.json and the safetensors files.")
    name = str(model_id)
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise CheckpointError(f"There is no folder {name!r}, and it is not a hub id of the form owner/name.")
    # Imported here: most runs read a local folder and need not pay for the hub library.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
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
        raise CheckpointError(
            f"There is no folder {name!r}, and the hub model is neither in the local cache nor reachable "
            "(offline mode, or no network)."
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{name} could not be fetched from the hub: {error}.") from None
