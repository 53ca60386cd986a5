"""Files and folders appear whole or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from olmoe.errors import UserError
from olmoe.io.atomic import atomic_file, atomic_folder, write_text
from sentences import refused


def tree(folder: Path) -> dict[str, str | None]:
    """Everything below `folder`: texts by name, None for folders; links are followed."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def write_folder(target: Path | str, text: str = "new", fail: BaseException | None = None) -> None:
    with atomic_folder(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text(text)
        if fail is not None:
            raise fail


def write_file(target: Path | str, text: str = "new", fail: BaseException | None = None) -> None:
    with atomic_file(target) as temporary:
        temporary.write_text(text)
        if fail is not None:
            raise fail


WRITERS = pytest.mark.parametrize("write", [write_folder, write_file])
FAILURES = [RuntimeError("a bug"), KeyboardInterrupt(), FileNotFoundError(errno.ENOENT, "not our file"), SystemExit(3)]


@WRITERS
def test_nothing_is_seen_before_the_end(write, tmp_path):
    context = atomic_folder(tmp_path / "a" / "b") if write is write_folder else atomic_file(tmp_path / "a" / "b")
    with context as temporary:
        if write is write_file:
            temporary.write_text("x")
        assert not (tmp_path / "a" / "b").exists()
        assert temporary.parent == tmp_path / "a"  # the same file system, or the rename would not be atomic
        assert temporary.name.startswith(".")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


@WRITERS
def test_the_old_is_replaced_whole(write, tmp_path):
    target = tmp_path / "target"
    if write is write_folder:
        target.mkdir()
        (target / "old").write_text("old")
    else:
        target.write_text("old")
    write(target)
    expected = {"target": None, "target/sub": None, "target/sub/file": "new"}
    assert tree(tmp_path) == (expected if write is write_folder else {"target": "new"})


@WRITERS
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_failure_passes_through_and_leaves_everything_as_it_was(write, existing, failure, tmp_path):
    if existing:
        write(tmp_path / "target", "old")
    before = tree(tmp_path)
    with pytest.raises(type(failure)) as caught:
        write(tmp_path / "target", fail=failure)
    assert caught.value is failure
    assert tree(tmp_path) == before


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")], ids=str)
def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(failure, tmp_path, monkeypatch):
    write_folder(tmp_path / "target", "old")
    before = tree(tmp_path)
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self.name.endswith(".partial"):
            raise failure
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(type(failure)):
        write_folder(tmp_path / "target")
    assert tree(tmp_path) == before


def test_an_interrupt_while_the_old_folder_is_removed_leaves_nothing_of_it(tmp_path, monkeypatch):
    write_folder(tmp_path / "target", "old")
    unlink, calls = os.unlink, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        unlink(*arguments, **options)

    monkeypatch.setattr(os, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "target")
    assert tree(tmp_path) == {"target": None, "target/sub": None, "target/sub/file": "new"}


@WRITERS
def test_permissions_follow_the_umask(write, tmp_path):
    for mask in (0o022, 0o077, 0o002):
        previous = os.umask(mask)
        try:
            write(tmp_path / f"{mask}")
        finally:
            assert os.umask(previous) == mask
        full = 0o777 if write is write_folder else 0o666
        assert (tmp_path / f"{mask}").stat().st_mode & 0o777 == full & ~mask


@WRITERS
def test_a_symbolic_link_stays_and_its_target_is_replaced(write, tmp_path):
    (tmp_path / "disk").mkdir()
    write(tmp_path / "disk" / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    assert tree(tmp_path / "disk") == (
        {"real": None, "real/sub": None, "real/sub/file": "new"} if write is write_folder else {"real": "new"}
    )


@WRITERS
def test_relative_places(write, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write("name")
    write("../other")
    assert {path.name for path in tmp_path.iterdir()} == {"here", "other"}
    assert (tmp_path / "here" / "name").exists()


@WRITERS
def test_places_that_cannot_be_written_are_one_sentence(write, tmp_path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = {"file": "a file", "folder": None}
    wrong_kind = tmp_path / ("file" if write is write_folder else "folder")
    for place in (wrong_kind, tmp_path / "file" / "below", tmp_path / "file" / "far" / "below", tmp_path / ("x" * 300)):
        assert str(place) in refused(lambda place=place: write(place))
    refused(lambda: write(tmp_path / "loop" / "below"))
    (tmp_path / "loop").unlink()
    assert tree(tmp_path) == before


@WRITERS
@pytest.mark.parametrize(
    ("number", "pattern"),
    [
        (errno.ENOSPC, "^The disk is full"),
        (errno.EDQUOT, "cannot be written"),
        (errno.EACCES, r"cannot be written \(Permission denied\)"),
        (errno.EROFS, r"cannot be written \(Read-only file system\)"),
        (errno.EFBIG, "cannot be written"),
    ],
)
def test_what_the_file_system_refuses_is_one_sentence(write, number, pattern, tmp_path):
    write(tmp_path / "target", "old")
    before = tree(tmp_path)
    error = OSError(number, os.strerror(number))
    with pytest.raises(UserError, match=pattern) as caught:
        write(tmp_path / "target", fail=error)
    assert caught.value.__cause__ is error
    refused(lambda: write(tmp_path / "target", fail=error))
    assert tree(tmp_path) == before


def test_writers_at_the_same_time_do_not_mix(tmp_path):
    texts = [letter * 200_000 for letter in "abcd"]
    start = threading.Barrier(len(texts))
    failures: list[BaseException] = []

    def work(text: str) -> None:
        start.wait()
        try:
            for _ in range(20):
                write_text(tmp_path / "file", text)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert (tmp_path / "file").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_text_is_utf8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    write_text(tmp_path / "file", "Ünïcode 模型\n")
    assert (tmp_path / "file").read_bytes() == "Ünïcode 模型\n".encode()


@WRITERS
@pytest.mark.parametrize("number", [errno.EACCES, errno.EISDIR, errno.ENOSPC, errno.ENOTDIR, errno.EPERM])
def test_what_is_refused_to_another_file_is_not_blamed_on_the_target(write, number, tmp_path):
    write(tmp_path / "target", "old")
    before = tree(tmp_path)
    error = OSError(number, os.strerror(number), str(tmp_path / "source"))
    with pytest.raises(OSError, match="source") as caught:
        write(tmp_path / "target", fail=error)
    assert caught.value is error
    assert tree(tmp_path) == before


@WRITERS
def test_what_is_refused_to_a_file_that_is_being_written_is_the_targets(write, tmp_path, monkeypatch):
    context = atomic_folder if write is write_folder else atomic_file
    monkeypatch.chdir(tmp_path)

    def block() -> None:
        with context("target") as temporary:
            name = os.path.relpath(temporary / "x" if write is write_folder else temporary)
            raise OSError(errno.EACCES, "Permission denied", name)

    assert "target cannot be written (Permission denied)" in refused(block)
    assert tree(tmp_path) == {}
