"""A run folder: read back as it was written, locked, with the process that trains."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dvora.recipes.files import typed
from dvora.recipes.run_folder import alone_in, is_first, read_record, read_run, world_size, write_record
from dvora.recipes.settings import Settings
from dvora.whole_files import write_atomically

HOLDER = """
import sys, pathlib
from dvora.recipes.files import typed
from dvora.recipes.run_folder import alone_in
with alone_in(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_write_into_one_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another run works in"), alone_in(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with alone_in(tmp_path):
        pass


def test_a_run_that_is_not_finished_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run\.json"):
        read_run(tmp_path)
    settings = Settings(task="regression", model="bert", data=("x.csv",))
    write_record(tmp_path, {"state": "started", "settings": settings.model_dump(mode="json"), "labels": []})
    with pytest.raises(ValueError, match=r"not finished; go on with .*--resume"):
        read_run(tmp_path)
    write_record(tmp_path, {"state": "finished", "settings": settings.model_dump(mode="json"), "labels": []})
    assert read_run(tmp_path).settings == settings


DAMAGED = [
    *(b"", b"[]", b'{"state": "finished"}', b'{"state": "fin', b"\xff", b'{"state": "finished", "settings": {}}'),
    *(b'{"state": "finished", "settings": [], "labels": []}', b'{"state": "finished", "settings": {}, "labels": [1]}'),
    b'{"state": "finished", "settings": {}, "labels": [], "data": {"files": 1}}',
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_record_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json"):
        read_record(tmp_path)


@pytest.mark.parametrize(("variable", "ask"), [("RANK", is_first), ("WORLD_SIZE", world_size)])
def test_a_launcher_s_variable_that_is_no_number_is_named(
    variable: str, ask: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "two")
    with pytest.raises(ValueError, match=f"the environment variable {variable} is 'two', expected a whole number"):
        ask()


def test_a_link_stays_a_link_where_somebody_typed_its_name(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(typed(tmp_path / "link"), b"content")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"content"
