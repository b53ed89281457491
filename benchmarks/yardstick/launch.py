"""Runs one of PEFT's scripts in a process that knows DVoRA: python -m benchmarks.yardstick.launch [--on-cpu] SCRIPT ...

Started in the script's folder, the process sees what `python SCRIPT ...` would see. The only difference is the import
of dvora, which makes PEFT read a configuration whose `peft_type` is DVORA.
"""

import runpy
import sys

import dvora  # noqa: F401  (PEFT gets the method as soon as the script imports it)


def launch(script: str, arguments: list[str]) -> None:
    """Run a script as the main program.

    Args:
        script: its path; its folder has to be the first of `sys.path`, as `python -m` there makes it.
        arguments: of the script.
    """
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    given = sys.argv[1:]
    if given[:1] == ["--on-cpu"]:
        from benchmarks.yardstick.tryout.cpu import pose_as_gpu

        pose_as_gpu()
        given = given[1:]
    launch(given[0], given[1:])
