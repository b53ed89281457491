"""Every layer type on every base, and every operation on each: the README's table is written from these runs."""

import json
from collections.abc import Callable
from itertools import product

import pytest

from benchmarks.support import RESULT
from tests.tuner.operations_tried import OPERATIONS
from tests.tuner.subjects import PAIRS, Subject

RECORDED = (
    {(row["layer"], row["base"], row["operation"]): row["outcome"] for row in json.loads(RESULT.read_text())["rows"]}
    if RESULT.exists()
    else None
)

# Tracing meets the same operations whatever the dtype; half precision adds casts. Recording tries all.
TRACED, NOT_TRACED = ("torch.compile", "torch.export"), ("float64", "float16")
TRIED = [
    (*pair, operation)
    for pair, operation in product(PAIRS, OPERATIONS)
    if RECORDED is None or not (operation in TRACED and pair[1] in NOT_TRACED)
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
