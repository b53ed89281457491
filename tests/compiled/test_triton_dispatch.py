"""What the layer does on CUDA, run by the interpreter on CPU tensors, equals what it does on the CPU."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dvora import SharedProjections
from dvora.matrices import interface
from dvora.matrices.kronecker import apply, apply_transpose
from dvora.method.gain import PackedFactors
from dvora.ops.triton import available
from dvora.weight.adapted_weight import AdaptedWeight
from dvora.weight.factors import PassFactors
from dvora.weight.linear import Update, _ThinProducts
from tests.cases import linear, randn
from tests.compiled.interpreter import Interpreter
from tests.reference import worst_error

TOKENS, IN, OUT = 5, 24, 20
BOTH = pytest.mark.parametrize("distribution", ["kaiming_uniform", "structured"])


class Given(NamedTuple):
    """The operands of a layer's output, which have gradients."""

    base_output: Tensor
    z: Tensor
    lambda_d: Tensor
    trained: Tensor
    bias: Tensor | None

    def update(self, shared: SharedProjections) -> Update:
        """The adapter that has these factors."""
        adapted = AdaptedWeight(linear(IN, OUT).weight.detach(), len(self.lambda_d), shared=shared)
        gain = 1 + self.trained[0].detach()
        constant = torch.stack([gain, self.trained[1].detach() / gain])
        packed = PackedFactors(self.trained, constant, self.lambda_d)
        return Update(adapted, None, PassFactors(packed), self.bias)

    def require_gradients(self) -> "Given":
        """Leaves with the same values."""
        return Given(*(None if t is None else t.clone().requires_grad_() for t in self))


def inputs(rank: int, bias: bool) -> Given:
    return Given(
        randn(2, TOKENS, OUT, seed=0),
        randn(2, TOKENS, rank, seed=1),
        randn(rank, seed=2),
        torch.stack([0.1 * randn(OUT, seed=3), randn(OUT, seed=4)]),
        randn(OUT, seed=5) if bias else None,
    )


def output(given: Given, shared: SharedProjections) -> Tensor:
    return _ThinProducts.apply(*given, given.update(shared))


@BOTH
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_outputs_and_gradients_equal_those_of_the_cpu(distribution: str, bias: bool, interpreter: Interpreter) -> None:
    shared, given = SharedProjections(3, distribution), inputs(6, bias)
    leaves = given.require_gradients()
    y = output(leaves, shared)
    grad_output = randn(2, TOKENS, OUT, seed=6)
    y.backward(grad_output)
    rows, z, grad_rows = given.base_output.view(-1, OUT), given.z.view(-1, 6), grad_output.view(-1, OUT)
    update = given.update(shared)
    ours = interpreter("weight.linear", "_forward_in_triton", update, rows, z)
    assert worst_error(ours.view(y.shape), y.double()) < 1e-5
    gradients = interpreter("weight.linear", "_backward_in_triton", update, grad_rows, rows, z)
    # That of the bias is computed for both by the same code.
    for name, gradient in zip(Given._fields[:4], gradients, strict=True):
        expected = getattr(leaves, name).grad
        assert gradient.numel() == expected.numel(), name
        assert worst_error(gradient.view(expected.shape), expected.double()) < 1e-5, name


@pytest.mark.parametrize("rank", [6, 7, 30], ids=["whole", "cut", "stacked"])
def test_structured_products_equal_those_of_the_cpu(rank: int, interpreter: Interpreter) -> None:
    stack = SharedProjections(3, "structured").impl._stack("A", rank, IN, torch.float32)
    x, z = randn(2, TOKENS, IN, seed=0), randn(2, TOKENS, rank, seed=1)
    found = interpreter("matrices.kronecker", "_apply_transpose_in_triton", x, stack)
    assert worst_error(found, apply_transpose(x, stack).double()) < 1e-5
    assert worst_error(interpreter("matrices.kronecker", "_apply_in_triton", z, stack), apply(z, stack).double()) < 1e-5


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
    found = [output(given, shared) for shared in (with_triton, without)]
    assert torch.equal(*found)
    x = randn(2, TOKENS, IN, seed=0)
    assert torch.equal(with_triton.impl.project(x, 6), without.impl.project(x, 6))
