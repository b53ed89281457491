"""What the layer does on CUDA, run by the interpreter on CPU tensors, equals what it does on the CPU."""

import pytest
import torch
from torch import Tensor

from dvora import SharedProjections
from dvora.matrices import interface
from dvora.matrices.interface import Matrices
from dvora.matrices.kronecker import apply, apply_transpose
from dvora.method.packed_factors import PackedFactors
from dvora.ops.triton import available
from dvora.weight.factors import PassFactors
from dvora.weight.linear import ThinProducts, Update
from tests.cases import randn
from tests.compiled.interpreter import Interpreter
from tests.reference import worst_error

TOKENS, IN, OUT = 5, 24, 20
BOTH = pytest.mark.parametrize("distribution", ["kaiming_uniform", "structured"])


def inputs(rank: int, bias: bool) -> dict[str, Tensor | None]:
    return {
        "base_output": randn(TOKENS, OUT, seed=0),
        "z": randn(TOKENS, rank, seed=1),
        "lambda_d": randn(rank, seed=2),
        "trained": torch.stack([0.1 * randn(OUT, seed=3), randn(OUT, seed=4)]),
        "bias": randn(OUT, seed=5) if bias else None,
    }


def packed(lambda_d: Tensor, trained: Tensor) -> PackedFactors:
    gain_minus_one = trained.detach()[0]
    return PackedFactors(trained, torch.stack([1 + gain_minus_one, -gain_minus_one]), lambda_d)


def combined(given: dict[str, Tensor | None], matrices: Matrices) -> Tensor:
    """What a layer computes from its base's outputs and z."""
    factors = PassFactors(packed(given["lambda_d"], given["trained"]))
    update = Update(adapted=None, vectors=None, factors=factors, matrices=matrices)
    return ThinProducts.apply(*given.values(), update)


@BOTH
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_outputs_and_gradients_equal_those_of_the_cpu(distribution: str, bias: bool, interpreter: Interpreter) -> None:
    kind, given = SharedProjections(3, distribution).impl, inputs(6, bias)
    leaves = {name: None if t is None else t.clone().requires_grad_() for name, t in given.items()}
    y = combined(leaves, kind)
    grad_output = randn(TOKENS, OUT, seed=6)
    y.backward(grad_output)
    rest = given["z"], packed(given["lambda_d"], given["trained"]), kind, given["bias"]
    ours = interpreter("weight.fused", "outputs", given["base_output"], *rest)
    assert worst_error(ours, y.double()) < 1e-5
    gradients = interpreter("weight.fused", "gradients", grad_output, given["base_output"], *rest)
    for name, gradient in zip(["base_output", "z", "lambda_d", "trained"], gradients, strict=True):
        assert gradient.shape == leaves[name].shape, name
        assert worst_error(gradient, leaves[name].grad.double()) < 1e-5, name


@pytest.mark.parametrize("rank", [6, 7, 30], ids=["whole", "cut", "stacked"])
def test_structured_products_equal_those_of_the_cpu(rank: int, interpreter: Interpreter) -> None:
    stack = SharedProjections(3, "structured").impl._stack("A", rank, IN, torch.float32)
    x, z = randn(2, TOKENS, IN, seed=0), randn(2, TOKENS, rank, seed=1)
    found = interpreter("matrices.kronecker", "_apply_transpose_in_triton", x, stack)
    assert worst_error(found, apply_transpose(x, stack).double()) < 1e-5
    assert worst_error(interpreter("matrices.kronecker", "apply_in_triton", z, stack), apply(z, stack).double()) < 1e-5


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not SharedProjections().use_triton
    with pytest.raises(TypeError, match="use_triton must be True or False, got 1"):
        SharedProjections(use_triton=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="use_triton=True needs a CUDA device"):
        SharedProjections(use_triton=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8 - device, 5 * device))
    with pytest.raises(ValueError, match=r"needs compute capability 8\.0 or newer, and cuda:1 has 7\.5"):
        SharedProjections(use_triton=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert SharedProjections(use_triton=True).impl.use_triton
    monkeypatch.setattr(available, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package triton, which is not installed"):
        SharedProjections(use_triton=True)


@BOTH
def test_a_processor_does_not_ask_for_triton(distribution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "check_triton", lambda: None)
    with_triton, without = SharedProjections(3, distribution, use_triton=True), SharedProjections(3, distribution)
    given = inputs(6, bias=True)
    found = [combined(given, shared.impl) for shared in (with_triton, without)]
    assert torch.equal(*found)
    x = randn(2, TOKENS, IN, seed=0)
    assert torch.equal(with_triton.impl.project(x, 6), without.impl.project(x, 6))
