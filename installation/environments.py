"""A temporary virtual environment: created, filled by pip, asked for its versions and size."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Variables that would make this process's packages visible in the environment.
_NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


class InstallationError(RuntimeError):
    """Something could not be installed or did not run; the message has its command and the end of its output."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Args:
        folder: of the environment.
    """

    folder: Path

    def path_of(self, program: str) -> str:
        """Path of a program of the environment."""
        return str(self.folder / ("Scripts" if os.name == "nt" else "bin") / program)

    def install(self, *arguments: str) -> None:
        """Install packages with the environment's pip.

        Raises:
            InstallationError: pip failed.
        """
        self.run("python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)

    def run(self, program: str, *arguments: str, folder: Path | None = None, status: int = 0) -> str:
        """Run one of the environment's programs, offline for the hub; its standard output and error.

        Args:
            program: its name.
            arguments: of the program.
            folder: to run in.
            status: the expected exit status.

        Raises:
            InstallationError: it ended with another one.
        """
        ended = self._ended(program, *arguments, folder=folder)
        if ended.returncode != status:
            last = "\n".join(ended.stdout.splitlines()[-30:])
            command = f"{program} {' '.join(arguments)}"
            raise InstallationError(f"{command}: exit status {ended.returncode}, expected {status}\n{last}")
        return ended.stdout

    def output(self, program: str, *arguments: str, folder: Path) -> str:
        """The standard output and error of a program, whatever its exit status."""
        return self._ended(program, *arguments, folder=folder).stdout

    def _ended(self, program: str, *arguments: str, folder: Path | None) -> subprocess.CompletedProcess[str]:
        variables = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        return subprocess.run(
            [self.path_of(program), *arguments],
            cwd=folder or self.folder,
            env={**variables, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def versions(self) -> dict[str, str]:
        """Python's version and those of all packages, by name in lower case, without local parts."""
        code = (
            "import importlib.metadata as m, json, platform; "
            "print(json.dumps({'python': platform.python_version(), "
            "**{d.metadata['Name'].lower(): d.version.partition('+')[0] for d in m.distributions()}}))"
        )
        found: dict[str, str] = json.loads(self.run("python", "-c", code))
        return found

    def megabytes(self) -> int:
        """The size of all files in it."""
        return sum(path.lstat().st_size for path in self.folder.rglob("*")) // 10**6


@contextmanager
def empty_environment(python: str = sys.executable) -> Iterator[Environment]:
    """An environment with pip alone, removed at the end.

    Args:
        python: the interpreter, a path or a name on the PATH.

    Raises:
        InstallationError: there is no such interpreter, or it cannot create an environment.
    """
    with tempfile.TemporaryDirectory(prefix="dvora-environment-") as folder:
        try:
            made = subprocess.run([python, "-m", "venv", folder], capture_output=True, text=True, check=False)
        except OSError as error:
            raise InstallationError(f"there is no Python {python!r} ({error.strerror}); give a path to one") from error
        if made.returncode:
            raise InstallationError(
                f"{python} cannot create an environment: {(made.stdout + made.stderr).strip()[-300:]}"
            )
        yield Environment(Path(folder))


def built_wheel(environment: Environment, folder: Path) -> Path:
    """Build dvora's wheel from this clone with an environment's pip.

    Raises:
        InstallationError: it could not be built.
    """
    environment.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (wheel,) = folder.glob("dvora-*.whl")
    return wheel
