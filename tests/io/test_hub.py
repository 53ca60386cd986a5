"""Finding a model: folders, hub ids through a cache laid out as the hub library does, and every way it can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from conftest import make_model
from olmoe.engine.llm import LLM
from olmoe.errors import CheckpointError
from olmoe.io import hub
from olmoe.weights import checkpoint, export
from sentences import refused

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BRANCH_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working folder and an empty cache, so that nothing of this machine is found."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def fill_cache(cache: Path, commit: str, ref: str, seed: int) -> None:
    """A sharded checkpoint as the hub library keeps it: blobs, symbolic links to them, and named commits."""
    repository = cache / "models--owner--tiny"
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    export.save(make_model(seed=seed), snapshot, max_shard_bytes=50_000)
    blobs.mkdir(exist_ok=True)
    for number, file in enumerate(sorted(snapshot.iterdir())):
        blob = blobs / f"{seed}{number:063d}"
        file.rename(blob)
        file.symlink_to(Path("../../blobs") / blob.name)
    path = repository / "refs" / ref
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(commit)


@pytest.fixture
def cached(tmp_path) -> Path:
    fill_cache(tmp_path / "cache", COMMIT, "main", seed=1)
    fill_cache(tmp_path / "cache", BRANCH_COMMIT, "step5000-tokens20B", seed=2)
    return tmp_path / "cache" / "models--owner--tiny" / "snapshots"


# ---- what is found ----


def test_a_folder_is_itself(tmp_path):
    (tmp_path / "work" / "owner" / "tiny").mkdir(parents=True)
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path)) == tmp_path
    assert hub.resolve("owner/tiny") == Path("owner/tiny")  # a folder wins over a hub id of the same name
    assert hub.resolve(".") == Path()
    (tmp_path / "home" / "model").mkdir(parents=True)
    assert hub.resolve("~/model") == tmp_path / "home" / "model"


@pytest.mark.parametrize("local_files_only", [True, False])
def test_a_hub_id_resolves_from_the_cache_when_offline(cached, local_files_only):
    # The whole test run is offline (conftest), so without local_files_only this is HF_HUB_OFFLINE.
    assert constants.is_offline_mode()

    def resolve(revision: str | None = None) -> Path:
        return hub.resolve("owner/tiny", revision=revision, local_files_only=local_files_only)

    assert resolve() == resolve("main") == resolve(COMMIT) == cached / COMMIT
    assert resolve("step5000-tokens20B") == resolve(BRANCH_COMMIT) == cached / BRANCH_COMMIT
    assert "'step1-tokens0B'" in refused(lambda: resolve("step1-tokens0B"))


def test_a_model_loads_by_hub_id_and_revision(cached):
    for revision, seed in ((None, 1), ("step5000-tokens20B", 2)):
        loaded = checkpoint.load("owner/tiny", revision=revision, local_files_only=True)
        for name, value in make_model(seed=seed).state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)


def test_arguments_reach_the_hub_library(monkeypatch, tmp_path):
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("owner/tiny") == tmp_path
    assert hub.resolve("owner/tiny", revision="fp32", token="secret", local_files_only=True) == tmp_path
    assert hub.resolve("gpt2") == tmp_path
    patterns = {"allow_patterns": hub.PATTERNS}
    assert calls == [
        ("owner/tiny", {"revision": None, "token": None, "local_files_only": False, **patterns}),
        ("owner/tiny", {"revision": "fp32", "token": "secret", "local_files_only": True, **patterns}),
        ("gpt2", {"revision": None, "token": None, "local_files_only": False, **patterns}),
    ]


def test_the_patterns_take_a_checkpoint_and_leave_other_frameworks():
    names = ["config.json", "model-00001-of-00003.safetensors", "tokenizer.json", "chat_template.jinja"]
    others = ["pytorch_model.bin", "README.md", "tf_model.h5", "olmoe-q4.gguf"]
    kept = huggingface_hub.utils.filter_repo_objects(names + others, allow_patterns=hub.PATTERNS)
    assert list(kept) == names


# ---- what is not ----


def test_a_local_folder_has_no_revision(tmp_path):
    message = refused(lambda: hub.resolve(tmp_path, revision="main"))
    assert "'main'" in message
    assert str(tmp_path) in message


def test_a_file_is_not_a_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert "is a file" in refused(lambda: hub.resolve(file))


@pytest.mark.parametrize("suffix", ["gguf", "GGUF"])
def test_a_gguf_file_is_refused_with_the_way_to_a_folder(tmp_path, suffix):
    file = tmp_path / f"model.{suffix}"
    assert "no file" in refused(lambda: hub.resolve(file), CheckpointError)  # and the hub is not asked
    file.write_bytes(b"GGUF")
    for load in (lambda: hub.resolve(file), lambda: LLM(file)):
        message = refused(load, CheckpointError)
        assert "olmoe quantize" in message
        assert "olmoe convert" in message


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/no/such/folder",
        "./nothing",
        "../nothing",
        "a/b/c",
        "owner/",
        "/",
        "owner/tiny\n",
        "a b",
        "a\0b",
        "https://huggingface.co/owner/tiny",
        "~nobody-of-that-name/tiny",
        "owner/" + "x" * 300,  # too long for a file name
        "owner/tiny.git",  # the last ones look like hub ids until the hub library looks closer
        "owner--x/tiny",
        "-owner/tiny",
        "owner/..",
        "x" * 97,
        "模型/小",
        "x" * 5_000,
    ],
    ids=lambda name: repr(name[:20]),
)
def test_names_that_can_be_neither(name, monkeypatch):
    if name == "/":
        monkeypatch.setattr("os.path.isdir", lambda _: False)
        monkeypatch.setattr("os.path.exists", lambda _: False)
    refused(lambda: hub.resolve(name), CheckpointError)


def test_an_empty_revision_is_no_revision(cached):
    assert "revision" in refused(lambda: hub.resolve("owner/tiny", revision=""))


def http_error(kind: type[Exception], status: int) -> Exception:
    text = f"{status} Client Error. (Request ID: Root=1-abc)\n\nCannot access url: https://huggingface.co/owner/tiny."
    response = MagicMock(status_code=status, headers={})
    return kind(text, response=response)


@pytest.mark.parametrize(
    ("error", "pattern"),
    [
        (http_error(errors.RepositoryNotFoundError, 404), "no such repository"),
        (http_error(errors.GatedRepoError, 403), "gated"),
        (http_error(errors.RevisionNotFoundError, 404), "no revision 'branch'"),
        (http_error(errors.HfHubHTTPError, 500), "500 Client Error"),
        (http_error(errors.DisabledRepoError, 403), "403 Client Error"),
        (errors.LocalEntryNotFoundError("Cannot find\nan appropriate snapshot."), "at revision 'branch'.*offline"),
        (errors.IncompleteSnapshotError("Cannot find\nall files.", "path"), "complete in the local cache"),
        (errors.OfflineModeIsEnabled("HF_HUB_OFFLINE=1"), "offline"),
        (errors.LocalTokenNotFoundError("Token is required (`token=True`)."), "Token is required"),
        (errors.HFValidationError("Repo id must use\nalphanumeric chars."), "not a valid hub id"),
        (errors.XetDownloadError("xet says no"), "xet says no"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (PermissionError(13, "Permission denied", "/cache"), "Permission denied"),
        # httpx's errors derive from Exception alone, and some have no text
        (type("ReadTimeout", (Exception,), {})(""), "hub: ReadTimeout"),
        (AssertionError(), "hub: AssertionError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_failure_of_the_hub_is_one_sentence(error, pattern, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", MagicMock(side_effect=error))
    message = refused(lambda: hub.resolve("owner/tiny", revision="branch", token="secret"), CheckpointError)
    assert "owner/tiny" in message
    assert "secret" not in message
    with pytest.raises(CheckpointError, match=pattern):
        hub.resolve("owner/tiny", revision="branch")


def test_an_interrupted_download_stays_an_interrupt(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", MagicMock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        hub.resolve("owner/tiny")


def test_local_folders_do_not_need_the_hub_library(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert hub.resolve(tmp_path) == tmp_path


# ---- names ----


@pytest.mark.parametrize("name", ["olmoe-tiny", "OLMoE-tiny", "OLMOE-TINY"])
def test_the_shipped_model_has_a_name(tmp_path, name):
    assert hub.resolve(name) == hub.resolve(Path(name)) == hub.SHIPPED
    assert "revision" in refused(lambda: hub.resolve(name, revision="main"))
    Path(name).mkdir()  # a folder of that name comes first
    assert hub.resolve(name) == Path(name)


@pytest.mark.parametrize(
    ("name", "spelled"),
    [
        ("allenai/olmoe-1b-7b-0924", "allenai/OLMoE-1B-7B-0924"),
        ("AllenAI/OLMOE-1B-7B-0125-instruct", "allenai/OLMoE-1B-7B-0125-Instruct"),
        ("allenai/OLMoE-1B-7B-0924-sft", "allenai/OLMoE-1B-7B-0924-SFT"),
        ("Owner/Tiny", "Owner/Tiny"),
    ],
)
def test_released_models_are_asked_for_as_the_hub_spells_them(monkeypatch, tmp_path, name, spelled):
    calls = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: calls.append(name) or str(tmp_path)
    )
    hub.resolve(name)
    assert calls == [spelled]


def test_a_configuration_is_fetched_without_the_weights(monkeypatch, cached, tmp_path):
    assert hub.resolve_config("owner/tiny") == cached / COMMIT  # its weights are there already
    asked = []

    def fetch(name, file, **options):
        asked.append((name, file, options["revision"]))
        return str(tmp_path / "config.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert hub.resolve_config("owner/other", revision="x") == tmp_path / "config.json"
    assert asked == [("owner/other", "config.json", "x")]
    assert hub.resolve_config("olmoe-tiny") == hub.SHIPPED
    monkeypatch.undo()
    assert "no folder 'owner/none'" in refused(lambda: hub.resolve_config("owner/none", local_files_only=True))
