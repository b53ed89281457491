"""Commands in processes of their own that start at once: forks of one warm process."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent


class Ended(NamedTuple):
    """A command that has ended; a negative code is the signal that ended it.

    It changed files so often, and asked the network so often; both are 0 of one that was killed.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float
    changes: int
    asked: int


class Forks:
    """The warm process. Its children have one thread and see no network.

    Args:
        folder: for what the commands print.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Else deepspeed, where it is installed, prints which accelerator it chose.
            "DS_ACCELERATOR": "cpu",
            # Nobody listens there.
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_CACHE": str(folder / "hub"),
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "COLUMNS": "200",
        }
        self.log = (folder / "server.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hardening.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        assert self._answer() == "ready"

    def run(
        self,
        cwd: Path,
        *arguments: str,
        signal_after: float | None = None,
        number: int = signal.SIGKILL,
        **options: Any,
    ) -> Ended:
        """Run a command, and send it a signal after some seconds if it still runs then.

        Args:
            cwd: where it runs.
            arguments: behind "dvora".
            signal_after: seconds.
            number: of the signal.
            options: of the server: `kill_at` (a change of files), `signal` (then, instead of SIGKILL), `user`, `memory`
                (bytes beyond what the warm process has).
        """
        assert self.process.stdin
        self.number += 1
        out, err, counted = (self.folder / f"{self.number}.{name}" for name in ("out", "err", "count"))
        for path in (out, err, counted):
            # A child may be killed before it opens them.
            path.touch()
        request = {
            "cwd": str(cwd), "arguments": arguments, "stdout": str(out), "stderr": str(err), "counted": str(counted),
            **options,
        }  # fmt: skip
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        pid = self._answer()
        timer = threading.Timer(signal_after or 0, _signal, (pid, number))
        if signal_after is not None:
            timer.start()
        try:
            code, seconds = self._answer()
        finally:
            timer.cancel()
        changes, asked = map(int, (counted.read_text() or "0 0").split())
        return Ended(code, out.read_text(), err.read_text(), seconds, changes, asked)

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()
        self.log.close()

    def _answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, (self.folder / "server.log").read_text()
        return json.loads(line)


def _signal(pid: int, number: int) -> None:
    # It may have ended just now.
    with suppress(ProcessLookupError):
        os.kill(pid, number)


TRAIN = "train --task text-classification -m base --data reviews.csv -o out --rank 4 --cpu --epochs 1"


def assert_error(ended: Ended, code: int, *messages: str) -> None:
    assert ended.code == code, ended
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith("Error: ")
    for message in messages:
        assert message in ended.stderr
