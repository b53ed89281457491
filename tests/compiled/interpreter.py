"""Kernels run by triton's interpreter on CPU tensors, in a process of their own.

triton decides when it is imported whether it interprets, for the whole process and from an environment variable. Other
tests (and torch.compile) import it too, so only a process that does nothing else is switched.
"""

import importlib
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def _call(request: bytes) -> bytes:
    module, function, arguments = pickle.loads(request)
    torch.set_num_threads(1)
    return pickle.dumps(getattr(importlib.import_module(f"dvora.{module}"), function)(*arguments))


class Interpreter:
    """Calls functions of `dvora` in the interpreting process; arguments keep their strides."""

    def __init__(self) -> None:
        self._process = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_interpret)

    def __call__(self, module: str, function: str, *arguments: object) -> Any:
        # Bytes, because the pool would pass tensors through shared memory.
        request = pickle.dumps((module, function, arguments))
        return pickle.loads(self._process.submit(_call, request).result())

    def close(self) -> None:
        self._process.shutdown()


def last_rounding(dtype: torch.dtype) -> float:
    """Largest relative error of a result that was computed in a wider dtype, if there is one for `dtype`."""
    if dtype == torch.bfloat16:
        # The interpreter cuts off; that the compiled kernels round to nearest is a test of its own.
        return torch.finfo(dtype).eps
    return torch.finfo(dtype).eps / 2 if dtype == torch.float16 else 0.0
