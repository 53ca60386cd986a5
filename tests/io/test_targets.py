"""What may be written over: nothing that exists, unless asked, and then only what the writer itself wrote."""

from __future__ import annotations

import os

import pytest

from olmoe.errors import UserError
from olmoe.io import targets
from sentences import refused

NAMES = {"config.json", "model.safetensors"}


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_new_and_empty_places_are_free(tmp_path):
    targets.check_file(tmp_path / "x", overwrite=False)
    targets.check_folder(tmp_path / "x" / "y", NAMES, overwrite=False)
    (tmp_path / "empty").mkdir()
    targets.check_folder(tmp_path / "empty", NAMES, overwrite=False)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    targets.check_folder(tmp_path / "link", NAMES, overwrite=False)


@pytest.mark.parametrize("held", [("config.json",), ("notes.txt",), ("config.json", "model.safetensors"), (".hidden",)])
def test_a_folder_with_anything_in_it_is_refused_and_named(tmp_path, held):
    message = refused(lambda: targets.check_folder(fill(tmp_path / "d", *held), NAMES, overwrite=False))
    assert held[0] in message
    assert "--overwrite" in message


def test_overwriting_is_for_our_own_files_only(tmp_path):
    targets.check_folder(fill(tmp_path / "ours", *NAMES), NAMES, overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    targets.check_folder(tmp_path / "link", NAMES, overwrite=True)
    for foreign in ("notes.txt", "training_state.pt", "sub/deep.txt", "model-00001-of-00002.safetensors"):
        folder = fill(tmp_path / foreign.replace("/", "-"), *NAMES, foreign)
        message = refused(lambda folder=folder: targets.check_folder(folder, NAMES, overwrite=True))
        assert foreign.split("/")[0] in message
        assert "--overwrite" in message
    shards = fill(tmp_path / "shards", "model-00001-of-00002.safetensors", "model.safetensors.index.json")
    targets.check_folder(shards, NAMES, overwrite=True, shards=True)
    (tmp_path / "odd" / "config.json").mkdir(parents=True)  # a folder under the name of a file
    assert "config.json" in refused(lambda: targets.check_folder(tmp_path / "odd", NAMES, overwrite=True))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_folder_and_a_folder_no_file(tmp_path, overwrite):
    fill(tmp_path, "file")
    assert "is a file" in refused(lambda: targets.check_folder(tmp_path / "file", NAMES, overwrite=overwrite))
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert "link to nothing" in refused(lambda: targets.check_folder(tmp_path / "dangling", NAMES, overwrite=overwrite))
    assert "choose" in refused(lambda: targets.check_file(tmp_path, overwrite=overwrite))


def test_a_file_is_replaced_on_request(tmp_path):
    fill(tmp_path, "x.gguf")
    assert "--overwrite" in refused(lambda: targets.check_file(tmp_path / "x.gguf", overwrite=False))
    targets.check_file(tmp_path / "x.gguf", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_source_is_never_replaced(tmp_path, overwrite):
    source = fill(tmp_path / "a" / "model", *NAMES)
    (tmp_path / "link").symlink_to(source)
    os.link(fill(tmp_path, "x.gguf") / "x.gguf", tmp_path / "y.gguf")

    def check(target, source=source):
        return lambda: targets.check_folder(target, NAMES, overwrite=overwrite, source=source)

    assert "SRC and DST" in refused(check(source))
    assert "SRC and DST" in refused(check(tmp_path / "link"))
    assert "SRC and DST" in refused(check(source, tmp_path / "link"))
    assert "holds the source" in refused(check(tmp_path / "a"))
    assert "holds the source" in refused(check(source, source / "model.safetensors"))
    hard = refused(lambda: targets.check_file(tmp_path / "y.gguf", overwrite=overwrite, source=tmp_path / "x.gguf"))
    assert "SRC and DST" in hard


def test_what_is_foreign_stays_beside_the_new(tmp_path):
    folder = fill(tmp_path / "d", "config.json", "notes.txt", "sub/deep.txt", "old.bin")
    (folder / "link").symlink_to("notes.txt")
    with targets.folder_that_keeps(folder, ["notes.txt", "sub", "link"]) as temporary:
        (temporary / "config.json").write_text("new")
    texts = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert texts == {
        "config.json": "new",
        "notes.txt": "notes.txt",
        "sub/deep.txt": "sub/deep.txt",
        "link": "notes.txt",
    }
    assert (folder / "link").is_symlink()
    with pytest.raises(UserError, match="bad"), targets.folder_that_keeps(folder, ["notes.txt"]) as temporary:
        raise UserError("This is a bad day.")
    assert sorted(os.listdir(folder)) == ["config.json", "link", "notes.txt", "sub"]
    assert os.listdir(tmp_path) == ["d"]


def test_a_command_s_own_option_is_named_and_python_s_is_not(tmp_path):
    fill(tmp_path, "file")
    by_command = refused(lambda: targets.check_file(tmp_path / "file", overwrite=False, option="--output"))
    assert by_command.endswith("exists already; choose another name, or replace it with --overwrite.")
    assert "overwrite=True" in refused(lambda: targets.check_file(tmp_path / "file", overwrite=False))
    assert "--output cannot" in refused(lambda: targets.check_file(tmp_path, overwrite=True, option="--output"))


def test_a_place_is_one_where_folders_can_be_made(tmp_path):
    fill(tmp_path, "file")
    targets.check_place(tmp_path / "new" / "newer" / "x")
    assert "cannot be written, because" in refused(lambda: targets.check_place(tmp_path / "file" / "x"))


def test_only_checkpoints_are_replaced_whole(tmp_path):
    targets.check_is_checkpoint(tmp_path / "new", "packing")
    targets.check_is_checkpoint(fill(tmp_path / "ours", "config.json", "notes.txt"), "packing")
    message = refused(lambda: targets.check_is_checkpoint(fill(tmp_path / "theirs", "notes.txt"), "packing"))
    assert "holds other files and no config.json; packing would replace it entirely" in message
