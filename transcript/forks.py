"""Processes that are forks of a server, which has imported what most need: they start at once, else as new ones do."""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from types import MappingProxyType

FORKS = multiprocessing.get_context("forkserver")


def preload() -> None:
    """Have the server import what most processes need; in time, before the first of them."""
    FORKS.set_forkserver_preload(
        [
            "accelerate",
            "dvora.tools.doctor",
            "dvora.training",
            "torch.distributed.fsdp",
            "transformers.models.bert.modeling_bert",
            "transformers.models.llama.modeling_llama",
            "transformers.trainer",
        ]
    )


def dvora(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str] = MappingProxyType({})
) -> CompletedProcess[str]:
    """Run a command of the program in a folder.

    Args:
        arguments: behind "dvora".
        folder: where it runs.
        environment: beside the server's, for what is read when the command runs.
    """
    with TemporaryDirectory() as place:
        files = [Path(place, name) for name in ("stdout", "stderr")]
        process = FORKS.Process(target=_run, args=(arguments, folder, dict(environment), files))
        process.start()
        process.join()
        assert process.exitcode is not None
        texts = (file.read_text(encoding="utf-8") for file in files)
        return CompletedProcess(["dvora", *arguments], process.exitcode, *texts)


def _run(arguments: Sequence[str], folder: Path, environment: Mapping[str, str], files: Sequence[Path]) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ |= environment
    sys.argv = ["dvora", *arguments]
    from dvora.cli.__main__ import main

    main()
