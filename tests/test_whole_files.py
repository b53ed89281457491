"""Files and folders that are whole or not there, and what is no file is left what it is."""

import fcntl
import os
import re
import stat
import threading
from pathlib import Path

import pytest

from dvora.whole_files import RANDOM, locked, new_file, new_folder, write_atomically


def test_a_file_takes_the_other_s_place_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a b.txt"
    path.write_text("before")
    with new_file(path) as file:
        file.write(b"after")
        assert path.read_text() == "before"
        (unfinished,) = {entry.name for entry in tmp_path.iterdir()} - {path.name}
        assert re.fullmatch(rf"\.a b\.txt\.{RANDOM}", unfinished)
    assert path.read_text() == "after"
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_what_is_not_completed_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")

    def interrupted() -> None:
        with new_file(path) as file:
            file.write(b"after")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("a.txt", "before")]


def test_a_link_of_a_name_that_nobody_typed_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"before")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(tmp_path / "link", b"content")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"before"


@pytest.mark.parametrize("name", ["new", ".new.unfinished"])
def test_a_new_folder_is_not_made_through_a_link(tmp_path: Path, name: str) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "letter").write_text("dear")
    (tmp_path / name).symlink_to(tmp_path / "theirs")
    with pytest.raises(FileExistsError, match="is a link"), new_folder(tmp_path / "new") as folder:
        (folder / "file").touch()
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["letter"]


def test_links_in_what_a_killed_process_left_are_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "letter").write_text("dear")
    (tmp_path / ".new.unfinished").mkdir()
    (tmp_path / ".new.unfinished" / "link").symlink_to(tmp_path / "theirs")
    with new_folder(tmp_path / "new") as folder:
        (folder / "file").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    assert (tmp_path / "theirs" / "letter").exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root gives folders away")
def test_a_folder_of_another_user_is_not_taken_for_our_own(tmp_path: Path) -> None:
    (tmp_path / ".new.unfinished").mkdir()
    os.chown(tmp_path / ".new.unfinished", 65534, -1)
    with pytest.raises(FileExistsError, match="of another user"), new_folder(tmp_path / "new"):
        pass


def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    write_atomically(pipe, b"content")
    reader.join(timeout=10)
    assert found == [b"content"]
    assert pipe.is_fifo()


def test_a_lock_is_of_what_has_the_name_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever held it before may have renamed the folder between our opening it and the lock."""
    (tmp_path / "folder").mkdir()
    flock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        (tmp_path / "folder").rename(tmp_path / "renamed")
        flock(descriptor, how)

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", late)
        with pytest.raises(TimeoutError, match="another process holds the lock"), locked(tmp_path / "folder"):
            pass
    with locked(tmp_path / "renamed"), pytest.raises(TimeoutError), locked(tmp_path / "renamed"):
        pass


def test_a_shared_lock_is_shared_and_a_file_that_is_not_there_is_made(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with locked(file, is_shared=True), locked(file, is_shared=True), pytest.raises(TimeoutError), locked(file):
        pass
    with locked(file), pytest.raises(TimeoutError), locked(file, is_shared=True):
        pass
