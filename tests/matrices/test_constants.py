"""What products need is the same in every process and after every move; made once, and nothing global is touched."""

import copy
import hashlib
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from dvora.matrices import philox
from dvora.matrices.dense import Matrices, Shard
from dvora.matrices.interface import DISTRIBUTION, SharedProjections
from tests.cases import COPIES, randn

META, CPU = torch.device("meta"), torch.device("cpu")
SIZES = [(3, 6, 5), (9, 6, 5), (64, 1024, 768)]
"""Rank, in, out: small ones, a rank above both sizes, large ones."""

DIGESTS = """
import hashlib
from dvora.matrices.interface import SharedProjections
shared = SharedProjections(11)
for matrix in (shared.A(40, 700), shared.B(40, 300)):
    print(hashlib.sha256(matrix.contiguous().numpy().tobytes()).hexdigest())
"""


def digests_here() -> list[str]:
    shared = SharedProjections(11)
    matrices = shared.A(40, 700), shared.B(40, 300)
    return [hashlib.sha256(matrix.contiguous().numpy().tobytes()).hexdigest() for matrix in matrices]


def plain_processor(threads: int) -> dict[str, str]:
    """An environment in which torch and NumPy use none of the processor's extensions."""
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    variables = {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": str(threads)}
    return {**os.environ, **variables, "NPY_DISABLE_CPU_FEATURES": " ".join(found)}


def test_another_processor_and_thread_count_make_the_same_bits() -> None:
    command = [sys.executable, "-c", DIGESTS]
    threads = 1 if torch.get_num_threads() > 1 else 2
    done = subprocess.run(command, env=plain_processor(threads), capture_output=True, text=True, check=True)
    assert done.stdout.split() == digests_here()


def reserved(distribution: str = DISTRIBUTION) -> SharedProjections:
    shared = SharedProjections(2, distribution)
    for sizes in SIZES:
        shared.reserve(*sizes)
    return shared


INPUTS = [(randn(2, inputs, seed=0), randn(rank, seed=1)) for rank, inputs, _ in SIZES]


def passes(matrices: Matrices, device: torch.device = CPU) -> list[Tensor]:
    """One of everything, for layers of all sizes."""
    results = []
    for (rank, inputs, outputs), (x, lambda_d) in zip(SIZES, INPUTS, strict=True):
        x, lambda_d = x.to(device), lambda_d.to(device)
        z = matrices.project(x, rank)
        y = matrices.expand(z, outputs)
        results += [z, y, matrices.project_transpose(z, inputs), matrices.expand_transpose(y, rank)]
        results += [matrices.squares(lambda_d, inputs, outputs), matrices.squares_gradient(y[0], lambda_d, inputs)]
        results.append(matrices.select(torch.arange(3, device=device), rank, inputs, torch.float32))
    return results


def assert_same(results: list[Tensor], others: list[Tensor]) -> None:
    for result, other in zip(results, others, strict=True):
        assert torch.equal(result, other)


def nothing_is_made(patch: pytest.MonkeyPatch) -> None:
    """Let every value that is asked of a seed be an error."""
    patch.setattr(philox, "raw_row", lambda *_: pytest.fail("made again"))


CHANGES = {
    "to bfloat16": lambda shared: shared.to(torch.bfloat16),
    "meta and to_empty": lambda shared: shared.to("meta").to_empty(device="cpu"),
    **COPIES,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_matrices_survive_and_passes_find_them_made(
    change: Callable[[SharedProjections], SharedProjections], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, changed = passes(reserved().impl), change(reserved())
    nothing_is_made(monkeypatch)
    assert_same(passes(changed.impl), expected)


def test_a_copy_shares_the_constants_and_a_file_holds_none() -> None:
    shared = reserved()
    assert shared.state_dict() == {}
    assert [*shared.parameters(), *shared.buffers()] == []
    twin = copy.deepcopy(shared)
    assert all(twin.impl._constants[key] is constant for key, constant in shared.impl._constants.items())
    twin.impl.reserve(2, 2, 2, torch.float32)
    assert twin.impl._constants.keys() != shared.impl._constants.keys()
    assert len(pickle.dumps(shared)) < 2000


def test_the_meta_device_holds_nothing_and_what_is_made_there_has_shapes_alone() -> None:
    shared = reserved()
    shapes = [result.shape for result in passes(shared.impl)]
    shared.to("meta")
    assert not shared.impl._constants
    for result, shape in zip(passes(shared.impl, META), shapes, strict=True):
        assert result.is_meta
        assert result.shape == shape


def test_a_shard_follows_to_another_device_and_back() -> None:
    shared = SharedProjections(3)
    z = randn(2, 4, seed=0)
    before = shared.impl.of_shard(None, Shard(6, 12, 12)).expand(z, 6)
    shared.to("meta")
    assert shared.impl.of_shard(None, Shard(6, 12, 12)).expand(z.to("meta"), 6).is_meta
    shared.to_empty(device="cpu")
    assert torch.equal(shared.impl.of_shard(None, Shard(6, 12, 12)).expand(z, 6), before)


def test_what_a_caller_writes_into_a_matrix_stays_there() -> None:
    shared, other = SharedProjections(0), SharedProjections(0)
    shared.reserve(3, 8, 8)
    shared.A(3, 8).zero_()
    shared.B(3, 8).zero_()
    assert torch.equal(shared.A(3, 8), other.A(3, 8))
    assert torch.equal(shared.B(3, 8), other.B(3, 8))
    assert_same(passes(shared.impl), passes(other.impl))


def test_inference_mode_leaves_matrices_that_can_be_trained_through() -> None:
    with torch.inference_mode():
        matrices = reserved().impl
        passes(matrices)
    for rank, inputs, outputs in SIZES:
        x, lambda_d = randn(2, inputs, seed=0).requires_grad_(), randn(rank, seed=1).requires_grad_()
        y = matrices.expand(matrices.project(x, rank), outputs) * matrices.squares(lambda_d, inputs, outputs)
        y.sum().backward()
        assert x.grad.isfinite().all()
        assert lambda_d.grad.isfinite().all()


def test_nothing_of_a_transform_is_kept() -> None:
    matrices = SharedProjections(2).impl
    x = randn(3, 2, 6, seed=0)
    torch.vmap(lambda x: matrices.project(x, 3))(x)
    torch.func.grad(lambda x: matrices.expand(matrices.project(x, 3), 5).sum())(x)
    assert not matrices._constants
    assert_same(passes(matrices), passes(reserved().impl))


@pytest.mark.usefixtures("compiler")
def test_a_graph_is_compiled_once_for_a_model_that_moved() -> None:
    shared = reserved().to("meta").to_empty(device="cpu")
    compiled = torch.compile(passes, fullgraph=True, backend="aot_eager")
    results = compiled(shared.impl)
    assert_same(results, passes(shared.impl))
    shared.reserve(1, 2, 3)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(compiled(shared.impl), results)


@pytest.mark.usefixtures("hasty_threads")
def test_threads_that_begin_together_get_the_same_matrices() -> None:
    expected = passes(reserved().impl)
    for _ in range(5):
        matrices = SharedProjections(2).impl
        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(passes, matrices) for _ in range(16)]:
                assert_same(future.result(), expected)


def test_global_generators_are_untouched() -> None:
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    for distribution in (DISTRIBUTION, "peft_vera(r=64, in=1024, out=768)"):
        passes(reserved(distribution).impl)
        SharedProjections(4, distribution).fingerprint()
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    np.testing.assert_equal(before[1], after[1])
    assert before[2] == after[2]
