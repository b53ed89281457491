"""The process in which the kernels of these tests run."""

from collections.abc import Iterator

import pytest

from tests.compiled.interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")
    process = Interpreter()
    yield process
    process.close()
