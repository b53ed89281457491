"""Build the wheel, install it into an empty environment, run the README's start: python -m installation.wheel

First dvora alone: the plain layer runs, and commands that need an extra name it in one line. Then the extra `cli`
is added: the README's quick start and a short training run; `dvora report` names the extra that it lacks.
"""

import re
import sys
import tempfile
from pathlib import Path

from installation.environments import ROOT, Environment, InstallationError, built_wheel, empty_environment

PLAIN_LAYER = """
import torch, dvora
layer = dvora.DVoRAAdapter(torch.nn.Linear(30, 20), rank=8, shared=dvora.SharedProjections(seed=0))
layer(torch.randn(4, 30)).square().mean().backward()
assert layer.magnitude.grad is not None
try:
    dvora.DVoRAConfig
except ImportError as error:
    assert ".[peft]" in str(error), error
else:
    raise SystemExit("DVoRAConfig without PEFT")
"""


def quick_start() -> str:
    """The README's first Python code.

    Raises:
        ValueError: the README has none.
    """
    found = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M | re.S)
    if found is None:
        raise ValueError("README.md has no block of Python code to run as its quick start")
    return found[1]


def check_alone(environment: Environment, wheel: Path) -> None:
    """dvora without extras."""
    environment.install(str(wheel))
    environment.run("python", "-W", "error", "-c", PLAIN_LAYER)
    expect_advice(environment.run("dvora", "--help", status=2), "cli")


def check_quick_start(environment: Environment, folder: Path) -> None:
    """The README's quick start, in an environment with the extra `peft`, with a tiny model in the folder."""
    environment.run("python", str(ROOT / "installation" / "tiny_model.py"), str(folder))
    code = folder / "quick_start.py"
    code.write_text(quick_start(), encoding="utf-8")
    environment.run("python", str(code), folder=folder)


def check_commands(environment: Environment, folder: Path, *more: str) -> None:
    """A short training run and what follows it, in the folder of the quick start.

    Args:
        environment: with the extra.
        folder: of the tiny model.
        more: further commands.
    """
    train = "train --task text-classification --model minilm --data reviews.csv --epochs 1 --output run"
    for command in ("--help", train, "inspect run", "predict run reviews.csv --output predicted.csv", *more):
        environment.run("dvora", *command.split(), folder=folder)


def check_with_cli(environment: Environment, wheel: Path, folder: Path) -> None:
    """dvora with its extra `cli`, which brings no pages."""
    environment.install(f"{wheel}[cli]")
    check_quick_start(environment, folder)
    check_commands(environment, folder)
    expect_advice(environment.run("dvora", "report", "run", folder=folder, status=2), "report")


def expect_advice(output: str, extra: str) -> None:
    """Check that a command ended with one line that names an extra.

    Raises:
        InstallationError: it did not.
    """
    if f".[{extra}]" not in output or output.count("\n") != 1:
        raise InstallationError(f"expected one line that says to install '.[{extra}]', got: {output}")


def main() -> int:
    """Run both; 1 if one fails."""
    try:
        with empty_environment() as environment, tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            wheel = built_wheel(environment, place)
            check_alone(environment, wheel)
            check_with_cli(environment, wheel, place)
    except InstallationError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{wheel.name}: installs, and its quick start runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
