"""How long commands take to start: python -m benchmarks.start_up

Every command runs in a process of its own: some to their end (those that load no model), the others until they find
that there is no adapter and no model in the folder they were given. Each round goes through all commands, so that a
busy machine slows all alike; beside the time on the clock the processor's time is kept, which depends less on what else
runs.
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
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.results import file_of

SOURCE = Path(__file__).parent.parent / "src"
COMMANDS = {
    "help": ("dvora --help", "dvora --version", "dvora train --help", "dvora train --print-config"),
    "import": ("import dvora", "dvora.DVoRAAdapter", "dvora.DVoRAConfig"),
    "start": (
        *("dvora inspect EMPTY", "dvora count EMPTY", "dvora merge EMPTY --output OUT", "dvora analyze EMPTY"),
        *("dvora convert EMPTY --to dora --output OUT", "dvora doctor EMPTY"),
        *("dvora report RUN", "dvora evaluate RUN", "dvora generate RUN text", "dvora predict RUN rows.csv"),
        "dvora train --task text-classification --model EMPTY --data rows.csv",
    ),
}
"""By what they wait for: nothing; imports; everything that their work needs."""
LARGE = (
    *("torch", "transformers", "peft", "accelerate", "datasets", "pandas", "pyarrow", "matplotlib"),
    *("torchao", "bitsandbytes", "hqq", "deepspeed", "scipy", "sklearn"),
)
"""Large packages, which a test looks for in what commands import."""


def prepare(folder: Path) -> None:
    """Make what the commands name: all that is found without large packages is right, the model is not there."""
    (folder / "EMPTY").mkdir()
    (folder / "RUN").mkdir()
    (folder / "rows.csv").write_text("text,label\ngood,yes\n")
    settings = {"task": "text-classification", "model": str(folder / "EMPTY"), "data": [str(folder / "rows.csv")]}
    record = {"state": "finished", "settings": settings, "labels": ["no", "yes"], "data": {"files": {}}, "metrics": {}}
    (folder / "RUN" / "run.json").write_text(json.dumps(record))


def started(command: str, folder: str) -> tuple[float, float]:
    """Start a command in a folder: seconds on the clock, and of the processor."""
    name, *arguments = command.split()
    program = ["-m", "dvora.cli", *arguments] if name == "dvora" else ["-c", f"import dvora; {command}"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, *program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        check=False,
    )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measured(rounds: int) -> list[dict[str, Any]]:
    """A row for every command."""
    cases = [(kind, command) for kind, commands in COMMANDS.items() for command in commands]
    runs: dict[str, list[tuple[float, float]]] = {command: [] for _, command in cases}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        # Imports nearly everything, so that nothing is left to be compiled.
        started("dvora report ABSENT", folder)
        for _ in range(rounds):
            for command, times in runs.items():
                times.append(started(command, folder))
    rows = []
    for kind, command in cases:
        clock, processor = zip(*runs[command], strict=True)
        row: dict[str, Any] = {"source": "now", "kind": kind, "command": command}
        row |= {"seconds": statistics.median(clock), "fastest": min(clock), "slowest": max(clock)}
        row["processor_seconds"] = statistics.median(processor)
        rows.append({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def main() -> None:
    """Measure, and keep the rows of other environments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start_up", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each command is started (default: 5)")
    parser.add_argument("--installed", default="dev", help="the extra that is installed here (default: dev)")
    options = parser.parse_args()
    file = file_of("start_up")
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    kept[options.installed] = {
        "environment": environment(),
        "rounds": options.rounds,
        "rows": measured(options.rounds),
    }
    file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
