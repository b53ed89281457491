"""Classes of modules that a process may never import: whoever does not use them is spared their time."""

import sys


def imported_class(module: str, name: str) -> type | None:
    """A class, if its module is imported; None without it, and while another thread is about to import it.

    Args:
        module: of the class.
        name: of the class.
    """
    found: type | None = getattr(sys.modules.get(module), name, None)
    return found
