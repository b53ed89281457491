"""How long commands take to start, and which large packages they import: python -m benchmarks.start_up

Every command runs in a process of its own: some to their end (those that load no model), the others until they find
that the folder they were given is not there, which they look for when all is imported. Each round goes through all
commands and versions of the sources, so that a busy machine slows all alike; beside the time on the clock the
processor's time is kept, which depends less on what else runs.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.environment import environment

RESULT = Path(__file__).parent / "results" / "start_up.json"
SOURCE = Path(__file__).parent.parent / "src"
COMMANDS = {
    "help": ("dvora --help", "dvora --version", "dvora train --help", "dvora train --print-config"),
    "import": ("import dvora", "dvora.DVoRAAdapter", "dvora.DVoRAConfig"),
    "start": (
        *("dvora inspect ABSENT", "dvora count ABSENT", "dvora merge ABSENT --output OUT", "dvora analyze ABSENT"),
        *("dvora convert ABSENT --to dora --output OUT", "dvora doctor ABSENT"),
        *("dvora report ABSENT", "dvora evaluate ABSENT", "dvora generate ABSENT", "dvora predict ABSENT ABSENT"),
        "dvora train --task text-classification --model ABSENT --data ABSENT.csv",
    ),
}
"""By what they wait for: nothing; imports; everything that their work needs."""
LARGE = (
    *("torch", "transformers", "peft", "accelerate", "datasets", "pandas", "pyarrow", "matplotlib"),
    *("torchao", "bitsandbytes", "hqq", "deepspeed", "scipy", "sklearn"),
)
RUN = """
import atexit, os, sys
def report_imports():
    os.write(3, " ".join(name for name in {large!r} if name in sys.modules).encode())
atexit.register(report_imports)
"""
COMMAND = RUN + "sys.argv = {arguments!r}\nfrom dvora.cli.app import main\nmain()\n"
IMPORT = RUN + "import dvora\n{name}\n"


def program_of(command: str) -> str:
    """The Python code of a command."""
    if command.startswith("dvora "):
        return COMMAND.format(large=LARGE, arguments=command.split())
    return IMPORT.format(large=LARGE, name=command.removeprefix("import "))


class Started(NamedTuple):
    """Seconds on the clock, seconds of the processor, and the large packages that were imported."""

    seconds: float
    processor_seconds: float
    packages: list[str]


def started(command: str, source: Path, folder: Path) -> Started:
    """Start a command in a process of its own.

    Args:
        command: one of COMMANDS.
        source: the folder that holds the package dvora.
        folder: an empty one to run in.
    """
    reading, writing = os.pipe()
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    # The number of the pipe is another one in the child: a shell gives it the number 3.
    shell = f'exec 3>&{writing}; exec "$0" -c "$1"'
    subprocess.run(
        ["bash", "-c", shell, sys.executable, program_of(command)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"},
        pass_fds=(writing,),
        capture_output=True,
        check=False,
    )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        packages = pipe.read().split()
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Started(seconds, spent, packages)


def measured(sources: Mapping[str, Path], rounds: int) -> list[dict[str, Any]]:
    """A row for every command and version of the sources."""
    cases = [(kind, command, name) for kind, commands in COMMANDS.items() for command in commands for name in sources]
    found: dict[tuple[str, str], list[Started]] = {(command, name): [] for _, command, name in cases}
    with tempfile.TemporaryDirectory() as folder:
        for _, command, name in cases:
            if command.startswith("dvora report"):
                # Imports nearly everything, so that nothing is left to be compiled.
                started(command, sources[name], Path(folder))
        for _ in range(rounds):
            for _, command, name in cases:
                found[command, name].append(started(command, sources[name], Path(folder)))
    return [
        {"source": name, "kind": kind, "command": command, **row_of(found[command, name])}
        for kind, command, name in cases
    ]


def row_of(runs: Sequence[Started]) -> dict[str, Any]:
    """What a command's runs took."""
    return {
        "seconds": round(statistics.median(run.seconds for run in runs), 2),
        "fastest": round(min(run.seconds for run in runs), 2),
        "slowest": round(max(run.seconds for run in runs), 2),
        "processor_seconds": round(statistics.median(run.processor_seconds for run in runs), 2),
        "packages": runs[-1].packages,
    }


def main() -> None:
    """Measure, and keep the rows of other environments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start_up", description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, help="also measure an earlier version: the folder that holds its dvora")
    parser.add_argument("--rounds", type=int, default=5, help="how often each command is started (default: 5)")
    parser.add_argument("--installed", default="dev", help="the extra that is installed here (default: dev)")
    options = parser.parse_args()
    if options.before is not None and not (options.before / "dvora").is_dir():
        parser.error(f"--before {options.before}: there is no folder dvora in it")
    sources = {"now": SOURCE} | ({"before": options.before} if options.before else {})
    rows = measured(sources, options.rounds)
    kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    kept[options.installed] = {"environment": environment(), "rounds": options.rounds, "rows": rows}
    RESULT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
