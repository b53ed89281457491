"""Gradients of row factors of several layers: some unused or frozen, several passes, writes in between, autocast."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests.cases import randn
from tests.method.frozen_weight import (
    NAMES,
    F,
    FrozenNorm,
    Layers,
    PackedFactors,
    Problem,
    c_kept_or_not,
    every_distribution,
    row_factors,
)
from tests.reference import worst_error

IN, OUT, RANK = 6, 9, 4
GRAPHS = {"plain": {"retain_graph": True}, "create_graph": {"create_graph": True}}
with_and_without_graph = pytest.mark.parametrize("graph", GRAPHS)


def used_by(problem: Problem, packed: PackedFactors, use: str) -> Tensor | int:
    """A loss of one layer's factors, or nothing."""
    if use == "factors":
        return packed.trained[0] @ problem.loss_gradient + packed.trained[1] @ problem.scale_gradient
    if use == "lambda_d":
        return packed.lambda_d @ problem.lambda_gradient
    return problem.loss_of(packed) if use == "both" else 0


@c_kept_or_not
@with_and_without_graph
@pytest.mark.parametrize(
    "uses",
    [
        ("both", "", ""),
        ("", "both", "factors"),
        ("factors", "lambda_d", ""),
        ("", "lambda_d", ""),
        ("lambda_d", "factors", "both"),
    ],
    ids=str,
)
def test_a_layer_that_is_not_used_gets_no_gradient(uses: tuple[str, ...], graph: str, keep_C: bool) -> None:
    layers = Layers(3, IN, OUT, RANK).trained()
    packed = layers.stacked(layers.norms(keep_C)).packed
    loss = sum(used_by(p, of_layer, use) for p, of_layer, use in zip(layers.problems, packed, uses, strict=True))
    found = torch.autograd.grad(loss, layers.vectors, allow_unused=True, **GRAPHS[graph])
    for p, use, gradients in zip(layers.problems, uses, layers.by_layer(found), strict=True):
        if not use:
            assert list(gradients.values()) == [None] * 3
            continue
        if use == "lambda_d":
            assert torch.equal(gradients["lambda_d"], p.lambda_gradient)
            assert not any(gradients[name] is not None and gradients[name].any() for name in NAMES[:2])
            continue
        p.lambda_gradient = p.lambda_gradient if use == "both" else None
        for name, expected in p.dense_gradients().items():
            assert worst_error(gradients[name], expected) < 1e-12, name


@with_and_without_graph
@pytest.mark.parametrize("detach_norm", [False, True], ids=["through the norm", "detach_norm"])
def test_every_layer_may_have_other_frozen_vectors(detach_norm: bool, graph: str) -> None:
    trained = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
    layers = Layers(len(trained), IN, OUT, RANK, detach_norm=detach_norm)
    for p, wanted in zip(layers.problems, trained, strict=True):
        for vector, is_trained in zip(p.vectors, wanted, strict=True):
            vector.requires_grad_(is_trained)
    assert_gradients_of_the_trained_are_dense(layers, graph)


@with_and_without_graph
def test_a_whole_layer_may_be_frozen(graph: str) -> None:
    layers = Layers(3, IN, OUT, RANK)
    for index in (0, 2):
        for vector in layers.problems[index].vectors:
            vector.requires_grad_()
    assert_gradients_of_the_trained_are_dense(layers, graph)


def assert_gradients_of_the_trained_are_dense(layers: Layers, graph: str) -> None:
    inputs = [vector for vector in layers.vectors if vector.requires_grad]
    found = iter(torch.autograd.grad(layers.loss(), inputs, **GRAPHS[graph]))
    for p in layers.problems:
        expected = p.dense_gradients()
        for name, vector in zip(NAMES, p.vectors, strict=True):
            if vector.requires_grad:
                assert worst_error(next(found), expected[name]) < 1e-12, name


@c_kept_or_not
@every_distribution
def test_any_number_of_backward_passes_may_reach_the_factors(distribution: str, keep_C: bool) -> None:
    layers = Layers(3, IN, OUT, RANK, distribution=distribution).trained()
    stack = layers.stacked(layers.norms(keep_C))
    assert not stack.measured
    for _ in range(3):
        # No graph is retained: what the factors need is kept with them.
        sum(p.loss_of(of_layer) for p, of_layer in zip(layers.problems, stack.packed, strict=True)).backward()
    layers.problems[1].loss_of(stack.packed[1]).backward()
    for p, times in zip(layers.problems, (3, 4, 3), strict=True):
        for name, expected in p.dense_gradients().items():
            assert worst_error(getattr(p.vectors, name).grad, times * expected) < 1e-12, name


def test_measured_rows_have_a_graph_for_one_backward_pass() -> None:
    layers = Layers(2, 16, 6, 4)
    layers.problems[0].cancel(1e-2, [1])
    stack = layers.trained().stacked()
    assert stack.measured
    loss = [p.loss_of(of_layer) for p, of_layer in zip(layers.problems, stack.packed, strict=True)]
    sum(loss).backward()
    with pytest.raises(RuntimeError, match="second time"):
        layers.problems[0].loss_of(stack.packed[0]).backward()


def test_the_vectors_of_a_stack_are_those_it_was_made_from() -> None:
    layers = Layers(3, IN, OUT, RANK).trained()
    known = layers.stacked().vectors
    for index, p in enumerate(layers.problems):
        for of_all, vector in zip(known, p.vectors, strict=True):
            assert torch.equal(of_all[index], vector)
    with torch.no_grad():
        layers.problems[1].vectors.magnitude.mul_(2)
    assert not torch.equal(known.magnitude[1], layers.problems[1].vectors.magnitude)
    assert not any(of_all.requires_grad for of_all in known)


def doubled(layers: Layers) -> None:
    with torch.no_grad():
        layers.problems[1].weight.mul_(2)


FACTORS = (1.0, -2.0, 0.5)


def gradients_of(loss: Tensor, vectors: list[Tensor], graph: str) -> tuple[Tensor, ...]:
    """Those of all vectors; in a batch, of the loss times `FACTORS`."""
    if graph == "batched":
        batch = torch.tensor(FACTORS, dtype=loss.dtype)
        return torch.autograd.grad(loss, vectors, batch, is_grads_batched=True, retain_graph=True)
    return torch.autograd.grad(loss, vectors, **GRAPHS[graph])


@every_distribution
@pytest.mark.parametrize("graph", [*GRAPHS, "batched"])
def test_a_weight_that_is_read_again_must_not_be_written_to_before_the_backward_pass(
    graph: str, distribution: str
) -> None:
    layers = Layers(3, IN, OUT, RANK, distribution=distribution).trained()
    loss = layers.loss(layers.norms(keep_C=False))
    doubled(layers)
    with pytest.raises(RuntimeError, match="a base weight was written to between the forward and the backward pass"):
        gradients_of(loss, layers.vectors, graph)


def test_a_weight_whose_constants_are_kept_may_be_written_to_before_the_backward_pass() -> None:
    layers = Layers(3, IN, OUT, RANK).trained()
    expected = layers.gradients()
    loss = layers.loss()
    doubled(layers)
    found = layers.by_layer(torch.autograd.grad(loss, layers.vectors))
    assert all(torch.equal(found[i][name], expected[i][name]) for i in range(3) for name in NAMES)


def test_gradients_are_those_at_the_values_of_the_forward_pass() -> None:
    layers = Layers(2, IN, OUT, RANK).trained()
    expected = [p.dense_gradients() for p in layers.problems]
    loss = layers.loss()
    with torch.no_grad():
        layers.problems[0].vectors.magnitude.mul_(2)
    found = gradients_of(loss, layers.vectors, "plain")
    for gradients, of_layer in zip(layers.by_layer(found), expected, strict=True):
        assert all(worst_error(gradients[name], of_layer[name]) < 1e-12 for name in NAMES)


@pytest.mark.parametrize("graph", ["create_graph", "batched"])
def test_what_computes_from_the_vectors_again_refuses_those_that_were_written_to(graph: str) -> None:
    layers = Layers(2, IN, OUT, RANK).trained()
    loss = layers.loss()
    with torch.no_grad():
        layers.problems[0].vectors.magnitude.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified|written to"):
        gradients_of(loss, layers.vectors, graph)


@c_kept_or_not
@every_distribution
@pytest.mark.parametrize("padding_column", [None, 2])
def test_first_and_second_derivatives_are_those_of_the_values(
    padding_column: int | None, distribution: str, keep_C: bool
) -> None:
    layers = Layers(2, 3, 4, 2, distribution=distribution, padding_column=padding_column).trained()
    norms, settings = layers.norms(keep_C), layers.problems[0].settings

    def factors(*vectors: Tensor) -> tuple[Tensor, ...]:
        stack = row_factors([F.Vectors(*vectors[:3]), F.Vectors(*vectors[3:])], norms, settings)
        return tuple(tensor for packed in stack.packed for tensor in (packed.trained, packed.lambda_d))

    assert gradcheck(factors, layers.vectors, check_batched_grad=True, check_undefined_grad=False)
    assert gradgradcheck(factors, layers.vectors)


class Cut(torch.autograd.Function):
    """The sum, whose gradient is undefined: as functions say that theirs is zero."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.sum()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> None:
        return None


@pytest.mark.parametrize("count", [1, 3], ids=lambda count: f"{count} layers")
def test_gradients_that_are_undefined_are_none(count: int) -> None:
    layers = Layers(count, IN, OUT, RANK).trained()
    loss = sum(Cut.apply(tensor) for of_layer in layers.stacked().packed for tensor in (of_layer[0], of_layer[2]))
    assert torch.autograd.grad(loss, layers.vectors, allow_unused=True) == (None,) * (3 * count)


@pytest.mark.parametrize("graph", [*GRAPHS, "batched"])
def test_vectors_may_depend_on_one_another(graph: str) -> None:
    p = Problem(IN, OUT, RANK)
    leaves = [vector.clone().requires_grad_() for vector in p.vectors]

    def related(magnitude: Tensor, lambda_b: Tensor, lambda_d: Tensor) -> tuple[Tensor, ...]:
        return magnitude + lambda_b**2 + lambda_d.sum(), lambda_b * lambda_d.sum(), lambda_d

    dense = p.dense()
    for name, vector in zip(NAMES, related(*leaves), strict=True):
        delattr(dense, name)
        setattr(dense, name, vector)
    expected = torch.autograd.grad(dense.gain() @ p.loss_gradient + dense.scale() @ p.scale_gradient, leaves)
    packed = row_factors([F.Vectors(*related(*leaves))], [p.norm()], p.settings).packed[0]
    found = gradients_of(p.loss_of(packed), leaves, graph)
    for ours, theirs in zip(found, expected, strict=True):
        assert worst_error(ours[0] if graph == "batched" else ours, theirs) < 1e-12


@c_kept_or_not
@every_distribution
@pytest.mark.parametrize("rows", [[], [1, 4]], ids=["plain", "with nearly cancelled rows"])
def test_gradients_in_batches_are_those_one_by_one(rows: list[int], distribution: str, keep_C: bool) -> None:
    layers = Layers(3, 16, OUT, RANK, distribution=distribution)
    layers.problems[2].cancel(1e-2, rows)
    layers.problems[0].weight[2] = 0
    layers.trained()
    norms = layers.norms(keep_C)
    found = gradients_of(layers.loss(norms), layers.vectors, "batched")
    expected = torch.autograd.grad(layers.loss(norms), layers.vectors)
    for of_batch, gradient in zip(found, expected, strict=True):
        for value, factor in zip(of_batch, FACTORS, strict=True):
            assert worst_error(value, factor * gradient) < 1e-11


@pytest.mark.parametrize("detach_norm", [False, True], ids=["through the norm", "detach_norm"])
@pytest.mark.parametrize("rows", [[], [1, 4]], ids=["plain", "with nearly cancelled rows"])
def test_second_derivatives_equal_the_dense_method(rows: list[int], detach_norm: bool) -> None:
    layers = Layers(3, IN, OUT, RANK, detach_norm=detach_norm)
    layers.problems[1].cancel(1e-1, rows)
    layers.trained()
    first = torch.autograd.grad(layers.loss().square(), layers.vectors, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), layers.vectors)
    references = [p.dense() for p in layers.problems]
    leaves = [reference.get_parameter(name) for reference in references for name in NAMES]
    # g - 1 in the place of g.
    loss = sum(
        (r.gain() - 1) @ p.loss_gradient + r.scale() @ p.scale_gradient + r.lambda_d @ p.lambda_gradient
        for r, p in zip(references, layers.problems, strict=True)
    )
    first = torch.autograd.grad(loss.square(), leaves, create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    for ours, theirs in zip(second, expected, strict=True):
        assert worst_error(ours, theirs) < 1e-9


def test_the_gradients_of_a_plain_backward_pass_carry_no_graph() -> None:
    layers = Layers(3, IN, OUT, RANK)
    assert not any(gradient.requires_grad for of_layer in layers.gradients() for gradient in of_layer.values())


def values_and_gradients(layers: Layers, norms: list[FrozenNorm]) -> list[Tensor]:
    packed = layers.stacked(norms).packed
    loss = sum(p.loss_of(of_layer) for p, of_layer in zip(layers.problems, packed, strict=True))
    gradients = torch.autograd.grad(loss.double(), layers.vectors)
    return [*(tensor for of_layer in packed for tensor in of_layer), *gradients]


@c_kept_or_not
@every_distribution
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_bit(dtype: torch.dtype, distribution: str, keep_C: bool) -> None:
    layers = Layers(3, 16, OUT, RANK, torch.float32, distribution)
    layers.problems[1].cancel(0.1, [2])
    layers.trained()
    norms = layers.norms(keep_C)
    packed = layers.stacked(norms).packed
    d_trained = [torch.stack([p.loss_gradient, p.scale_gradient]) for p in layers.problems]
    outputs = [of_layer.trained for of_layer in packed]
    expected = torch.autograd.grad(outputs, layers.vectors, d_trained)
    with torch.autocast("cpu", dtype):
        under = layers.stacked(norms).packed
        found = torch.autograd.grad([of_layer.trained for of_layer in under], layers.vectors, d_trained)
    for ours, theirs in zip(under, packed, strict=True):
        assert all(torch.equal(value, reference) for value, reference in zip(ours, theirs, strict=True))
    assert all(torch.equal(value, reference) for value, reference in zip(found, expected, strict=True))


@c_kept_or_not
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_values_are_the_same_bits(context: type, keep_C: bool) -> None:
    layers = Layers(3, 16, OUT, RANK)
    layers.problems[1].cancel(1e-2, [2])
    layers.problems[2].weight[0] = 0
    norms = layers.trained().norms(keep_C)
    expected = layers.stacked(norms).packed
    with context():
        values = layers.stacked(norms).packed
    for ours, theirs in zip(values, expected, strict=True):
        assert all(torch.equal(value, reference) for value, reference in zip(ours, theirs, strict=True))
        assert not any(value.requires_grad for value in ours)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 2.0])
def test_weakened_factors_are_those_of_the_weight_part_of_the_way(strength: float) -> None:
    p = Problem(IN, OUT, RANK)
    p.weight[2] = 0
    packed, reference = p.packed(), p.dense()
    weaker, s = packed.weakened(torch.tensor(strength, dtype=torch.float64)), strength
    assert worst_error(weaker.rows.gain, 1 + s * (reference.gain() - 1)) < 1e-12
    assert worst_error(weaker.rows.gain_minus_one, s * (reference.gain() - 1)) < 1e-12
    assert worst_error(weaker.rows.scale, s * reference.scale()) < 1e-12
    if s == 1:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(weaker, packed, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_packed_factors_hold_what_separate_ones_do(dtype: torch.dtype) -> None:
    factors = F.RowFactors(*(randn(OUT, seed=seed, dtype=dtype).requires_grad_() for seed in range(3)))
    packed = PackedFactors.of(factors, randn(RANK, seed=4, dtype=dtype))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(packed.rows, factors, strict=True))
    packed.rows.gain_minus_one.sum().backward()
    assert factors.gain_minus_one.grad is not None
    assert factors.gain.grad is None
