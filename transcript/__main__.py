"""Runs what the pages of the documentation type: python -m transcript [--record] [PAGE ...]

Every `console` block is a command, and after it what it shows. All commands of a page are run in one folder that holds
nothing but `materials`; each must end with the exit code 0 and leave what the next one needs. With --record what they
show is written into the page.
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

from transcript.materials import lay_out

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("get-started.md", "how-to/language-models.md")
BLOCK = re.compile(r"^```console\n\$ (.*?)\n(.*?)^```\n", flags=re.MULTILINE | re.DOTALL)
MANY = 28
"""Lines of a result that a page shows."""
SHELL = ("head", "ls")
"""Programs other than ours that pages type."""


def commands(page: str) -> list[str]:
    """What a page's text types, in order."""
    return [match[1] for match in BLOCK.finditer(page)]


def run(command: str, folder: Path) -> str:
    """What a command shows on a terminal of 100 columns.

    Raises:
        SystemExit: it ends with another exit code than 0, or is none that a page may type.
    """
    program, *arguments = shlex.split(command)
    if program != "dvora" and program not in SHELL:
        raise SystemExit(f"{program} is not a program that a page may type: dvora, {', '.join(SHELL)}")
    typed = [sys.executable, "-m", "dvora.cli", *arguments] if program == "dvora" else [program, *arguments]
    settings = {**os.environ, "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(typed, cwd=folder, env=settings, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"$ {command}\nended with {ended.returncode}:\n{ended.stdout}\n{ended.stderr}")
    lines = [line.rstrip() for line in ended.stdout.replace(f"{folder}/", "").rstrip().split("\n")]
    return "\n".join(lines)


def recorded(page: str, shown: Sequence[str]) -> str:
    """The page with what its commands showed."""
    results = iter(shown)
    return BLOCK.sub(lambda match: f"```console\n$ {match[1]}\n{_cut(next(results))}\n```\n", page)


def _cut(shown: str) -> str:
    lines = shown.split("\n")
    return shown if len(lines) <= MANY else "\n".join([*lines[:MANY], f"... {len(lines) - MANY} more lines"])


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m transcript", description=__doc__)
    parser.add_argument("--record", action="store_true", help="write what is shown into the pages")
    parser.add_argument("pages", nargs="*", default=PAGES, help="below docs; all that type something if left out")
    chosen = parser.parse_args(arguments)
    for name in chosen.pages:
        file = DOCS / name
        page = file.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary).resolve()
            lay_out(folder)
            shown = []
            for command in commands(page):
                print(f"$ {command}", flush=True)
                shown.append(run(command, folder))
                print(shown[-1], flush=True)
        if chosen.record:
            file.write_text(recorded(page, shown), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
