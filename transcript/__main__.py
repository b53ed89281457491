"""Runs the transcript: python -m transcript [--record]

Every command must end with 0 and leave what the next one needs. With --record the longer form is run and written to
transcript.md, as a terminal shows it.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transcript.materials import lay_out

RECORD = Path(__file__).with_name("transcript.md")


def commands(steps: int, play_steps: int) -> list[tuple[str, str]]:
    """What is typed, with a sentence before it."""
    return [
        ("A CSV with the columns text and label, and a model. What would be trained?", "dvora count minilm"),
        (
            "Train: rows are held out, the best step is kept.",
            "dvora train --task text-classification --model minilm --data reviews.csv --max-length 48 "
            f"--max-steps {steps} --evaluate-every {steps // 2} --output runs/reviews",
        ),
        ("How good is it on the rows that it never saw?", "dvora evaluate runs/reviews"),
        ("What does it say of new ones?", "dvora predict runs/reviews new.txt --output told.csv"),
        ("What is the adapter?", "dvora inspect runs/reviews"),
        ("A plain model, verified before its folder appears.", "dvora merge runs/reviews --output merged"),
        (
            "A language model learns to speak like a play.",
            f"dvora train --task causal-lm --model smollm2 --data play.txt --max-length 64 --batch-size 4 "
            f"--max-steps {play_steps} --evaluate-every {play_steps} --output runs/play",
        ),
        (
            "It goes on with a line, with and without its adapter.",
            'dvora generate runs/play "Lear. So young, and" --max-new-tokens 24',
        ),
    ]


def run(command: str, folder: Path) -> str:
    """What a command shows on a terminal of 100 columns.

    Raises:
        SystemExit: it ends with another exit code than 0.
    """
    arguments = [sys.executable, "-m", "dvora.cli", *shlex.split(command)[1:]]
    settings = {**os.environ, "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(arguments, cwd=folder, env=settings, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"$ {command}\nended with {ended.returncode}:\n{ended.stdout}\n{ended.stderr}")
    return ended.stdout.replace(f"{folder}/", "").rstrip()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m transcript", description=__doc__)
    parser.add_argument("--record", action="store_true", help="run the longer form, and write transcript.md")
    record = parser.parse_args(arguments).record
    told = ["# From a CSV to a merged model, and a play\n", "Made by `python -m transcript --record`.\n"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        lay_out(folder, *((2000, 1000) if record else (600, 200)))
        for sentence, command in commands(*((120, 30) if record else (24, 4))):
            print(f"$ {command}", flush=True)
            shown = run(command, folder)
            print(shown, flush=True)
            told.append(f"{sentence}\n\n```console\n$ {command}\n{shown}\n```\n")
        if not (folder / "merged" / "model.safetensors").exists():
            raise SystemExit("the merged model is not there")
        told.append(f"```console\n$ cat told.csv\n{(folder / 'told.csv').read_text(encoding='utf-8').rstrip()}\n```\n")
    if record:
        RECORD.write_text("\n".join(told), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
