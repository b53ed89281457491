"""Every layer type on every base, and every operation on each: the table of what works is written from these runs."""

from collections.abc import Callable

import pytest
from operations_tried import OPERATIONS
from subjects import PAIRS, Subject


# torch 2.13's compiler makes instances of autograd functions, which it deprecates.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("layer", "base"), PAIRS, ids=lambda name: str(name))
def test_a_layer_on_a_base(
    layer: str, base: str, operation: str, record_property: Callable[[str, object], None]
) -> None:
    record_property("outcome", OPERATIONS[operation](Subject(layer, base)))
