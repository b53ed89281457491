"""Every layer type on every base, and every operation on each: the README's table is written from these runs."""

import json
from collections.abc import Callable
from itertools import product

import pytest

from benchmarks.support import RESULT
from tests.peft.bases import FAMILIES
from tests.peft.operations_tried import OPERATIONS, PAIRS, Subject

RECORDED = (
    {(row["layer"], row["base"], row["operation"]): row["outcome"] for row in json.loads(RESULT.read_text())["rows"]}
    if RESULT.exists()
    else None
)

# `benchmarks.support` tries everything.
TRACED = ("torch.compile", "torch.export")
"""These take longer than all else together: one layer of each kind, and one format of each library."""
KINDS = ("Linear", "Conv2d", "Embedding", "MultiheadAttention", "experts (E, out, in)")
IN_EVERY_DTYPE = ("outputs", "gradients", "merge, unmerge")
"""All else depends on the dtype in what all layer types share, so the other dtypes are tried with one."""


def is_tried(layer: str, base: str, operation: str) -> bool:
    """Whether the suite tries a row of the table that has been recorded."""
    if operation in TRACED:
        return base in FAMILIES or (base == "float32" and layer in KINDS)
    return layer == "Linear" or base == "float32" or operation in IN_EVERY_DTYPE


GROUPS = 3
"""Of lambda_d: some layers have a number of columns that it divides, most do not."""


def is_tried_by_groups(layer: str, base: str, operation: str) -> bool:
    """Whether the suite tries a row of the table with lambda_d by groups, too."""
    if operation in TRACED:
        return base == "float32" and layer in KINDS
    return base == "float32" or base in FAMILIES or (base == "float64" and operation in IN_EVERY_DTYPE)


TRIED = [
    (*pair, operation, groups)
    for groups, is_one in ((1, is_tried), (GROUPS, is_tried_by_groups))
    for pair, operation in product(PAIRS, OPERATIONS)
    if (groups == 1 if RECORDED is None else is_one(*pair, operation))
]


# torch 2.13's compiler makes instances of autograd functions, which it deprecates.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("layer", "base", "operation", "groups"), TRIED)
def test_a_layer_on_a_base(
    layer: str, base: str, operation: str, groups: int, record_property: Callable[[str, object], None]
) -> None:
    outcome = OPERATIONS[operation](Subject(layer, base, groups))
    for name, value in {"layer": layer, "base": base, "operation": operation, "outcome": outcome}.items():
        record_property(name, value)
    if RECORDED is not None:
        assert outcome == RECORDED[layer, base, operation], "the table is out of date: python -m benchmarks.support"


@pytest.mark.skipif(RECORDED is None, reason="the table is being recorded")
def test_the_table_has_every_pair_and_operation() -> None:
    assert RECORDED.keys() == {(*pair, operation) for pair, operation in product(PAIRS, OPERATIONS)}
