"""The structured matrices against dense ones that are built from the formula, cosine by cosine."""

import copy
import hashlib
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dvora.matrices import philox, structured
from tests.cases import randn
from tests.checked import checked
from tests.matrices.naive import structured_side as naive
from tests.reference import worst_error

StructuredMatrices = checked("matrices.structured").StructuredMatrices
Unchecked = structured.StructuredMatrices

SIZE = st.one_of(st.integers(1, 40), st.sampled_from([64, 97, 2816]))
RANK = st.one_of(st.integers(1, 70), st.sampled_from([128, 211]))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)

# sha256 of A (24 x 40) and B (36 x 45) for seed 7, and of both with a rank above the sizes. A change is a new format.
PINNED = [
    "550bfadae3bd363bd8616661b27fdb48feb16a8f182abee9eeae85c4196b3e4b",
    "100f6102890ee2e446f1d6cc3be356f57a45ba37948d7c1f9fb14f47b74b5c64",
    "35350f6abb833381d74d30adca1ea8d7df85c115d3b55420c72e6d96dbd2949d",
    "02a5b6ef3d25b24bbfb2fd6494c503070499f687cf9dd90cebc8241cf7df9841",
]


def sha256(matrix: Tensor) -> str:
    return hashlib.sha256(matrix.contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def test_values_are_pinned() -> None:
    matrices = StructuredMatrices(7)
    found = [matrices.A(24, 40), matrices.B(45, 36).T, matrices.A(64, 40), matrices.B(100, 36)]
    assert [sha256(matrix) for matrix in found] == PINNED


@given(rank=RANK, size=SIZE)
def test_dense_matrices_are_those_of_the_formula(rank: int, size: int) -> None:
    matrices = StructuredMatrices(3)
    assert worst_error(matrices.A(rank, size, torch.float64), naive("A", rank, size)) < 1e-14
    assert worst_error(matrices.B(rank, size, torch.float64), naive("B", rank, size).T) < 1e-14
    assert worst_error(matrices.A(rank, size), naive("A", rank, size)) < 2e-7


@given(rank=RANK, size=SIZE)
def test_rows_of_A_are_orthogonal_in_blocks_of_the_size(rank: int, size: int) -> None:
    for block in StructuredMatrices(3).A(rank, size, torch.float64).split(size):
        torch.testing.assert_close(block @ block.T, 2 * torch.eye(len(block)).double(), atol=1e-12, rtol=0)


@given(rank=RANK, size=SIZE)
def test_mean_squares_of_entries_are_those_of_kaiming_uniform(rank: int, size: int) -> None:
    matrices = StructuredMatrices(3)
    assert float(matrices.A(rank, size, torch.float64).square().mean()) == pytest.approx(2 / size, rel=1e-12)
    assert float(matrices.B(rank, size, torch.float64).square().mean()) == pytest.approx(2 / rank, rel=1e-12)


def test_entries_have_mean_zero() -> None:
    matrices = StructuredMatrices(0)
    for matrix, fan_in in [(matrices.A(64, 900), 900), (matrices.B(64, 900), 64)]:
        assert abs(float(matrix.mean())) < 0.02 * (2 / fan_in) ** 0.5


def test_seeds_sides_and_blocks_differ() -> None:
    A, B = StructuredMatrices(0).A(32, 16), StructuredMatrices(0).B(16, 16).T
    signs = [philox.sign_row(seed, stream, 0, 64) for seed, stream in [(0, 2**34), (0, 2**34 + 1), (1, 2**34)]]
    assert len({row.tobytes() for row in signs}) == 3
    for first, second in [(A[:16], A[16:]), (A[:16], B / B.norm() * A[:16].norm()), (A[:16], Unchecked(1).A(16, 16))]:
        assert not torch.isclose(first, second).all(1).any()


@contextmanager
def in_chunks_of(values: int) -> Iterator[None]:
    """With less than the usual memory for what lies between two products."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("matrices.kronecker", "matrices.structured_norms"):
            patch.setattr(checked(module), "_CHUNK_VALUES", values)
        yield


@every_dtype
@given(rank=RANK, size=SIZE, tokens=st.sampled_from([1, 3, 40]))
def test_products_equal_those_with_the_dense_matrices(dtype: torch.dtype, rank: int, size: int, tokens: int) -> None:
    matrices, tolerance = StructuredMatrices(3), TOLERANCE[dtype]
    A, B = naive("A", rank, size), naive("B", rank, size).T
    wide, narrow = (randn(tokens, n, seed=n, dtype=dtype) for n in (size, rank))
    x, z = wide.double(), narrow.double()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = {
                "project": (matrices.project(wide, rank), x, A.T),
                "project_transpose": (matrices.project_transpose(narrow, size), z, A),
                "expand": (matrices.expand(narrow, size), z, B.T),
                "expand_transpose": (matrices.expand_transpose(wide, rank), x, B),
            }
        for name, (value, inputs, matrix) in found.items():
            assert value.dtype == dtype, name
            # Beside the terms of the sum, which may cancel.
            terms = inputs.abs() @ matrix.abs()
            assert ((value.double() - inputs @ matrix).abs() <= tolerance * terms.max()).all(), name


PAIR = st.one_of(
    st.tuples(RANK, SIZE, SIZE),
    # Alike; p2 a multiple of r2 and the other way round; stacks that align and that do not; a stack on one side.
    st.sampled_from([(64, 64, 64), (512, 1024, 600), (512, 600, 1024), (70, 24, 48), (70, 48, 24), (400, 384, 36)]),
    st.sampled_from([(512, 64, 1024), (512, 1024, 64), (300, 96, 100), (200, 97, 64), (50, 36, 36), (1024, 768, 900)]),
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(shape=PAIR)
def test_row_sums_equal_those_of_the_dense_update(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rank, inputs, outputs = shape
    matrices = StructuredMatrices(3)
    A, B = naive("A", rank, inputs), naive("B", rank, outputs).T
    W, lambda_d, v = (randn(*n, seed=k, dtype=dtype) for k, n in enumerate([(outputs, inputs), (rank,), (outputs,)]))
    update = (B * lambda_d) @ A
    C, H = B * (W.double() @ A.T), (B.T * v) @ B * (A @ A.T)
    expected = {
        "row_squares": update.square().sum(1),
        "their gradient": 2 * H @ lambda_d.double(),
        "row_dots": (W * update).sum(1),
        "its gradient": C.T @ v.double(),
        "gram": A @ A.T,
    }
    for recorded, chunk in ((True, 2**20), (False, 2**14)):
        with torch.set_grad_enabled(recorded), in_chunks_of(chunk):
            found = {
                "row_squares": matrices.row_squares(lambda_d, inputs, outputs),
                "their gradient": 2 * matrices.row_squares_half_gradient(v, lambda_d, inputs),
                "row_dots": matrices.row_dots(W, lambda_d),
                "its gradient": matrices.row_dots_gradient(W, v, rank),
                "gram": matrices.gram(rank, inputs, dtype),
            }
        for name, value in found.items():
            assert value.dtype == dtype, name
            assert worst_error(value, expected[name]) < TOLERANCE[dtype], name


@pytest.mark.parametrize("shape", [(7, 12, 10), (16, 12, 10), (8, 6, 15), (9, 16, 4)])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_row_squares_of_several_layers_are_those_of_each(layers: int, shape: tuple[int, int, int]) -> None:
    rank, inputs, outputs = shape
    matrices = StructuredMatrices(3)
    lambda_d, v = (randn(layers, n, seed=n, dtype=torch.float64) for n in (rank, outputs))
    squares = matrices.row_squares(lambda_d, inputs, outputs)
    half = matrices.row_squares_half_gradient(v, lambda_d, inputs)
    assert matrices.half_dq(lambda_d, inputs, outputs) is None
    A, B = naive("A", rank, inputs), naive("B", rank, outputs).T
    wide = lambda_d.clone().requires_grad_()
    expected = ((B * wide[:, None]) @ A).square().sum(2)
    (gradient,) = torch.autograd.grad(expected, wide, v)
    assert worst_error(squares, expected) < 1e-12
    assert worst_error(2 * half, gradient) < 1e-12
    for layer in range(layers):
        assert worst_error(squares[layer], matrices.row_squares(lambda_d[layer], inputs, outputs)) < 1e-14
        of_layer = matrices.row_squares_half_gradient(v[layer], lambda_d[layer], inputs)
        assert worst_error(half[layer], of_layer) < 1e-14


@pytest.mark.parametrize("tokens", [3, 600])
def test_autocast_leaves_the_dtype_of_products_alone(tokens: int) -> None:
    matrices = StructuredMatrices(3)
    x = randn(tokens, 1024, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        z = matrices.project(x, 16)
        y = matrices.expand(z, 1024)
    assert z.dtype == y.dtype == torch.float32
    assert worst_error(y, x.double() @ naive("A", 16, 1024).T @ naive("B", 16, 1024)) < 2e-2


def test_rows_of_a_half_precision_weight_are_summed_in_float32() -> None:
    matrices = StructuredMatrices(3)
    W = randn(36, 64, seed=0, dtype=torch.bfloat16)
    lambda_d, v = randn(16, seed=1), randn(36, seed=2)
    for half, full in [
        (matrices.row_dots(W, lambda_d), matrices.row_dots(W.float(), lambda_d)),
        (matrices.row_dots_gradient(W, v, 16), matrices.row_dots_gradient(W.float(), v, 16)),
    ]:
        assert torch.equal(half, full)


@pytest.mark.parametrize("shape", [(7, 12, 10), (16, 12, 10), (8, 6, 15), (9, 16, 4)])
def test_derivatives_of_everything_that_is_differentiable(shape: tuple[int, int, int]) -> None:
    rank, inputs, outputs = shape
    matrices = StructuredMatrices(3)
    shapes = {"x": (2, inputs), "h": (2, rank), "d": (2, outputs), "v": (outputs,), "lambda_d": (rank,)}
    values = {name: randn(*n, seed=0, dtype=torch.float64).requires_grad_() for name, n in shapes.items()}
    W = randn(outputs, inputs, seed=1, dtype=torch.float64).requires_grad_()
    checks = [
        (lambda x: matrices.project(x, rank), ["x"]),
        (lambda h: matrices.project_transpose(h, inputs), ["h"]),
        (lambda z: matrices.expand(z, outputs), ["h"]),
        (lambda d: matrices.expand_transpose(d, rank), ["d"]),
        (lambda lambda_d: matrices.row_squares(lambda_d, inputs, outputs), ["lambda_d"]),
        (
            lambda v, lambda_d: matrices.row_squares_half_gradient(v, lambda_d, inputs),
            ["v", "lambda_d"],
        ),
    ]
    for function, names in checks:
        arguments = tuple(values[name] for name in names)
        assert gradcheck(function, arguments)
        assert gradgradcheck(function, arguments)
    assert gradcheck(matrices.row_dots, (W, values["lambda_d"]))


@given(rank=RANK, size=st.integers(1, 60), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_columns_are_selected_as_a_product_with_unit_vectors_would(rank: int, size: int, dtype: torch.dtype) -> None:
    index = torch.arange(size).flip(0)[:, None]
    found = StructuredMatrices(3).select(index, rank, size, dtype)
    assert found.dtype == dtype
    assert worst_error(found, naive("A", rank, size).T[index]) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [1, 400])
def test_large_values_of_half_precision_do_not_overflow(tokens: int) -> None:
    matrices = StructuredMatrices(3)
    x = (1e3 * randn(tokens, 4096, seed=0).sign()).half()
    for rank in (16, 1024):
        assert matrices.project(x, rank).isfinite().all()
        assert matrices.expand_transpose(x / 64, rank).isfinite().all()
        z = (1e3 * randn(tokens, rank, seed=1).sign()).half()
        assert matrices.expand(z, 4096).isfinite().all()
        assert matrices.project_transpose(z, 4096).isfinite().all()


def made(matrices: torch.nn.Module) -> list[Tensor]:
    products = [matrices.project(torch.eye(6), 9), matrices.expand(torch.eye(9), 5)]
    return [matrices.A(9, 6), matrices.B(9, 5), matrices.A(3, 6, torch.float64), *products]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda matrices: matrices.half(), id="half"),
        pytest.param(lambda matrices: matrices.double(), id="double"),
        pytest.param(lambda matrices: matrices.to(torch.bfloat16), id="to bfloat16"),
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda matrices: pickle.loads(pickle.dumps(matrices)), id="pickle"),
        pytest.param(lambda matrices: matrices.to("meta").to_empty(device="cpu"), id="meta and to_empty"),
    ],
)
def test_matrices_survive(change) -> None:
    matrices = Unchecked(2)
    made(matrices)
    changed = change(matrices)
    assert changed.buffers
    for matrix, expected in zip(made(changed), made(Unchecked(2)), strict=True):
        assert torch.equal(matrix, expected)


def test_matrices_of_other_sizes_and_ranks_leave_those_in_use_alone() -> None:
    matrices = StructuredMatrices(2)
    before = [matrix.clone() for matrix in made(matrices)]
    buffers = dict(matrices.named_buffers())
    for rank, inputs, outputs in [(2, 6, 5), (50, 6, 5), (9, 12, 10), (9, 5, 6)]:
        matrices.reserve(rank, inputs, outputs)
    for matrix, expected in zip(made(matrices), before, strict=True):
        assert torch.equal(matrix, expected)
    assert all(matrices.get_buffer(name) is buffer for name, buffer in buffers.items())


def test_what_is_reserved_is_not_made_again() -> None:
    matrices = StructuredMatrices(2)
    matrices.reserve(9, 6, 5)
    names = list(dict(matrices.named_buffers()))
    matrices.expand(matrices.project(randn(2, 6, seed=0), 9), 5)
    assert list(dict(matrices.named_buffers())) == names


def test_buffers_are_small_frozen_and_no_part_of_the_state_dict() -> None:
    matrices = StructuredMatrices(2)
    matrices.reserve(256, 1024, 2816)
    assert sum(buffer.numel() for buffer in matrices.buffers()) < 8000
    assert matrices.state_dict() == {}
    assert list(matrices.parameters()) == []
    assert not any(buffer.requires_grad for buffer in matrices.buffers())


def test_products_on_the_meta_device_have_shapes_and_no_memory() -> None:
    matrices = StructuredMatrices(2).to("meta")
    x = torch.empty(2, 3, 6, device="meta")
    z = matrices.project(x, 9)
    assert z.is_meta
    assert matrices.expand(z, 5).shape == (2, 3, 5)
    matrices.reserve(9, 6, 5)
    assert all(buffer.is_meta for buffer in matrices.to("meta").buffers())


def test_inference_mode_leaves_matrices_that_can_be_trained_through() -> None:
    matrices = StructuredMatrices(2)
    with torch.inference_mode():
        matrices.reserve(9, 6, 5)
        matrices.project(randn(2, 6, seed=0), 9)
    x = randn(2, 6, seed=0).requires_grad_()
    matrices.project(x, 9).sum().backward()
    assert x.grad.isfinite().all()


def test_global_generators_are_untouched() -> None:
    before = torch.get_rng_state()
    made(StructuredMatrices(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_compiled_pass_is_one_graph(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    matrices = Unchecked(2)
    matrices.reserve(9, 6, 5, torch.float64)

    def double_pass(x: Tensor) -> Tensor:
        return matrices.expand(matrices.project(x, 9), 5)

    compiled = torch.compile(double_pass, fullgraph=True, backend="aot_eager")
    x = randn(2, 3, 6, seed=0, dtype=dtype).requires_grad_()
    y = compiled(x)
    assert y.dtype == dtype
    assert worst_error(y, Unchecked(2).expand(Unchecked(2).project(x, 9), 5).double()) < TOLERANCE[dtype]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(double_pass(x).sum(), x)
    assert worst_error(gradient, expected.double()) < TOLERANCE[dtype]


# PyTorch's own forward mode uses what PyTorch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("tokens", [4, 600])
def test_transforms_of_functions(tokens: int) -> None:
    matrices = Unchecked(2)
    x = randn(3, tokens, 1024, seed=0, dtype=torch.float64)
    A = matrices.A(7, 1024, torch.float64)
    assert worst_error(torch.vmap(lambda x: matrices.project(x, 7))(x), x @ A.T) < 1e-12
    _, tangent = torch.func.jvp(lambda x: matrices.project(x, 7), (x,), (x,))
    assert worst_error(tangent, x @ A.T) < 1e-12
    gradient = torch.func.grad(lambda x: matrices.project(x, 7).square().sum())(x[0])
    assert worst_error(gradient, 2 * x[0] @ A.T @ A) < 1e-12


def test_probes_tell_seeds_apart_and_depend_on_nothing_else() -> None:
    used = StructuredMatrices(3)
    made(used)
    probe = used.fingerprint_values()
    assert probe.dtype == np.float32
    np.testing.assert_array_equal(probe, StructuredMatrices(3).fingerprint_values())
    assert not np.array_equal(probe, StructuredMatrices(4).fingerprint_values())


def test_nothing_is_saved_and_no_saved_matrix_is_known() -> None:
    matrices = StructuredMatrices(3)
    matrices.reserve(3, 8, 4)
    assert matrices.saved_tensors() == {}
    assert matrices.remade("stream_0", torch.zeros(2, 3)) is None


def test_the_printed_form_names_the_seed() -> None:
    assert repr(StructuredMatrices(5)) == "StructuredMatrices(seed=5)"
