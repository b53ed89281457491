"""What tests of benchmarks share: products in bfloat16 that take no minutes where the processor has none."""

from collections.abc import Iterator

import pytest

from benchmarks.bfloat16 import multiply_in_float32_where_slow


@pytest.fixture(scope="module")
def products_in_bfloat16() -> Iterator[None]:
    """For the tests of a file that train in bfloat16."""
    kept = multiply_in_float32_where_slow()
    yield
    del kept
