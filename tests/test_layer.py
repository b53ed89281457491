"""The forward of a layer, thin, folded and formed, against the dense method: outputs, gradients, what is kept."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call

from dvora import DVoRAAdapter, SharedProjections
from dvora import layer as forward
from dvora.functional import Vectors
from dvora.layer import adapted_linear, computation
from dvora.weight import AdaptedWeight
from tests.cases import DIRECTIONS, DTYPES, TOLERANCE, linear, randn, trained_layer
from tests.census import Census
from tests.reference import DenseDVoRA, worst_error

IN, OUT, RANK = 12, 10, 4
WAYS = {"thin": (2, RANK), "folded": (80, RANK), "folded, above the width": (80, IN + 4)}
"""Tokens and rank for which training is computed that way."""
ROUNDING = {**TOLERANCE, torch.bfloat16: 4e-2, torch.float16: 5e-3}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.T.contiguous().T,
    "strided": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one token repeated": lambda x: x[0].expand(x.shape),
    "a batch": lambda x: x[None],
}

every_way = pytest.mark.parametrize("way", WAYS)
directions = pytest.mark.parametrize("direction", DIRECTIONS)
options = st.fixed_dictionaries(
    {
        "direction": st.sampled_from(DIRECTIONS),
        "detach_norm": st.booleans(),
        "alpha": st.floats(0.5, 9),
        "lambda_d_groups": st.sampled_from([1, 4, 5]),
        "shared": st.just(SharedProjections(3)),
    }
)


def way_of(y: Tensor) -> str | None:
    """How outputs were computed, by the last steps of their graph; None: by PyTorch's operations alone."""
    node = y.grad_fn
    for _ in range(4):
        name = type(node).__name__
        if name == "_ThinBackward":
            return "thin"
        if name == "_FoldedBackward":
            return "folded"
        node = node.next_functions[0][0] if node is not None and node.next_functions else None
    return None


def of(way: str) -> str:
    return way.partition(",")[0]


def layer_for(way: str, **settings: Any) -> DVoRAAdapter:
    return trained_layer(IN, OUT, WAYS[way][1], **settings)


def inputs(way: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(WAYS[way][0], IN, seed=8, dtype=dtype)


def output_gradient(way: str) -> Tensor:
    return randn(WAYS[way][0], OUT, seed=9)


def gradients(layer: DVoRAAdapter, y: Tensor, x: Tensor, d: Tensor) -> dict[str, Tensor]:
    """Those of the inputs and of everything trained, by the reference's names."""
    trained = {n.removeprefix("base_layer."): p for n, p in layer.named_parameters() if p.requires_grad}
    leaves = {"x": x, **trained} if x.requires_grad else trained
    return dict(zip(leaves, torch.autograd.grad(y, [*leaves.values()], d), strict=True))


def weakened(layer: DVoRAAdapter, x: Tensor, strength: float, vectors: Vectors | None = None) -> Tensor:
    base = layer.base_layer
    return adapted_linear(base, x, base.weight, layer.adapted, vectors or layer.vectors, strength)


def assert_as_the_dense_method(layer: DVoRAAdapter, x: Tensor, tolerance: float, strength: float = 1.0) -> str | None:
    d = randn(*x.shape[:-1], layer.base_layer.out_features, seed=9, dtype=x.dtype)
    y = layer(x) if strength == 1 else weakened(layer, x, strength)
    dense, wide = DenseDVoRA.of(layer), x.detach().double().requires_grad_()
    base = nn.functional.linear(wide, dense.weight, dense.bias)
    reference, leaves = base + strength * (dense(wide) - base), {"x": wide, **dict(dense.named_parameters())}
    expected = dict(zip(leaves, torch.autograd.grad(reference, [*leaves.values()], d.double()), strict=True))
    way = way_of(y)
    assert y.dtype == x.dtype
    assert worst_error(y, reference) < tolerance
    for name, gradient in gradients(layer, y, x, d).items():
        assert worst_error(gradient, expected[name]) < 5 * tolerance, name
    with torch.no_grad():
        assert worst_error(layer(x) if strength == 1 else weakened(layer, x, strength), reference) < tolerance
    return way


@every_way
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    settings=options,
    bias=st.booleans(),
    strength=st.sampled_from([1.0, 0.3, -1.0, 0.0]),
    trained=st.sampled_from(["x", "nothing", "weight", "bias and x"]),
    zero_rows=st.sampled_from([[], [0, 3], [*range(OUT)]]),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_outputs_and_gradients_equal_the_dense_method(
    way: str, dtype: torch.dtype, settings: dict[str, Any], bias: bool, trained: str, zero_rows: list, **of_pass: Any
) -> None:
    layer = layer_for(way, dtype=dtype, bias=bias, freeze_base_layer=False, **settings)
    with torch.no_grad():
        layer.base_layer.weight[zero_rows] = 0
    for name, parameter in layer.base_layer.named_parameters():
        parameter.requires_grad_(name in trained)
    x = LAYOUTS[of_pass["layout"]](inputs(way, dtype)).requires_grad_("x" in trained)
    done = assert_as_the_dense_method(layer, x, 4 * ROUNDING[dtype], of_pass["strength"])
    assert done == (of(way) if dtype.itemsize >= 4 and trained != "weight" else "thin")


@given(
    sizes=st.tuples(st.integers(2, 20), st.integers(1, 20), st.integers(1, 30)),
    tokens=st.integers(1, 40),
    settings=options,
)
def test_any_sizes_equal_the_dense_method(sizes: tuple[int, int, int], tokens: int, settings: dict[str, Any]) -> None:
    settings = {**settings, "lambda_d_groups": min(settings["lambda_d_groups"], sizes[0])}
    layer = trained_layer(*sizes, dtype=torch.float64, **settings)
    done = assert_as_the_dense_method(layer, randn(tokens, sizes[0], seed=8, dtype=torch.float64), 1e-9)
    assert done == computation(tokens, layer.adapted, True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rank", [RANK, IN + 4])
@given(settings=options, strength=st.sampled_from([1.0, 0.3]))
def test_every_computation_gives_the_same(
    rank: int, dtype: torch.dtype, settings: dict[str, Any], strength: float
) -> None:
    layer, results = trained_layer(IN, OUT, rank, dtype=dtype, **settings), []
    with torch.no_grad():
        layer.base_layer.weight[2] = 0
    for way in ("thin", "folded"):
        x = randn(9, IN, seed=8, dtype=dtype).requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forward, "computation", lambda *_, way=way: way)
            y = weakened(layer, x, strength)
            with torch.no_grad():
                evaluated = weakened(layer, x, strength)
        assert way_of(y) == way
        results.append([y, evaluated, *gradients(layer, y, x, randn(9, OUT, seed=9, dtype=dtype)).values()])
    for thin, folded in zip(*results, strict=True):
        assert worst_error(folded, thin.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("way", ["thin", "folded", None])
@pytest.mark.parametrize("rank", [RANK, IN, IN + 4])
@given(
    settings=options,
    dtype=st.sampled_from([*TOLERANCE, torch.bfloat16]),
    autocast=st.booleans(),
    shape=st.sampled_from([(0, IN), (0, 3, IN), (3, 0, IN), (2, 0, 3, IN)]),
)
def test_no_tokens_have_outputs_and_gradients_as_in_a_linear_layer(
    way: str | None, rank: int, settings: dict[str, Any], dtype: torch.dtype, autocast: bool, shape: tuple[int, ...]
) -> None:
    layer = trained_layer(IN, OUT, rank, dtype=dtype, **settings)
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if way is not None:
            patch.setattr(forward, "computation", lambda *_: way)
        y, expected = layer(x), layer.base_layer(x)
        with torch.no_grad():
            evaluated = layer.eval()(x)
    for outputs in (y, evaluated):
        assert (outputs.shape, outputs.dtype) == (expected.shape, expected.dtype)
    found = gradients(layer, y, x, torch.ones_like(y))
    assert found.pop("x").shape == shape
    assert len(found) == 3
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found.values())


@every_way
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, None], ids=str)
@given(settings=options, bias=st.booleans())
def test_a_new_layer_is_its_base_bit_for_bit(
    way: str, dtype: torch.dtype | None, settings: dict[str, Any], bias: bool
) -> None:
    base = linear(IN, OUT, bias=bias, dtype=dtype or torch.float32)
    layer = DVoRAAdapter(base, WAYS[way][1], **settings)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        for x in (inputs(way, base.weight.dtype), randn(80, IN, seed=8, dtype=base.weight.dtype)):
            for gradients_are_on in (True, False):
                with torch.set_grad_enabled(gradients_are_on):
                    assert torch.equal(layer(x), base(x))


@every_way
@pytest.mark.parametrize("groups", [1, 4])
def test_every_call_gives_the_same_bits(groups: int, way: str) -> None:
    layer = layer_for(way, shared=SharedProjections(3), lambda_d_groups=groups)
    x, d = inputs(way), output_gradient(way)
    first, again = ([layer(x), *gradients(layer, layer(x), x, d).values()] for _ in range(2))
    assert all(map(torch.equal, first, again))
    with torch.no_grad():
        evaluated = layer(x)
        assert torch.equal(layer.eval()(x), evaluated)
    with torch.inference_mode():
        assert torch.equal(layer(x), evaluated)
    if way == "thin":
        assert torch.equal(first[0], evaluated)


# Half precision.


@every_way
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_only_products_of_tokens_are_in_half_precision(half: torch.dtype, groups: int, way: str) -> None:
    layer, d = layer_for(way, lambda_d_groups=groups), output_gradient(way)
    dense = DenseDVoRA.of(layer)
    expected, reference, found = dense.gradients(inputs(way), d), dense(inputs(way)), []
    for within in (True, False):
        x = inputs(way).requires_grad_()
        with torch.autocast("cpu", half):
            y = layer(x)
            assert way_of(y) == of(way)
            assert y.dtype == half
            assert torch.equal(layer(x.to(half)), y)
            with torch.no_grad():
                assert worst_error(layer(x), reference) < ROUNDING[half]
        with torch.autocast("cpu", half, enabled=within):
            found.append(gradients(layer, y, x, d.to(half)))
    assert worst_error(y, reference) < ROUNDING[half]
    for name, gradient in found[0].items():
        assert gradient.dtype == torch.float32
        assert worst_error(gradient, expected[name]) < 3 * ROUNDING[half], name
        assert torch.equal(gradient, found[1][name]), name


@given(ratio=st.sampled_from([0.0, 1.0, 30.0, 100.0]), size=st.sampled_from([1.0, 1e-2]), settings=options)
def test_outputs_below_their_bias_have_the_gradient_of_the_magnitude(
    ratio: float, size: float, settings: dict[str, Any]
) -> None:
    layer, x = layer_for("folded", **settings), size * inputs("folded")
    with torch.no_grad():
        layer.base_layer.bias[:4] = ratio * size
    dense = DenseDVoRA.of(layer)
    d = (dense(x).detach() - layer.base_layer.bias).float() / size
    (found,) = torch.autograd.grad(layer(x), [layer.magnitude], d)
    expected = dense.gradients(x, d)["magnitude"]
    assert float(((found - expected) / expected).abs().max()) < 2e-4


@pytest.mark.parametrize("rank", [RANK, IN + 4])
def test_a_weight_that_is_formed_under_autocast_is_rounded_once(rank: int) -> None:
    layer, eye = trained_layer(IN, OUT, rank, bias=False), torch.eye(IN).repeat(8, 1)
    for trained in (True, False):
        with torch.set_grad_enabled(trained):
            expected = layer(eye).bfloat16()
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(layer(eye), expected)


# Which computation.


@pytest.mark.parametrize(
    ("sizes", "tokens", "trained", "evaluated"),
    [
        ((768, 768, 16), 300, "thin", "thin"),
        ((768, 768, 16), 500, "folded", "folded"),
        ((768, 8, 16), 20, "folded", "thin"),
        ((768, 768, 512), 800, "folded", "folded"),
        ((768, 768, 700), 500, "thin", "thin"),
        ((768, 768, 769), 900, "folded", "folded"),
        ((768, 768, 769), 1, "thin", "thin"),
        ((768, 768, 16, 64), 130, "thin", "thin"),
        ((768, 768, 16, 64), 140, "folded", "thin"),
    ],
    ids=str,
)
def test_the_computation_follows_from_sizes(sizes: tuple[int, ...], tokens: int, trained: str, evaluated: str) -> None:
    in_features, out_features, rank, *groups = sizes
    weight, shared = torch.ones(out_features, in_features), SharedProjections(3)
    adapted = AdaptedWeight(weight, rank, shared=shared, groups=groups[0] if groups else 1)
    assert [computation(tokens, adapted, True), computation(tokens, adapted, False)] == [trained, evaluated]


class Subclass(nn.Linear):
    """Another class with the same forward."""


DECIDED: dict[str, tuple[str | None, Callable[[DVoRAAdapter], object]]] = {
    "nothing": ("folded", lambda layer: None),
    "a trained bias": ("folded", lambda layer: layer.base_layer.bias.requires_grad_()),
    "a frozen vector": ("folded", lambda layer: layer.magnitude.requires_grad_(False)),
    "a hook of the adapter": ("folded", lambda layer: layer.register_forward_hook(lambda *_: None)),
    "frozen vectors": (None, lambda layer: layer.requires_grad_(False)),
    "a trained weight": ("thin", lambda layer: layer.base_layer.weight.requires_grad_()),
    **{
        hook: ("thin", lambda layer, hook=hook: getattr(layer.base_layer, "register_" + hook)(lambda *_: None))
        for hook in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
    },
    "a forward of its own": ("thin", lambda layer: setattr(layer.base_layer, "forward", layer.base_layer.forward)),
    "a subclass": ("thin", lambda layer: setattr(layer.base_layer, "__class__", Subclass)),
    "a parametrization": ("thin", lambda layer: nn.utils.parametrizations.weight_norm(layer.base_layer)),
    "half precision": ("thin", lambda layer: layer.to(torch.bfloat16)),
    "a gain near zero": ("folded", lambda layer: layer.magnitude.data[3].mul_(1e-3)),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("case", DECIDED)
def test_a_weight_is_formed_where_that_of_the_base_is_plain_and_frozen(case: str) -> None:
    way, change = DECIDED[case]
    layer = layer_for("folded")
    change(layer)
    x = inputs("folded", layer.base_layer.weight.dtype).requires_grad_()
    y = layer(x)
    assert way_of(y) == way
    assert worst_error(y, DenseDVoRA.of(layer)(x)) < ROUNDING[y.dtype]


def test_a_hook_of_all_modules_sees_the_base() -> None:
    layer, seen = layer_for("folded"), []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        layer(inputs("folded"))
        layer.requires_grad_(False)(inputs("folded"))
    assert seen.count(layer.base_layer) == 2


# Derivatives of higher order.


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "strength"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("way", "tokens", "rank"), [("thin", 2, 1), ("folded", 8, 1), ("folded", 2, 5)])
def test_derivatives_of_higher_order_equal_finite_differences(
    way: str, tokens: int, rank: int, groups: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"shared": SharedProjections(3), "lambda_d_groups": groups}
    layer = trained_layer(4, 3, rank, dtype=torch.float64, bias=bias, **settings)
    monkeypatch.setattr(forward, "computation", lambda *_: way)
    if bias:
        layer.base_layer.bias.requires_grad_()
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    x = randn(tokens, 4, seed=8, dtype=torch.float64).requires_grad_()

    def outputs(x: Tensor, *values: Tensor) -> Tensor:
        if bias:
            return functional_call(layer, dict(zip(trained, values, strict=True)), x)
        return weakened(layer, x, 0.7, Vectors(*values))

    leaves = x, *(p.detach().clone().requires_grad_() for p in trained.values())
    assert way_of(outputs(*leaves)) == way
    assert torch.autograd.gradcheck(outputs, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(outputs, leaves)


@directions
@every_way
@pytest.mark.parametrize("groups", [1, 4])
def test_second_derivatives_with_a_detached_norm_are_those_of_the_dense_method(
    groups: int, way: str, direction: str
) -> None:
    settings = {"detach_norm": True, "direction": direction, "lambda_d_groups": groups}
    layer, d = layer_for(way, dtype=torch.float64, **settings), output_gradient(way)
    dense, second = DenseDVoRA.of(layer), []
    for module in (layer, dense):
        leaves = [module.magnitude, module.lambda_b, module.lambda_d]
        first = torch.autograd.grad(module(inputs(way, torch.float64)), leaves, d.double(), create_graph=True)
        second.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves))
    for ours, theirs in zip(*second, strict=True):
        assert worst_error(ours, theirs) < 1e-12


# What is kept for the backward pass.

F32, BF16 = torch.float32, torch.bfloat16
HELD = {
    "thin": (BF16, 4000, (36, 48, 4, 1), lambda i, o, r: o + r),
    "thin, groups": (BF16, 4000, (36, 48, 4, 9), lambda i, o, r: i + o + r),
    "folded": (F32, 4000, (36, 48, 4, 1), lambda i, o, r: o + r),
    "folded, groups": (F32, 4000, (36, 48, 4, 9), lambda i, o, r: i + o),
    "folded, few tokens": (F32, 60, (80, 150, 2, 1), lambda i, o, r: o + r),
    "folded, few tokens, groups": (F32, 60, (80, 150, 2, 8), lambda i, o, r: i + o),
    "folded, above the width": (F32, 4000, (36, 48, 40, 1), lambda i, o, r: o + r),
}
"""Dtype, tokens, sizes with the groups, and how many values of a token may be held."""


@pytest.mark.parametrize("case", HELD)
def test_what_is_held_of_a_pass_grows_with_tokens_only_and_nothing_after_its_backward_pass(case: str) -> None:
    dtype, tokens, (width, out, rank, groups), of_token = HELD[case]
    settings = {"shared": SharedProjections(3), "lambda_d_groups": groups}
    layer = trained_layer(width, out, rank, dtype=dtype, **settings).eval()
    x = randn(tokens, width, seed=8, dtype=dtype).requires_grad_()
    assert way_of(layer(x)) == case.split(",")[0]

    def loss() -> Tensor:
        # A sum keeps nothing of the outputs, and nobody else the inputs.
        return layer(1 * x).sum()

    loss().backward()
    vectors = 40 * 4 * (out + rank * groups)
    with Census() as census:
        made = loss()
        held = sum(census.held())
        made.backward()
        del made
        behind = sum(census.held())
    assert held <= 1.02 * tokens * of_token(width, out, rank) * dtype.itemsize + vectors
    assert behind <= vectors


@every_way
def test_an_output_that_is_written_to_is_noticed_where_it_is_needed(way: str) -> None:
    layer, x = layer_for(way), inputs(way).requires_grad_()
    y = layer(x)
    y.mul_(2)
    if of(way) == "folded":
        with pytest.raises(RuntimeError, match=r"^Linear\(12, 10\): the layer's output was written to in place"):
            y.sum().backward()
    else:
        assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, 2 * layer(x))))


AROUND = {
    "saved tensors on the CPU": (save_on_cpu(), nullcontext()),
    "saved tensors copied": (saved_tensors_hooks(Tensor.clone, Tensor.clone), nullcontext()),
    # Of the vectors only: the gradient of x comes from PyTorch's products.
    "a backward pass under autocast": (nullcontext(), torch.autocast("cpu", BF16)),
}


@pytest.mark.parametrize("case", AROUND)
@every_way
@pytest.mark.parametrize("groups", [1, 4])
def test_what_is_around_a_pass_changes_no_bit(groups: int, way: str, case: str) -> None:
    around, around_backward = AROUND[case]
    layer = layer_for(way, lambda_d_groups=groups)
    x, d = inputs(way).requires_grad_("saved" in case), output_gradient(way)
    expected = gradients(layer, layer(x), x, d)
    with around:
        y = layer(x)
    with around_backward:
        assert all(map(torch.equal, gradients(layer, y, x, d).values(), expected.values()))
