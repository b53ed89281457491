"""Lets PEFT's scripts, which refuse a CPU, run on one: for trials only, and nothing of it is a measurement."""

import platform
from collections.abc import Callable
from typing import Any

import torch


class _Posing(str):
    """The name "cpu", which also equals "xpu", one of the two that PEFT's scripts compare with; torch reads "cpu"."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and (str.__eq__(self, other) or str.__eq__(other, "xpu"))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def pose_as_gpu() -> None:
    """Make PEFT name the CPU as the accelerator; `torch.cpu` gets what the scripts ask of one, with no memory used."""
    import peft.utils

    zero: Callable[..., int] = lambda *_: 0  # noqa: E731
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    answers: dict[str, Callable[..., Any]] = {
        **dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_reserved"), zero),
        **dict.fromkeys(("reset_peak_memory_stats", "empty_cache", "manual_seed_all"), nothing),
        "get_device_name": lambda *_: f"{platform.machine()} CPU posing as a GPU",
    }
    for name, answer in answers.items():
        setattr(torch.cpu, name, answer)
    peft.utils.infer_device = lambda: _Posing("cpu")
