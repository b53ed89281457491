"""Stubs for the few names that PEFT's test modules import from packages which DVoRA's tests do not need otherwise."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image


def _load_dataset(name: str) -> dict[str, dict[str, list[Image.Image]]]:
    """An image: all that the selected tests use of a data set."""
    if name != "huggingface/cats-image":
        raise ConnectionError(f"the data set {name} is on a hub, which is not reached from here")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return {"test": {"image": [Image.fromarray(pixels)]}}


class _StableDiffusionPipeline:
    """Never made; PEFT's tests ask whether a model is one."""


class _Parameterized:
    """`parameterized.expand`, as pytest has it."""

    @staticmethod
    def expand(rows: Sequence[tuple[Any, ...]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
        def parametrized(test: Callable[..., None]) -> Callable[..., None]:
            code = test.__code__
            return pytest.mark.parametrize(code.co_varnames[1 : code.co_argcount], rows)(test)

        return parametrized


_NAMES: dict[str, dict[str, object]] = {
    "datasets": {"load_dataset": _load_dataset},
    "diffusers": {"StableDiffusionPipeline": _StableDiffusionPipeline, "__version__": "0"},
    "parameterized": {"parameterized": _Parameterized},
}


@contextmanager
def stand_ins() -> Iterator[None]:
    """Stand in for the packages while PEFT's test modules are imported, and for nobody else."""
    before = {name: sys.modules.get(name) for name in _NAMES}
    for name, members in _NAMES.items():
        module = ModuleType(name, __doc__)
        # Libraries ask whether the package is there before they use it.
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(members)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name, module_before in before.items():
            if module_before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module_before
