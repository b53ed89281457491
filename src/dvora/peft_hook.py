"""Registers the PEFT method as soon as PEFT is imported, without importing PEFT for those who do not use it."""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from .extras import how_to_install


def register_with_peft() -> None:
    """Register now if PEFT is imported already, else right after its import."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


class _PeftFinder(MetaPathFinder):
    """Adds the registration to the execution of PEFT; asking for PEFT without importing it changes nothing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = partial(self._execute_and_register, spec.loader.exec_module)
            spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec

    def _execute_and_register(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        execute(module)
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        _register()


def _register() -> None:
    try:
        importlib.import_module("dvora.peft")
    except ImportError as error:
        # `import peft` must not fail because of dvora: the user may want the plain layer only.
        warnings.warn(
            f"dvora's PEFT method is not available with the installed peft and transformers ({error}); "
            f"for versions that work, {how_to_install('peft')}",
            ImportWarning,
            stacklevel=2,
        )
