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

# Tracing costs more than all else together, and dtypes change its casts only, which all layer types share: other dtypes
# than float32 are traced with one layer type. `benchmarks.support` tries all of them.
TRACED = ("torch.compile", "torch.export")
TRIED = [
    (layer, base, operation)
    for (layer, base), operation in product(PAIRS, OPERATIONS)
    if RECORDED is None or operation not in TRACED or layer == "Linear" or base == "float32"
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
