"""PEFT's own tests, from its source distribution: the pinned one of the installed version, or any other archive."""

import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from materials.fetch import Artefact, FetchError, fetch, unpack

_MEMBERS = "*/tests/*.py"
_SHA256 = {"0.21.2": "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"}


def copy_tests(folder: Path, archive: Path | None = None) -> None:
    """Lay the test files of the installed PEFT into a folder, as a package; what was there is replaced.

    Args:
        folder: of the tests.
        archive: PEFT's source; None: the pinned one, which is fetched.

    Raises:
        FetchError: the version is not one that the tables were written for, or it could not be had.
    """
    if archive is not None:
        with tempfile.TemporaryDirectory() as unpacked:
            unpack(archive, _MEMBERS, Path(unpacked))
            (source,) = Path(unpacked).iterdir()
            _lay(source / "tests", folder)
        return
    installed = version("peft")
    if installed not in _SHA256:
        raise FetchError(
            f"PEFT {installed} is installed, and conformance knows {', '.join(_SHA256)}: install one of these, or add "
            f"the digest of the new source distribution to {__file__} and go through the tables beside it"
        )
    artefact = Artefact("peft", installed, "sdist", _SHA256[installed], megabytes=1, members=_MEMBERS)
    _lay(fetch(artefact) / f"peft-{installed}" / "tests", folder)


def _lay(tests: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tests, folder)
    # They import each other, and the package's own file is not in the distribution.
    (folder / "__init__.py").touch()
