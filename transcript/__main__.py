"""Runs the commands in the pages of the documentation: python -m transcript [--record] [PAGE ...]

Every `console` block is a command followed by its output. All commands of a page are run in one folder that holds
nothing but `materials`; each must end with the exit code 0 and leave what the next one needs. With --record their
output is written into the page.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from materials.files import lay_out
from transcript.forks import dvora, preload

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("get-started.md", "how-to/language-models.md")
BLOCK = re.compile(r"^```console\n\$ (.*?)\n(.*?)^```\n", flags=re.MULTILINE | re.DOTALL)
MANY = 28
"""Lines of output that a page shows at most."""
SHELL = ("head", "ls")
"""Programs other than ours that pages may run."""


def commands(page: str) -> list[str]:
    """The commands of a page, in order."""
    return [match[1] for match in BLOCK.finditer(page)]


def run(command: str, folder: Path) -> str:
    """The output of a command on a terminal of 100 columns.

    Raises:
        SystemExit: it ends with another exit code than 0, or is not one that a page may run.
    """
    program, *arguments = shlex.split(command)
    if program != "dvora" and program not in SHELL:
        raise SystemExit(f"{program} is not a program that a page may run: dvora, {', '.join(SHELL)}")
    if program == "dvora":
        ended = dvora(arguments, folder)
    else:
        ended = subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"$ {command}\nended with {ended.returncode}:\n{ended.stdout}\n{ended.stderr}")
    lines = [line.rstrip() for line in ended.stdout.replace(f"{folder}/", "").rstrip().split("\n")]
    return "\n".join(lines)


def recorded(page: str, outputs: Sequence[str]) -> str:
    """The page with the output of its commands."""
    remaining = iter(outputs)
    return BLOCK.sub(lambda match: f"```console\n$ {match[1]}\n{_cut(next(remaining))}\n```\n", page)


def _cut(output: str) -> str:
    lines = output.split("\n")
    return output if len(lines) <= MANY else "\n".join([*lines[:MANY], f"... {len(lines) - MANY} more lines"])


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m transcript", description=__doc__)
    parser.add_argument("--record", action="store_true", help="write the output into the pages")
    parser.add_argument("pages", nargs="*", default=PAGES, help="below docs; all with commands if left out")
    chosen = parser.parse_args(arguments)
    os.environ |= {"COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    preload()
    for name in chosen.pages:
        file = DOCS / name
        page = file.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary).resolve()
            lay_out(folder)
            outputs = []
            for command in commands(page):
                print(f"$ {command}", flush=True)
                outputs.append(run(command, folder))
                print(outputs[-1], flush=True)
        if chosen.record:
            file.write_text(recorded(page, outputs), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
