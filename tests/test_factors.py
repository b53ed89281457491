"""Row factors: those of the definition, alone, by row and many at once; and layers in the passes of models."""

import gc
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from dvora import DVoRAAdapter, SharedProjections
from dvora.factors import Factors, delta_weight, factor_rows, factors_of
from dvora.functional import Vectors
from dvora.layer import current_pass, share_inputs, stop_sharing_inputs, thin_outputs
from dvora.matrices.interface import DISTRIBUTIONS
from dvora.weight import AdaptedWeight
from tests.cases import DIRECTIONS, DTYPES, TOLERANCE, fresh_copy, linear, nearly_cancelled, randn, trained_layer
from tests.census import Census
from tests.reference import DenseDVoRA, worst_error

IN, OUT, RANK = 6, 9, 4

directions = pytest.mark.parametrize("direction", DIRECTIONS)
distributions = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def factors(layer: DVoRAAdapter, **options: Any) -> Factors:
    return factors_of(layer.adapted, layer.vectors, layer.base_layer.weight, **options)


@directions
@distributions
@pytest.mark.parametrize("rank", [2, 5])
def test_derivatives_equal_finite_differences(rank: int, distribution: str, direction: str) -> None:
    weight, f64 = randn(4, 3, seed=1, dtype=torch.float64), torch.float64
    weight[1] = 0
    adapted = AdaptedWeight(weight, rank, shared=SharedProjections(3, distribution), direction=direction)
    shapes = [(2, 4), (2, 4), (2, rank)]
    vectors = [randn(*shape, seed=4 + i, dtype=f64).requires_grad_() for i, shape in enumerate(shapes)]

    def outputs(*vectors: Tensor) -> tuple[Tensor, ...]:
        return factors_of(adapted, Vectors(*vectors), strength=0.7)[:2]

    assert torch.autograd.gradcheck(outputs, vectors, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(outputs, vectors)


@dtypes
@distributions
@given(
    groups=st.sampled_from([1, 3]),
    at_once=st.sampled_from([2**7, 2**24]),
    direction=st.sampled_from(DIRECTIONS),
    detach_norm=st.booleans(),
    alpha=st.floats(0.1, 10),
)
def test_adapters_at_once_get_the_rows_that_they_get_one_by_one(
    distribution: str, dtype: torch.dtype, at_once: int, **options: Any
) -> None:
    shared = SharedProjections(3, distribution)
    bases = [randn(out, width, seed=out, dtype=dtype) for out, width in [(9, 6), (5, 7), (9, 6), (6, 8)]]
    # Parameters are read where lambda_d is by groups, others have constants instead.
    bases[2:] = [nn.Parameter(base, requires_grad=False) for base in bases[2:]]
    ranks = zip(bases, (4, 0, 4, 20), strict=True)
    weights = [AdaptedWeight(base, rank, shared=shared, **options) for base, rank in ranks]
    assert [w.reads_weight for w in weights] == [False, False, *[options["groups"] > 1] * 2]
    lengths = [n for w in weights for n in (w.out_features, w.out_features if w.rank else 0, w.lambda_d_size)]
    vectors = (0.5 + randn(3, sum(lengths), seed=1, dtype=dtype).abs()).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dvora.weight._AT_ONCE", at_once)
        together = factor_rows(weights, vectors)
        ours = torch.autograd.grad(together.square().sum(), vectors)[0]
    for vector, row, gradient in zip(vectors, together, ours, strict=True):
        assert torch.equal(factor_rows(weights, vector[None])[0], row)
        leaf, alone = vector.detach().clone().requires_grad_(), []
        parts = iter(leaf.split(lengths))
        for adapted in weights:
            m, b, d = next(parts), next(parts), next(parts)
            alone.append(factors_of(adapted, Vectors(m, b if len(b) else torch.zeros_like(m), d)).row)
        assert worst_error(row, torch.cat(alone).double()) < TOLERANCE[dtype]
        (expected,) = torch.autograd.grad(torch.cat(alone).square().sum(), leaf)
        assert worst_error(gradient, expected.double()) < TOLERANCE[dtype]


def test_many_adapters_with_groups_need_no_more_memory_than_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dvora.weight._AT_ONCE", 2**14)
    base = nn.Parameter(randn(64, 32, seed=1), requires_grad=False)
    for readable in (True, False):
        adapted = AdaptedWeight(base, 4, shared=SharedProjections(3), groups=8, readable=readable)
        vectors = randn(400, 64 + 64 + 32, seed=2).requires_grad_()
        with Census() as census:
            torch.autograd.grad(factor_rows([adapted], vectors).sum(), vectors)
        # Of all rows together, as the result is.
        assert census.largest() <= vectors.nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 7), (5, 2, 3), (5, 0)], ids=str)
@given(bias=st.booleans(), distribution=st.sampled_from(DISTRIBUTIONS))
def test_each_row_of_a_batch_gets_what_it_gets_alone(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool, distribution: str
) -> None:
    base = linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)
    adapted = AdaptedWeight(base.weight, RANK, shared=SharedProjections(3, distribution))
    wide, index = adapted.w.dtype, torch.tensor([2, 0, 2, 1, 2])
    values = (0.3 * randn(3, 2 * OUT + RANK, seed=1, dtype=wide)).requires_grad_()
    x = randn(*shape, IN, seed=8, dtype=dtype).requires_grad_()
    d = randn(*shape, OUT, seed=9, dtype=dtype)

    def outputs(x: Tensor, factors: Factors) -> Tensor:
        return thin_outputs(base(x), x, adapted, factors, base.bias)

    y = outputs(x, Factors.of_rows(values[index], RANK, x.dim()))
    ours = torch.autograd.grad(y, [x, values], d)
    parts = values.split([OUT, OUT, RANK], -1)
    single = [outputs(x[row], Factors(*(part[i] for part in parts))) for row, i in enumerate(index.tolist())]
    theirs = torch.autograd.grad(torch.stack(single), [x, values], d)
    for one, other in zip((y, *ours), (torch.stack(single), *theirs), strict=True):
        assert worst_error(one, other.double()) < max(10 * torch.finfo(one.dtype).eps, 1e-6 if wide != dtype else 0)
    with torch.no_grad():
        assert torch.equal(outputs(x, Factors.of_rows(values[index], RANK, x.dim())), y)


@dtypes
@pytest.mark.parametrize(("tokens", "rank"), [(2, 1), (20, 1), (2, 5)], ids=["thin", "folded", "formed"])
def test_a_row_that_vanishes_altogether_gives_finite_numbers(tokens: int, rank: int, dtype: torch.dtype) -> None:
    layer = nearly_cancelled(trained_layer(3, 4, rank, dtype=dtype), 0.0)
    x = randn(tokens, 3, seed=8, dtype=dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in (x, *layer.vectors))


@directions
def test_the_delta_has_the_precision_of_the_forward(direction: str) -> None:
    layer = trained_layer(IN, OUT, RANK, direction=direction)
    with torch.autocast("cpu", torch.bfloat16):
        delta = delta_weight(layer.adapted, layer.vectors, layer.base_layer.weight)
    dense = DenseDVoRA.of(layer)
    assert worst_error(delta, dense.merged_weight() - dense.weight) < 1e-5


def test_norms_of_vectors_in_half_precision_are_not() -> None:
    dtype = torch.bfloat16
    for rank in (RANK, IN + 1):
        layer, x = trained_layer(IN, OUT, rank), randn(4, IN, seed=0)
        for vector in layer.vectors:
            vector.data = vector.data.to(dtype).float()
        outputs, expected = layer(x), torch.autograd.grad(layer(x).square().sum(), layer.vectors)
        for vector in layer.vectors:
            vector.data = vector.data.to(dtype)
        assert torch.equal(layer(x), outputs)
        for ours, whole in zip(torch.autograd.grad(layer(x).square().sum(), layer.vectors), expected, strict=True):
            assert ours.dtype == dtype
            assert worst_error(ours, whole.double()) < 2 * torch.finfo(dtype).eps


# Factors that an evaluation keeps; what a change makes of them is in `test_changes`.


@torch.no_grad()
def test_factors_are_kept_while_nothing_changes_and_not_beside_a_gradient() -> None:
    layer = trained_layer(IN, OUT, RANK)
    first = factors(layer)
    assert factors(layer) is first
    assert factors(layer, strength=0.5) is not first
    assert factors(layer.double()).scale.dtype == torch.float64
    for vector in layer.vectors:
        vector.grad = torch.zeros_like(vector)
        assert factors(layer) is not factors(layer)
        vector.grad = None
    with torch.inference_mode():
        layer.vectors.magnitude.mul_(2)
        torch.testing.assert_close(factors(layer).gain, 2 * first.gain.double())
        assert factors(layer) is factors(layer)


@pytest.mark.parametrize("size", [OUT, 2**18])
def test_other_vectors_do_not_come_to_have_the_address_of_those_that_were_kept(size: int) -> None:
    layer = trained_layer(2, size, 1).requires_grad_(False)
    magnitude, gain = layer.magnitude.clone(), factors(layer).gain
    for factor in range(1, 9):
        layer.magnitude.data = factor * magnitude
        assert torch.allclose(factors(layer).gain, factor * gain)
        layer.magnitude.data = torch.empty(1)


# Layers in the passes of models.

WIDTH = 6
RANKS = {"thin": (4, RANK), "folded": (40, RANK), "formed": (4, WIDTH + 3)}
"""Tokens and rank for which training is computed that way."""
every_way = pytest.mark.parametrize("way", RANKS)


class Model(nn.Module):
    """Pairs of layers that read the same inputs."""

    def __init__(self, way: str = "thin", pairs: int = 2) -> None:
        super().__init__()
        self.way = way
        self.layers = nn.ModuleList(trained_layer(WIDTH, WIDTH, RANKS[way][1]) for _ in range(2 * pairs))
        with torch.no_grad():
            for index, layer in enumerate(self.layers):
                layer.lambda_d.mul_(1 + index)
        share_inputs(self)

    def forward(self, x: Tensor) -> Tensor:
        for index in range(0, len(self.layers), 2):
            x = torch.tanh(self.layers[index](x) - self.layers[index + 1](x))
        return x

    def inputs(self) -> Tensor:
        return randn(RANKS[self.way][0], WIDTH, seed=8)

    def alone(self) -> nn.Module:
        """The same with new layers that share nothing."""
        other = Model(self.way, 0)
        stop_sharing_inputs(other)
        other.layers.extend(fresh_copy(layer).train(layer.training) for layer in self.layers)
        return other


def step(model: Model, x: Tensor | None = None) -> list[Tensor]:
    """The gradients of a pass, in order."""
    model.zero_grad()
    model(model.inputs() if x is None else x).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert worst_error(one, other.double()) < 1e-5


@every_way
def test_a_model_trains_and_evaluates_as_its_layers_do_alone(way: str) -> None:
    model, alone = Model(way), Model(way).alone()
    for _ in range(2):
        assert_equal(step(model), step(alone))
        with torch.no_grad():
            assert_equal([model(model.inputs())], [alone(model.inputs())])
    model.zero_grad()
    sum(model(factor * model.inputs()).square().sum() for factor in (1, 2)).backward()
    found = [parameter.grad for parameter in model.layers.parameters() if parameter.requires_grad]
    parts = [[g.clone() for g in step(alone, factor * model.inputs())] for factor in (1, 2)]
    assert_equal(found, [sum(each) for each in zip(*parts, strict=True)])


@every_way
def test_a_layer_that_is_not_called_gets_no_gradient_and_a_model_can_be_freed(way: str) -> None:
    model = Model(way)
    step(model)
    model.zero_grad()
    others, model.layers = model.layers[2:], model.layers[:2]
    assert len(step(model)) == 6
    assert all(parameter.grad is None for parameter in others.parameters())
    with torch.no_grad():
        model(model.inputs())
    adapted = [weakref.ref(layer.adapted) for layer in (*model.layers, *others)]
    del model, others
    gc.collect()
    assert [reference() for reference in adapted] == [None] * 4


CHECKPOINTED: dict[str, Callable[[Model], Iterable[nn.Module]]] = {
    "the model": lambda model: [model],
    "every layer": lambda model: model.layers,
    "some layers": lambda model: model.layers[::2],
}


@every_way
@pytest.mark.parametrize("what", CHECKPOINTED)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_train_to_the_same_gradients(use_reentrant: bool, what: str, way: str) -> None:
    model = Model(way)
    for module in CHECKPOINTED[what](model):
        module.forward = partial(checkpoint, module.forward, use_reentrant=use_reentrant)
    for _ in range(2):
        assert_equal(step(model, model.inputs().requires_grad_()), step(Model(way).alone()))


@every_way
def test_a_pass_of_functional_call_has_the_values_that_it_was_given(way: str) -> None:
    model, other = Model(way), Model(way)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for factor in (1.2, 0.8, 1.5):
        values = {name: (factor * model.get_parameter(name).detach()).requires_grad_() for name in names}
        other.load_state_dict(values, strict=False)
        expected = other.alone()
        y = functional_call(model, values, model.inputs())
        assert_equal(torch.autograd.grad(y.square().sum(), [*values.values()]), step(expected))
        with torch.no_grad():
            assert_equal([functional_call(model, values, model.inputs())], [expected(model.inputs())])
    assert_equal(step(model), step(model.alone()))


def test_a_model_within_a_model_has_passes_of_its_own() -> None:
    inner, passes = Model(), []
    outer = nn.Sequential(trained_layer(WIDTH, WIDTH, RANK), inner, trained_layer(WIDTH, WIDTH, RANK))
    share_inputs(outer)
    share_inputs(outer)
    for layer in (outer[0], inner.layers[0], inner.layers[1], outer[2]):
        layer.register_forward_hook(lambda *_: passes.append(current_pass()))
    expected = nn.Sequential(fresh_copy(outer[0]), inner.alone(), fresh_copy(outer[2]))
    torch.testing.assert_close(outer(inner.inputs()), expected(inner.inputs()))
    assert [passes.index(one) for one in passes] == [0, 1, 1, 0]
    assert current_pass() is None
    stop_sharing_inputs(outer)
    outer[2](outer[0](inner.inputs()))
    assert passes[-2:] == [None, None]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_pass_ends_with_an_error_and_those_within_it_that_an_interruption_left_open(
    error: type[BaseException],
) -> None:
    inner, outer = Model(), Model(pairs=1)
    outer.layers.extend([inner, trained_layer(WIDTH, WIDTH, RANK)])
    expected = step(outer)

    def fail(*_: object) -> None:
        raise error

    hook = inner.layers[1].register_forward_hook(fail)
    with pytest.raises(error):
        outer(outer.inputs())
    hook.remove()
    # What a hook of PyTorch's could not end after Ctrl-C, the next pass ends.
    assert_equal(step(outer), expected)
    assert current_pass() is None


@pytest.mark.usefixtures("hasty_threads")
@every_way
def test_threads_may_train_and_evaluate_one_model_at_once(way: str) -> None:
    model = Model(way)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected, evaluated = step(model.alone()), model.alone().eval()(model.inputs()).detach()

    def run(index: int) -> None:
        for _ in range(5):
            if index % 2:
                assert_equal(torch.autograd.grad(model(model.inputs()).square().sum(), trained), expected)
            else:
                with torch.no_grad():
                    assert_equal([model(model.inputs())], [evaluated])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(run, range(6)))
