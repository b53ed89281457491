"""A second copy of the source in which every shape annotation is checked at every call (jaxtyping and beartype).

The copy has a name of its own: `dvora` itself stays as users import it, which torch.compile relies on.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from jaxtyping import install_import_hook

import dvora

_ALIAS = "checked_dvora"


def checked(module: str) -> ModuleType:
    """The copy of `dvora.<module>` whose shapes are checked."""
    if _ALIAS not in sys.modules:
        package = ModuleType(_ALIAS)
        package.__path__ = [str(Path(dvora.__file__).parent)]
        sys.modules[_ALIAS] = package
    with install_import_hook(_ALIAS, "beartype.beartype"):
        return importlib.import_module(f"{_ALIAS}.{module}")
