"""Every layer type on every base, and every operation on each: the README's table is written from these runs."""

import json
from collections.abc import Callable
from itertools import product

import pytest

from benchmarks.support import RESULT
from tests.peft.bases import FAMILIES
from tests.peft.operations_tried import DTYPES, OPERATIONS, PAIRS, Subject

RECORDED = (
    {(row["layer"], row["base"], row["operation"]): row["outcome"] for row in json.loads(RESULT.read_text())["rows"]}
    if RESULT.exists()
    else None
)

# What is tried again with another dtype or format only where that can matter; `benchmarks.support` tries everything.
# Tracing costs more than all else together. Dtypes change its casts only, which all layer types share.
TRACED = ("torch.compile", "torch.export")
COPIED = ("save, load", "hot swap", "deepcopy", "CPU offload")
"""These copy values as they are: one dtype of each width."""


def is_tried(layer: str, base: str, operation: str) -> bool:
    """Whether the suite tries a row of the table that has been recorded."""
    if operation in TRACED:
        return base == "float32" or (layer == "Linear" and base in (*DTYPES, *FAMILIES))
    return operation not in COPIED or base not in ("float64", "float16")


TRIED = [
    (*pair, operation)
    for pair, operation in product(PAIRS, OPERATIONS)
    if RECORDED is None or is_tried(*pair, operation)
]


# torch 2.13's compiler makes instances of autograd functions, which it deprecates.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("layer", "base", "operation"), TRIED)
def test_a_layer_on_a_base(
    layer: str, base: str, operation: str, record_property: Callable[[str, object], None]
) -> None:
    outcome = OPERATIONS[operation](Subject(layer, base))
    for name, value in {"layer": layer, "base": base, "operation": operation, "outcome": outcome}.items():
        record_property(name, value)
    if RECORDED is not None:
        assert outcome == RECORDED[layer, base, operation], "the table is out of date: python -m benchmarks.support"


@pytest.mark.skipif(RECORDED is None, reason="the table is being recorded")
def test_the_table_has_every_pair_and_operation() -> None:
    assert RECORDED.keys() == {(*pair, operation) for pair, operation in product(PAIRS, OPERATIONS)}
