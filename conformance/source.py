"""PEFT's own tests, from its source distribution of the installed version."""

import shutil
from importlib.metadata import version
from pathlib import Path

from materials.fetch import Artefact, FetchError, fetch

_SHA256 = {"0.21.2": "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"}


def copy_tests(folder: Path) -> None:
    """Lay the test files of the installed PEFT into a folder, as a package; what was there is replaced.

    Raises:
        FetchError: the version is not one that the tables were written for, or it could not be had.
    """
    installed = version("peft")
    if installed not in _SHA256:
        raise FetchError(
            f"PEFT {installed} is installed, and conformance knows {', '.join(_SHA256)}: install one of these, or add "
            f"the digest of the new source distribution to {__file__} and go through the tables beside it"
        )
    artefact = Artefact("peft", installed, "sdist", _SHA256[installed], megabytes=1, members="*/tests/*.py")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(fetch(artefact) / f"peft-{installed}" / "tests", folder)
    # They import each other, and the package's own file is not in the distribution.
    (folder / "__init__.py").touch()
