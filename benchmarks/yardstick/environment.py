"""Fetches PEFT and installs it beside what its scripts import: python -m benchmarks.yardstick.environment

`make yardstick` does it, in an environment of its own: a wheel of PEFT that is there is replaced.
"""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.yardstick.checkout import CheckoutError, checked_out
from benchmarks.yardstick.needs import chosen, first_problem
from benchmarks.yardstick.tasks import TASKS


def comparison(checkout: Path) -> Path:
    """PEFT's folder with the tasks."""
    return checkout / "method_comparison"


def install(checkout: Path) -> None:
    """Install PEFT from the repository into this environment, with what the scripts of all tasks import.

    The scripts note the commit and the branch of the PEFT that they import, which a wheel does not have.

    Raises:
        CheckoutError: pip failed.
    """
    if is_installed_from(checkout):
        return
    lists = [comparison(checkout) / name / "requirements.txt" for name in TASKS]
    _pip(*(option for file in lists for option in ("--requirement", str(file))))
    # Last, so that it is there only if all is; what it needs came with dvora's extra.
    _pip("--no-deps", "--editable", str(checkout))


def is_installed_from(checkout: Path) -> bool:
    """Whether this environment's PEFT is that of the repository."""
    try:
        noted = importlib.metadata.distribution("peft").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return False
    return noted is not None and json.loads(noted)["url"] == checkout.resolve().as_uri()


def main(arguments: Sequence[str]) -> None:
    """Fetch and install, unless what a run needs is missing; most of `--first` needs nothing that is fetched."""
    asked = chosen(arguments)
    if problem := first_problem(asked):
        sys.exit(problem)
    if asked.first == "cpu":
        return
    try:
        install(checked_out())
    except CheckoutError as error:
        if not asked.first:
            sys.exit(str(error))
        print(f"{error}\n--first goes on without PEFT's repository", file=sys.stderr)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, check=False).returncode != 0:
        raise CheckoutError(
            f"pip could not install {' '.join(arguments)}: what it said is above. Check the network, then run this "
            "again"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
