"""Run as a process of its own: it imports everything once, then runs each command line in a fork of itself.

Requests are lines of JSON on stdin, answers lines of JSON on stdout: the child's process id at once, its end later.
"""

import codecs
import json
import os
import resource
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod")
"""What a process does to files, as Python's audit hooks call it."""
CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def load_everything() -> None:
    """Import the program and what its commands import when they are called.

    Whoever stops Python's import of the program sees Python's own traceback, which no code of ours can change.
    """
    import accelerate
    import datasets
    import peft
    from transformers import BertForSequenceClassification, PreTrainedTokenizerFast, Trainer

    import dvora.cli.app
    import dvora.recipes.adapters.conversion
    import dvora.recipes.adapters.inspection
    import dvora.recipes.adapters.merging
    import dvora.recipes.training.run

    used = (accelerate, datasets, peft, BertForSequenceClassification, PreTrainedTokenizerFast, Trainer, dvora)
    assert used
    # Another user may not read the files that these are in: some of Typer's, which it imports as it needs them, too.
    with suppress(SystemExit):
        command(["train", "--help"])
    for encoding in ("utf-8-sig", "utf-16", "cp1252", "latin-1"):
        codecs.lookup(encoding)


def signal_at_change(number: int, folder: str, what: int) -> list[int]:
    """Send this process a signal when it is about to change a file below the folder for the nth time; 0: only count."""
    count = [0]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in WATCHED or not _is_below(arguments[0], folder):
            return
        if event == "open" and not (arguments[2] or 0) & CHANGES:
            return
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), what)

    sys.addaudithook(watch)
    return count


def count_connections() -> list[int]:
    """How often this process looks up a name or connects to an address of a network from now on."""
    count = [0]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        # Addresses of sockets between processes are paths.
        count[0] += event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple))

    sys.addaudithook(watch)
    return count


def limit_memory(more: int) -> None:
    """Let this process have so many bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more,) * 2)


def _is_below(path: object, folder: str) -> bool:
    # Names that are relative to an open folder, as rmtree has them, cannot be resolved: they all count.
    return isinstance(path, str | os.PathLike) and (
        not os.path.isabs(path) or os.path.abspath(path).startswith(folder)  # noqa: PTH100, PTH117
    )


def child(request: dict[str, Any]) -> None:
    """Become the command that is asked for; never returns."""
    code = 70
    try:
        os.setsid()
        for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
            os.dup2(os.open(name, os.O_RDWR), number)
        os.chdir(request["cwd"])
        counted = Path(request["counted"]).open("w")  # noqa: SIM115
        if "user" in request:
            os.setgroups([])
            os.setgid(request["user"])
            os.setuid(request["user"])
        if "memory" in request:
            limit_memory(request["memory"])
        count = signal_at_change(request.get("kill_at", 0), request["cwd"], request.get("signal", signal.SIGKILL))
        asked = count_connections()
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            command(request["arguments"])
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        counted.write(f"{count[0]} {asked[0]}")
        counted.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def command(arguments: list[str]) -> None:
    from dvora.cli.app import main as program

    sys.argv = ["dvora", *arguments]
    program()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    load_everything()
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        # A child is no command yet while it prepares.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        pid = os.fork()
        if not pid:
            child(request)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        print(json.dumps(pid), file=answers, flush=True)
        began = time.monotonic()
        _, state = os.waitpid(pid, 0)
        print(json.dumps([os.waitstatus_to_exitcode(state), time.monotonic() - began]), file=answers, flush=True)


if __name__ == "__main__":
    main()
