"""Registers the PEFT method as soon as PEFT is imported, without importing PEFT for those who do not use it."""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def register_with_peft() -> None:
    """Register now if PEFT is imported already, else right after its import."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


class _PeftFinder(MetaPathFinder):
    """Steps aside at the first import of PEFT, adding the registration to its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(_execute_and_register, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _execute_and_register(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    execute(module)
    _register()


def _register() -> None:
    try:
        importlib.import_module("dvora.tuner")
    except ImportError as error:
        # `import peft` must not fail because of dvora: the user may want the plain layer only.
        warnings.warn(
            f"dvora's PEFT method is not available with the installed peft and transformers ({error}); "
            "pip install 'dvora[peft]' brings versions that work",
            ImportWarning,
            stacklevel=2,
        )
