"""A program of ExecuTorch, executed in a process of its own, which a fault of the runtime ends in place of this one."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from signal import Signals
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

INSTEAD = "Try another version of ExecuTorch, --to onnx, or merge the adapter and export the merged model"
REASON = re.compile("Missing operator|[Ff]ailed|Error")
"""In lines of the runtime's log and of Python's."""


def execute(program: Path, calls: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The first output of each call.

    Args:
        program: a file.
        calls: the inputs of each.

    Raises:
        ValueError: the runtime crashed, or refused the program or its inputs; the message has what it says.
    """
    with TemporaryDirectory() as folder:
        given, answered = Path(folder, "inputs.pt"), Path(folder, "outputs.pt")
        torch.save([[*inputs] for inputs in calls], given)
        command: list[str | Path] = [sys.executable, "-m", __name__, program, given, answered]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode < 0:
            signal = Signals(-ended.returncode).name
            raise ValueError(f"model: its program crashed ExecuTorch's runtime ({signal}). {INSTEAD}")
        if ended.returncode:
            reasons = "; ".join(line for line in ended.stderr.splitlines() if REASON.search(line))
            raise ValueError(f"model: ExecuTorch's runtime does not execute its program: {reasons}. {INSTEAD}")
        outputs: list[Tensor] = torch.load(answered)
    return outputs


def _main(program: str, given: str, answered: str) -> None:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(Path(program)).load_method("forward")
    torch.save([method.execute(inputs)[0] for inputs in torch.load(given)], answered)


if __name__ == "__main__":
    _main(*sys.argv[1:])
