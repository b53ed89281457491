"""A command with a time limit, and what it leaves behind."""

import os
import signal
import sys
import textwrap
import threading
from pathlib import Path

import psutil
import pytest

from benchmarks.examples import processes
from benchmarks.examples.processes import run

NEVER_ENDS = "import time; time.sleep(600)"
# A child, and a grandchild in a session of its own whose parent is gone: no process group and no tree leads to it.
FAMILY = f"""
    import subprocess, sys, time
    never_ends = [sys.executable, "-c", {NEVER_ENDS!r}]
    middle = "import subprocess, sys; print(subprocess.Popen(" + repr(never_ends) + ", start_new_session=True).pid)"
    child = subprocess.Popen(never_ends)
    print(child.pid, flush=True)
    subprocess.run([sys.executable, "-c", middle])
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def printed_pids(stdout: str) -> list[int]:
    return [int(line) for line in stdout.split()]


def test_output_and_status_are_the_commands(tmp_path: Path) -> None:
    ended = run(python("import os, sys; print(os.getcwd()); print('no', file=sys.stderr); sys.exit(3)"), 60, tmp_path)
    assert (ended.status, ended.stdout, ended.stderr, ended.killed) == (3, f"{tmp_path}\n", "no\n", ())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="orphans are followed on Linux only")
def test_a_command_that_never_ends_is_killed_with_all_its_descendants(tmp_path: Path) -> None:
    ended = run(python(FAMILY + "    time.sleep(600)"), 5, tmp_path)
    assert ended.status is None
    pids = printed_pids(ended.stdout)
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="orphans are followed on Linux only")
def test_what_a_finished_command_leaves_behind_is_named_and_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 1)
    ended = run(python(FAMILY), 60, tmp_path)
    assert ended.status == 0
    assert len(ended.killed) == 2
    assert not any(psutil.pid_exists(pid) for pid in printed_pids(ended.stdout))


def test_an_interrupt_ends_the_command_too(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    interrupt = threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        run(python(NEVER_ENDS), 60, tmp_path)
    assert set(psutil.Process().children(recursive=True)) == before
