"""What the layer does on CUDA, run by the interpreter on CPU tensors, equals what it does on the CPU."""

import pytest
import torch
from torch import Tensor

from dvora import SharedProjections
from dvora.matrices.kronecker import apply, apply_transpose
from dvora.method.combine import combine
from tests.cases import randn
from tests.compiled.interpreter import Interpreter
from tests.reference import worst_error

TOKENS, IN, OUT = 5, 24, 20
BOTH = pytest.mark.parametrize("distribution", ["kaiming_uniform", "structured"])


def inputs(rank: int, bias: bool) -> dict[str, Tensor | None]:
    return {
        "base_output": randn(2, TOKENS, OUT, seed=0),
        "z": randn(2, TOKENS, rank, seed=1),
        "lambda_d": randn(rank, seed=2),
        "gain_minus_one": 0.1 * randn(OUT, seed=3),
        "scale": randn(OUT, seed=4),
        "bias": randn(OUT, seed=5) if bias else None,
    }


@BOTH
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_outputs_and_gradients_equal_those_of_the_cpu(distribution: str, bias: bool, interpreter: Interpreter) -> None:
    kind, given = SharedProjections(3, distribution).impl, inputs(6, bias)
    leaves = {name: None if t is None else t.clone().requires_grad_() for name, t in given.items()}
    y = combine(*leaves.values(), kind)
    delta = randn(2, TOKENS, OUT, seed=6)
    y.backward(delta)
    scaled_z = given["z"] * given["lambda_d"]
    rest = (given["gain_minus_one"], given["scale"], given["bias"], kind)
    ours = interpreter("kernels.combine", "_forward_in_triton", given["base_output"], scaled_z, *rest)
    assert worst_error(ours, y.double()) < 1e-5
    gradients = interpreter("kernels.combine", "_backward_in_triton", delta, *given.values(), kind)
    for name, gradient in zip(leaves, gradients, strict=True):
        if leaves[name] is not None:
            assert gradient.shape == leaves[name].shape, name
            assert worst_error(gradient, leaves[name].grad.double()) < 1e-5, name


@pytest.mark.parametrize("rank", [6, 7, 30], ids=["whole", "cut", "stacked"])
def test_structured_products_equal_those_of_the_cpu(rank: int, interpreter: Interpreter) -> None:
    stack = SharedProjections(3, "structured").impl._stack("A", rank, IN, torch.float32)
    x, z = randn(2, TOKENS, IN, seed=0), randn(2, TOKENS, rank, seed=1)
    assert (
        worst_error(
            interpreter("kronecker", "_apply_transpose_in_triton", x, stack), apply_transpose(x, stack).double()
        )
        < 1e-5
    )
    assert worst_error(interpreter("kronecker", "_apply_in_triton", z, stack), apply(z, stack).double()) < 1e-5
