"""What a run needs, checked before anything is fetched: python -m benchmarks.yardstick.needs

The top of this file imports no package, so that any Python can say what is missing.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence

from benchmarks.yardstick.tasks import TASKS, Task

OLDEST_PYTHON = (3, 12)
"""PEFT's scripts ask for it: with an older one they cannot save the adapter, and a row has a wrong file size."""
TRYOUT = "make yardstick ARGS=--tryout runs tiny stand-ins on a CPU, which shows that it works and measures nothing"
TRIED = ("MetaMathQA",)
"""Tasks that have stand-ins."""
FILES = {"black-forest-labs/FLUX.2-klein-base-4B": "model_index.json"}
"""A small file of a model, where that is not config.json."""


def chosen(arguments: Sequence[str]) -> argparse.Namespace:
    """What the command line asks for: `tasks`, `first` (a device or None), `tryout`, `rates`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.yardstick", description=__doc__)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"all if none is named: {', '.join(TASKS)}")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--first",
        nargs="?",
        const="cuda",
        choices=("cuda", "cpu"),
        help="an hour on a GPU: kernels, times of steps, short runs; --first=cpu: tiny, whether everything runs",
    )
    instead.add_argument("--tryout", action="store_true", help="tiny models and data on a CPU, a few steps")
    instead.add_argument("--rates", action="store_true", help="read the models and compare our rates with their rows")
    found = parser.parse_args(arguments)
    if found.first and found.tasks:
        parser.error("--first has runs of its own: name no TASK with it")
    if unknown := [name for name in found.tasks if name not in TASKS]:
        parser.error(f"TASK is {unknown[0]!r}, expected one of {', '.join(TASKS)}")
    if found.tryout and set(found.tasks) - set(TRIED):
        parser.error(f"--tryout has stand-ins for {', '.join(TRIED)} only")
    found.tasks = [TASKS[name] for name in found.tasks or (TRIED if found.tryout else TASKS)]
    return found


def first_problem(asked: argparse.Namespace) -> str | None:
    """What is missing for what was asked, with what to do, or None."""
    if asked.first:
        return None if asked.first == "cpu" else check_device("CUDA")
    if asked.tryout or asked.rates:
        return check_python()
    return check_python() or check_device("CUDA", "XPU")


def check_python() -> str | None:
    """What is wrong with this Python, or None."""
    if sys.version_info >= OLDEST_PYTHON:
        return None
    oldest = _version(OLDEST_PYTHON)
    return (
        f"this is Python {_version(sys.version_info[:3])}, and PEFT's scripts need {oldest} or newer: delete "
        f".venv-yardstick if it is there, then make yardstick PYTHON=python{oldest}"
    )


def check_device(*kinds: str) -> str | None:
    """What is wrong with the devices that torch sees, of which one of some kinds is needed, or None."""
    import torch

    if any(getattr(torch, kind.lower()).is_available() for kind in kinds):
        return None
    return (
        f"no GPU: torch {torch.__version__} sees no {' or '.join(kinds)} device, and this runs on nothing else. Run it "
        f"on a machine that has one. ({TRYOUT}.)"
    )


def check_access(task: Task) -> str | None:
    """The first model or data set of a task that cannot be read, or None; what is in the cache needs no network."""
    from huggingface_hub import hf_hub_download

    files = [(name, FILES.get(name, "config.json"), "model") for name in task.models]
    files += [(name, "README.md", "dataset") for name in task.data]
    for name, file, kind in files:
        try:
            hf_hub_download(name, file, repo_type=kind)
        except Exception as error:  # of many types: no network, no account, a licence that was not accepted
            said = (str(error).strip().splitlines() or ["nothing"])[0]
            return (
                f"{task.name} reads the {kind} {name}, which cannot be had ({type(error).__name__}: {said}). Accept "
                "its licence on its page if it has one, log in with hf auth login, and check the network"
            )
    return None


def _version(numbers: Iterable[int]) -> str:
    return ".".join(map(str, numbers))


if __name__ == "__main__":
    asked = chosen(sys.argv[1:])
    # A process has torch only once its environment is there; the next step looks for the device.
    sys.exit(None if asked.first else check_python())
