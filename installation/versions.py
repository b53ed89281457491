"""The oldest and the newest versions of what dvora needs: python -m installation.versions [--newest PYTHON] ...

With the newest versions of everything, and with the oldest that the extra `peft` allows, the README's quick start runs,
and the tests of the mathematics, of the layers and of the PEFT method; with the newest, and with the oldest that the
command line allows, its commands. Warnings are not errors there: packages deprecate what others of them still use.
Writes benchmarks/results/versions.json, and keeps the rows of trials that are not run.
"""

import argparse
import json
import platform
import re
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from installation.environments import ROOT, Environment, InstallationError, built_wheel, empty_environment
from installation.wheel import check_commands, check_quick_start

RESULT = ROOT / "benchmarks" / "results" / "versions.json"
PACKAGES = ("torch", "numpy", "safetensors", "peft", "transformers", "accelerate", "datasets", "pydantic", "typer")
COMMANDS = (
    "evaluate run",
    "analyze run --output analysis.html",
    "report run --output report.html",
    "merge run -o merged",
)
TOOLS = ("beartype", "hypothesis", "jaxtyping", "packaging", "psutil", "pytest", "scipy")
TESTS = (
    *("tests/matrices", "tests/test_functional.py", "tests/test_tensors.py", "tests/test_weight.py"),
    *("tests/test_factors.py", "tests/test_layer.py", "tests/test_adapter.py", "tests/test_changes.py"),
    *("tests/test_training.py", "tests/test_peft_hook.py"),
    *("tests/adapter_file/test_settings.py", "tests/peft/test_model.py", "tests/peft/test_merging.py"),
    *("tests/peft/test_mixed_batch.py", "tests/peft/test_conversion.py", "tests/peft/test_injecting.py"),
    *("tests/peft/test_layer.py", "tests/peft/test_layer_types.py", "tests/peft/test_saving.py"),
)
MOST_FAILURES = 20
"""Failed tests that are listed at most."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One environment.

    Args:
        name: in the table, and of the option.
        extra: of dvora, that is installed.
        lowest: the lowest versions in place of the newest.
        commands: whether the command line is tried.
        tests: whether the tests run.
    """

    name: str
    extra: str
    lowest: bool
    commands: bool
    tests: bool


TRIALS = (
    Trial("oldest", "peft", lowest=True, commands=False, tests=True),
    Trial("oldest-commands", "report", lowest=True, commands=True, tests=False),
    Trial("newest", "report", lowest=False, commands=True, tests=True),
)


def lower_bounds(metadata: str, extra: str) -> list[str]:
    """The requirements of a package with an extra, at the lowest versions that it allows: "peft==0.21".

    Args:
        metadata: of the package, as its wheel has it.
        extra: whose requirements are counted too.
    """
    found: dict[str, Version] = {}
    for line in re.findall(r"^Requires-Dist: (.*)$", metadata, flags=re.MULTILINE):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            for each in requirement.specifier:
                found[requirement.name] = max(Version(each.version), found.get(requirement.name, Version("0")))
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def run_trial(trial: Trial, python: str) -> Row:
    """Make the environment of a trial with one Python, and run everything there.

    Raises:
        InstallationError: the versions cannot be installed together, or the quick start or a command does not run.
    """
    with empty_environment(python) as environment, tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        wheel = built_wheel(environment, place)
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            metadata = archive.read(name).decode("utf-8")
        exact = lower_bounds(metadata, trial.extra) if trial.lowest else []
        environment.install(f"{wheel}[{trial.extra}]", *exact)
        found = environment.versions()
        row = {
            "name": trial.name,
            "extra": trial.extra,
            "python": found["python"],
            "versions": {package: found[package] for package in PACKAGES if package in found},
            "installed_megabytes": environment.megabytes(),
        }
        check_quick_start(environment, place)
        if trial.commands:
            check_commands(environment, place, *COMMANDS)
        if trial.tests:
            environment.install(*TOOLS, *exact)
            row["tests"] = test_results(environment, "pytest", "-o", "filterwarnings=default", *TESTS)
        return row


def test_results(environment: Environment, module: str, *arguments: str) -> Row:
    """How many of the tests passed, failed and were skipped, and those that failed, with their errors.

    Args:
        environment: to run in.
        module: pytest, or what runs it.
        arguments: of pytest, beside those that make its output short.
    """
    shared = ("-q", "-p", "no:cacheprovider", "--tb=line")
    output = environment.output("python", "-m", module, *shared, *arguments, folder=ROOT)
    last = output.rstrip().splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    if "passed" not in counts:
        raise InstallationError(f"the tests did not run:\n{output[-3000:]}")
    failures = re.findall(r"^(?:FAILED|ERROR) (.+)", output, flags=re.M)
    return {**counts, "failures": failures[:MOST_FAILURES]}


def main() -> int:
    """Run the requested trials, or all with this Python; 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m installation.versions", description=__doc__.partition("\n")[0])
    for trial in TRIALS:
        parser.add_argument(f"--{trial.name}", dest=trial.name, metavar="PYTHON", help=f"run {trial.name} with it")
    options = {name: python for name, python in vars(parser.parse_args()).items() if python}
    before = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else []
    rows = {row["name"]: row for row in before}
    failed = False
    for trial in TRIALS:
        if options and trial.name not in options:
            continue
        try:
            rows[trial.name] = run_trial(trial, options.get(trial.name, sys.executable))
        except InstallationError as error:
            print(f"{trial.name}: {error}", file=sys.stderr)
            failed = True
            continue
        print(json.dumps(rows[trial.name], indent=1), flush=True)
        failed = failed or bool(rows[trial.name].get("tests", {}).get("failures"))
        kept = [rows[each.name] for each in TRIALS if each.name in rows]
        result = {"system": f"{platform.system()} {platform.machine()}", "rows": kept}
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
