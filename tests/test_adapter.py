"""DVoRAAdapter: the members that the specification names, state dicts, refusals, and PyTorch's transformations."""

import copy
import io
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import dvora
from dvora import DVoRAAdapter, SharedProjections
from dvora.functional import Vectors
from tests.cases import COPIES, DIRECTIONS, DTYPES, SHARED, fresh_copy, linear, randn, train, trained_layer
from tests.census import Census
from tests.reference import DenseDVoRA, worst_error

IN, OUT, RANK = 6, 5, 3
X, D = randn(4, IN, seed=0), randn(4, OUT, seed=1)
NAMES = Vectors._fields

frozen_or_not = pytest.mark.parametrize("freeze_base_layer", [True, False], ids=["frozen", "trained base"])
directions = pytest.mark.parametrize("direction", DIRECTIONS)
bias_or_not = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def new_layer(base: nn.Linear | None = None, rank: int = RANK, **options: object) -> DVoRAAdapter:
    return DVoRAAdapter(linear(IN, OUT) if base is None else base, rank, **{"shared": SHARED, **options})


def trained(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}


# The start, inputs and numbers.


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@dtypes
@given(
    sizes=st.tuples(*[st.integers(1, 20)] * 3),
    tokens=st.sampled_from([4, 40]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    zero_rows=st.booleans(),
    bias=st.booleans(),
    direction=st.sampled_from(DIRECTIONS),
    freeze_base_layer=st.booleans(),
    groups=st.integers(1, 5),
)
def test_any_layer_is_its_base_at_the_start_bit_for_bit(
    sizes: tuple[int, int, int],
    tokens: int,
    scale: float,
    zero_rows: bool,
    bias: bool,
    dtype: torch.dtype,
    mode: Callable[[], Any],
    groups: int,
    **options: object,
) -> None:
    in_features, out_features, rank = sizes
    options["lambda_d_groups"] = min(groups, in_features)
    base = linear(in_features, out_features, bias=bias, dtype=dtype)
    with torch.no_grad():
        base.weight.mul_(scale)
        base.weight[:: 2 if zero_rows else out_features + 1] = 0
    layer = new_layer(base, rank, shared=SharedProjections(3), **options)
    x = randn(tokens, in_features, seed=0, dtype=dtype)
    with mode():
        assert torch.equal(layer(x), base(x))
        assert layer(x).dtype == dtype
    assert torch.equal(layer.merge_to_original_layer().weight, base.weight)


@pytest.mark.parametrize("shape", [(3, 7), (5,), (2, 6, 1), ()], ids=str)
def test_a_wrong_width_is_refused_with_both_sizes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"width 6 .* got shape {re.escape(str(shape))}"):
        trained_layer(IN, OUT, RANK)(torch.zeros(shape))


def test_what_is_trained_is_counted_and_the_base_where_it_is_not_frozen() -> None:
    for base, freeze_base_layer, count in [
        (nn.Linear(1000, 1000), True, 2 * 1000 + 8),
        (nn.Linear(6, 5), False, 2 * 5 + 8 + 30 + 5),
        (nn.Linear(6, 5, bias=False), False, 2 * 5 + 8 + 30),
    ]:
        layer = new_layer(base, 8, freeze_base_layer=freeze_base_layer)
        assert layer.parameter_count == sum(p.numel() for p in trained(layer).values()) == count
    assert new_layer(nn.Linear(1000, 1000), 8, lambda_d_groups=25).parameter_count == 2 * 1000 + 25 * 8


def test_the_starting_values_are_those_of_the_papers() -> None:
    layer = new_layer()
    torch.testing.assert_close(layer.magnitude, layer.base_layer.weight.norm(dim=1))
    assert layer.lambda_b.tolist() == [0] * OUT
    assert torch.equal(layer.lambda_d, torch.full((RANK,), 0.1))
    assert layer.alpha == layer.rank == RANK
    assert torch.equal(train(new_layer(alpha=RANK))(X), train(new_layer())(X))


def test_casting_the_model_leaves_the_vectors_unrounded() -> None:
    layer = trained_layer(IN, OUT, RANK)
    before = layer.get_parameters()
    assert nn.Sequential(layer).half()[0].base_layer.weight.dtype == torch.float16
    assert torch.equal(layer.get_parameters(), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_layer_made_without_gradients_can_be_trained(mode: Callable[[], Any]) -> None:
    base, shared = linear(IN, OUT), SharedProjections(SHARED.seed)
    with mode():
        layer = DVoRAAdapter(base, RANK, shared=shared)
        layer(X)
    layer(X).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.01).step()
    expected = new_layer()
    expected.backward(2 * expected(X).detach())
    expected.update_parameters(0.01)
    torch.testing.assert_close(layer.get_parameters(), expected.get_parameters())


# Explicit training.


def by_autograd(layer: DVoRAAdapter, x: Tensor = X, d: Tensor = D) -> dict[str, Tensor]:
    """What the explicit backward pass should give, by name."""
    x, leaves = x.clone().requires_grad_(), trained(layer)
    return dict(zip(["x", *leaves], torch.autograd.grad(layer(x), [x, *leaves.values()], d), strict=True))


def found(layer: DVoRAAdapter, d_x: Tensor) -> dict[str, Tensor]:
    return {"x": d_x, **{name: p.grad for name, p in layer.named_parameters() if p.grad is not None}}


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert ours[name].dtype == gradient.dtype
        assert worst_error(ours[name], gradient.double()) < tolerance, name


def assert_refused(layer: DVoRAAdapter, message: str = "no input is kept for backward: call the layer first") -> None:
    with pytest.raises(RuntimeError, match=message):
        layer.backward(D)
    assert not any(p.grad is not None for p in layer.parameters())


@frozen_or_not
@directions
@given(bias=st.booleans(), detach_norm=st.booleans(), tokens=st.sampled_from([2, 20]))
def test_explicit_training_equals_autograd_with_plain_sgd(
    direction: str, freeze_base_layer: bool, tokens: int, **options: object
) -> None:
    options |= {"direction": direction, "freeze_base_layer": freeze_base_layer, "alpha": 2, "dtype": torch.float64}
    explicit = trained_layer(IN, OUT, RANK, **options)
    automatic = copy.deepcopy(explicit)
    sgd = torch.optim.SGD(automatic.parameters(), lr=0.002 / tokens)
    for step in range(4):
        x = randn(2, tokens, IN, seed=step, dtype=torch.float64)
        theirs = x.clone().requires_grad_()
        sgd.zero_grad()
        automatic(theirs).square().sum().backward()
        sgd.step()
        d_x = explicit.backward(2 * explicit(x).detach())
        explicit.update_parameters(0.002 / tokens)
        assert worst_error(d_x, theirs.grad) < 1e-12
        for name, parameter in trained(explicit).items():
            assert worst_error(parameter, trained(automatic)[name]) < 1e-11, name
            assert parameter.grad is None


@frozen_or_not
@given(frozen=st.sets(st.sampled_from(NAMES), min_size=1))
def test_frozen_vectors_get_no_gradients_and_the_others_theirs(freeze_base_layer: bool, frozen: set[str]) -> None:
    layer = trained_layer(IN, OUT, RANK, freeze_base_layer=freeze_base_layer)
    for name in (*frozen, *([] if freeze_base_layer else ["base_layer.bias"])):
        layer.get_parameter(name).requires_grad_(False)
    expected, before = by_autograd(layer), layer.get_parameters()
    layer(X)
    assert_close(found(layer, layer.backward(D)), expected)
    if len(expected) > 1:
        layer.update_parameters(0.1)
    for name, start in zip(NAMES, (0, OUT, 2 * OUT), strict=True):
        vector = layer.get_parameter(name).detach()
        assert torch.equal(vector, before[start : start + len(vector)]) == (name in frozen), name


@dtypes
def test_the_explicit_backward_pass_adds_in_the_dtypes_of_autograd(dtype: torch.dtype) -> None:
    layer, x, d = trained_layer(IN, OUT, RANK, dtype=dtype), X.to(dtype), D.to(dtype)
    once = by_autograd(layer, x, d)
    for _ in range(2):
        layer(x)
        d_x = layer.backward(d)
    twice = {name: gradient if name == "x" else 2 * gradient for name, gradient in once.items()}
    assert_close(found(layer, d_x), twice, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("forward", [False, True], ids=["forward outside", "forward under autocast"])
@pytest.mark.parametrize("backward", [False, True], ids=["backward outside", "backward under autocast"])
def test_autocast_is_that_of_the_forward_pass(backward: bool, forward: bool) -> None:
    layer, x, d = trained_layer(64, 48, 8), randn(32, 64, seed=0), randn(32, 48, seed=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=forward):
        y = layer(reference := x.clone().requires_grad_())
    gradients = torch.autograd.grad(y, [reference, *layer.vectors], d.to(y.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=forward):
        layer(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=backward):
        d_x = layer.backward(d)
    assert_close(found(layer, d_x), dict(zip(["x", *NAMES], gradients, strict=True)))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("inference", [True, False], ids=["inference tensors", "plain"])
def test_neither_input_nor_output_need_be_held_or_recorded(inference: bool, mode: Callable[[], Any]) -> None:
    layer = trained_layer(IN, OUT, RANK)
    expected = by_autograd(layer)
    with torch.inference_mode(inference):
        x, d = X.clone(), D.clone()
    with mode():
        layer(x)
    del x
    with torch.inference_mode(inference):
        d_x = layer.backward(d)
    assert_close(found(layer, d_x), expected)
    layer(X).sum().backward()
    layer.update_parameters(0.1)


def fail(layer: DVoRAAdapter) -> None:
    with pytest.raises(RuntimeError):
        layer(X.double())


def offload(layer: DVoRAAdapter) -> None:
    with torch.autograd.graph.save_on_cpu():
        layer(X)


def explicitly(layer: DVoRAAdapter) -> None:
    layer.backward(D)
    layer.zero_grad()


FORGETTING: dict[str, Callable[[DVoRAAdapter], object]] = {
    "backward": explicitly,
    "autograd's backward": lambda layer: torch.autograd.grad(layer(X).sum(), layer.magnitude),
    "eval": lambda layer: layer.eval().train(),
    "reset_state": lambda layer: layer.reset_state(),
    "checkpoint": lambda layer: checkpoint(layer, X, use_reentrant=False),
    "inference mode": lambda layer: torch.inference_mode()(layer)(X),
    "cast": lambda layer: layer.to(torch.float64),
    "move": lambda layer: layer.to("meta"),
    "offloading": offload,
}


@pytest.mark.parametrize("what", FORGETTING)
def test_an_older_input_is_never_used_and_none_is_left(what: str) -> None:
    layer, x = trained_layer(IN, OUT, RANK, shared=SharedProjections(3)), X.clone()
    layer(x)
    gone = StorageWeakRef(x.untyped_storage())
    del x
    FORGETTING[what](layer)
    assert_refused(layer)
    assert gone.expired()


@pytest.mark.parametrize("copied", COPIES)
def test_copies_do_not_carry_the_last_input(copied: str) -> None:
    layer = trained_layer(IN, OUT, RANK)
    layer(X)
    assert_refused(COPIES[copied](layer))
    layer.backward(D)


CHANGED: dict[str, Callable[[DVoRAAdapter, Tensor], object]] = {
    "input": lambda layer, x: x.add_(1),
    "set_parameters": lambda layer, x: layer.set_parameters(2 * layer.get_parameters()),
    "load": lambda layer, x: layer.load_state_dict(trained_layer(IN, OUT, RANK).state_dict()),
    "base": lambda layer, x: layer.base_layer.weight.zero_(),
    "new base": lambda layer, x: setattr(layer.base_layer, "weight", nn.Parameter(torch.ones(OUT, IN))),
}


@pytest.mark.parametrize("what", CHANGED)
def test_an_input_or_a_parameter_that_was_written_to_is_refused(what: str) -> None:
    layer, x = trained_layer(IN, OUT, RANK), X.clone()
    layer.lambda_d.grad = torch.ones(RANK)
    layer(x)
    with torch.no_grad():
        CHANGED[what](layer, x)
    layer.lambda_d.grad = None
    assert_refused(layer, "changed since the last forward: call the layer again")


def test_a_refused_gradient_leaves_the_input_for_another_try() -> None:
    layer = trained_layer(IN, OUT, RANK)
    expected = by_autograd(layer)
    layer(X)
    for shape in [(4, OUT + 1), (4 * OUT,)]:
        with pytest.raises(ValueError, match=r"output_gradient has shape .* the last outputs had \(4, 5\)"):
            layer.backward(torch.zeros(shape))
    with pytest.raises(TypeError, match="output_gradient must be a tensor of real numbers"):
        layer.backward(D.numpy())
    assert_close(found(layer, layer.backward(D)), expected)


def test_another_threads_pass_is_not_this_threads() -> None:
    layer = trained_layer(IN, OUT, RANK)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(layer, X).result()
        assert_refused(layer)
        layer(3 * X)
        expected = by_autograd(fresh_copy(layer))
        assert_close(found(layer, pool.submit(layer.backward, D).result()), expected)


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf")])
def test_a_senseless_learning_rate_is_refused_and_changes_nothing(rate: float) -> None:
    layer = trained_layer(IN, OUT, RANK)
    before = layer.get_parameters()
    with pytest.raises(RuntimeError, match="call backward first"):
        layer.update_parameters(0.1)
    layer(X).sum().backward()
    with pytest.raises(ValueError, match=f"learning_rate must be finite and not negative, got {rate}"):
        layer.update_parameters(rate)
    layer.update_parameters(0)
    assert torch.equal(layer.get_parameters(), before)


@frozen_or_not
@bias_or_not
def test_parameters_are_read_and_set_in_one_order(bias: bool, freeze_base_layer: bool) -> None:
    layer = trained_layer(IN, OUT, RANK, bias=bias, freeze_base_layer=freeze_base_layer)
    parts = [*layer.vectors, *([] if freeze_base_layer else layer.base_layer.parameters())]
    before = layer.get_parameters()
    assert torch.equal(before, torch.cat([part.detach().flatten() for part in parts]))
    values = randn(layer.parameter_count, seed=3)
    layer.set_parameters(values.double())
    assert torch.equal(layer.get_parameters(), values)
    assert not torch.equal(before, values)
    torch.testing.assert_close(layer(X), fresh_copy(layer)(X))
    layer(X).sum().backward()
    layer.reset_state()
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert torch.equal(layer.get_parameters(), values)


def one_bad(value: float) -> Tensor:
    values = torch.ones(13, dtype=torch.float64)
    values[-1] = value
    return values


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(12), ValueError, r"must have shape \(13,\) for this layer, got \(12,\)"),
        (torch.zeros(13, 1), ValueError, r"must have shape \(13,\) for this layer, got \(13, 1\)"),
        ([1.0] * 13, TypeError, "parameters must be a tensor of real numbers"),
        (torch.ones(13, dtype=torch.complex64), TypeError, "parameters must be a tensor of real numbers"),
        (one_bad(float("nan")), ValueError, "parameters must be finite"),
        (one_bad(1e39), ValueError, r"parameters must be finite in torch\.float32"),
    ],
    ids=str,
)
def test_bad_parameters_are_refused_and_change_nothing(value: object, error: type[Exception], message: str) -> None:
    layer = trained_layer(IN, OUT, RANK)
    before = layer.get_parameters()
    with pytest.raises(error, match=message):
        layer.set_parameters(value)
    assert torch.equal(layer.get_parameters(), before)


# State dicts.


def copied_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


@dtypes
def test_a_saved_layer_gives_the_same_outputs_after_loading(dtype: torch.dtype) -> None:
    layer, file = trained_layer(IN, OUT, RANK, dtype=dtype), io.BytesIO()
    assert list(layer.state_dict()) == [*NAMES, "base_layer.weight", "base_layer.bias"]
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = DVoRAAdapter(nn.Linear(IN, OUT, dtype=dtype), RANK, shared=SharedProjections(SHARED.seed))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(X.to(dtype)), layer(X.to(dtype)))


def test_the_vectors_alone_can_be_loaded_from_any_dtype_and_the_callers_dict_stays() -> None:
    layer, other = trained_layer(IN, OUT, RANK), new_layer()
    vectors = {name: value.detach().double() for name, value in layer.vectors._asdict().items()}
    missing, unexpected = other.load_state_dict(vectors, strict=False)
    assert (missing, unexpected) == (["base_layer.weight", "base_layer.bias"], [])
    assert torch.equal(other(X), layer(X))
    assert all(value.dtype == torch.float64 for value in vectors.values())


BAD_STATES: dict[str, tuple[str, object, type[Exception], str]] = {
    **{
        f"size of {name}": (
            name,
            torch.ones(size),
            ValueError,
            rf"0\.{name} has shape \({size},\) .*rank=3.*by loading",
        )
        for name, size in zip(NAMES, (OUT + 1, OUT + 1, RANK + 1), strict=True)
    },
    **{
        f"{value} in {name}": (name, value, ValueError, f"{name} has values that are not finite in torch.float32")
        for name, value in (("magnitude", float("nan")), ("lambda_b", float("inf")), ("lambda_d", 1e39))
    },
    "far": ("lambda_b", 3e38, ValueError, "lambda_b has values up to 3e.38 .*go back to an earlier checkpoint"),
    "a list": ("lambda_d", [1.0, 2.0, 3.0], TypeError, "lambda_d is a list in the state dict, expected a tensor"),
    "base size": ("base_layer.weight", torch.ones(2 * OUT, IN), ValueError, "base_layer.weight"),
    "NaN in the base": ("base_layer.weight", float("nan"), ValueError, r"base_layer\.weight: 1 of 5 rows"),
    "too large a base": ("base_layer.weight", 3e38, ValueError, r"base_layer\.weight: 1 of 5 rows .* no finite norm"),
    "missing": ("lambda_d", None, RuntimeError, r"Missing key.*lambda_d"),
}


@pytest.mark.parametrize("case", BAD_STATES)
@pytest.mark.parametrize("assign", [False, True])
def test_a_bad_state_dict_is_refused_by_name_and_changes_nothing(assign: bool, case: str) -> None:
    name, bad, error, message = BAD_STATES[case]
    model = nn.Sequential(trained_layer(IN, OUT, RANK))
    before, expected = copied_state(model), model(X)
    loaded: dict[str, Any] = {key: value.double() + 1 for key, value in before.items()}
    if isinstance(bad, float):
        loaded[f"0.{name}"].view(-1)[2] = bad
        if "base" in name:
            loaded[f"0.{name}"][1] = bad
            loaded[f"0.{name}"] = loaded[f"0.{name}"].float()
            loaded[f"0.{name}"][0] = 1
    elif bad is None:
        del loaded[f"0.{name}"]
    else:
        loaded[f"0.{name}"] = bad
    with pytest.raises(error, match=message):
        model.load_state_dict(loaded, assign=assign)
    if case != "missing":  # PyTorch says so after it has loaded the rest
        assert_unchanged(model, before)
        assert torch.equal(model(X), expected)


# Merging.


@directions
@bias_or_not
def test_a_merged_layer_gives_the_outputs_of_the_adapter_and_shares_nothing_with_it(bias: bool, direction: str) -> None:
    layer = trained_layer(IN, OUT, RANK, bias=bias, direction=direction, freeze_base_layer=False)
    layer(X).sum().backward()
    before = copied_state(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = layer.merge_to_original_layer()
    torch.testing.assert_close(merged(X), layer(X))
    assert worst_error(merged.weight, DenseDVoRA.of(layer).merged_weight()) < 1e-6
    assert merged.weight.is_leaf
    assert merged.weight.grad is None
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert_unchanged(layer, before)


# Refusals: a clear error that leaves the base as it was.


class FakeQuantised(nn.Linear):
    """A linear layer that rounds its weight in its forward, as quantisation-aware training does."""

    def forward(self, x: Tensor) -> Tensor:
        step = self.weight.abs().max() / 7
        return nn.functional.linear(x, (self.weight / step).round() * step, self.bias)


def with_values(name: str, value: float) -> nn.Linear:
    base = linear(IN, OUT)
    with torch.no_grad():
        base.get_parameter(name)[[1, 3]] = value
    return base


def plain() -> nn.Linear:
    return linear(IN, OUT)


REFUSED: list[tuple[Callable[[], object], dict[str, object], type[Exception], str]] = [
    (plain, {"rank": 0}, ValueError, "rank must be a positive integer, got 0"),
    *((plain, {"rank": rank}, TypeError, "rank must be a positive integer") for rank in (2.0, True)),
    (plain, {"rank": 2**16 + 1}, ValueError, "rank must be at most 65536"),
    *(
        (plain, {"alpha": alpha}, ValueError, f"alpha must be finite and positive.* got {re.escape(str(alpha))}")
        for alpha in (0, float("nan"), 1e39)
    ),
    (plain, {"lambda_d_groups": 0}, ValueError, "lambda_d_groups must be at least 1, got 0"),
    (plain, {"lambda_d_groups": 2.0}, TypeError, r"lambda_d_groups must be an integer, got 2\.0 of type float"),
    (plain, {"lambda_d_groups": IN + 1}, ValueError, r"Linear\(6, 5\): lambda_d_groups=7 .* of which it has 6"),
    (plain, {"alpha": "1"}, TypeError, "alpha must be a positive number or None"),
    (plain, {"direction": "Unit"}, ValueError, "unknown direction 'Unit', expected one of unit, weight"),
    (plain, {"d_initial": float("nan")}, ValueError, "d_initial must be finite"),
    (plain, {"d_initial": "1"}, TypeError, "d_initial must be a number"),
    (lambda: nn.Conv2d(3, 4, 2), {}, TypeError, r"type Conv2d is not supported; supported: torch\.nn\.Linear"),
    (lambda: nn.LazyLinear(OUT), {}, ValueError, "uninitialized"),
    (lambda: FakeQuantised(IN, OUT), {}, TypeError, r"its forward is not that of torch\.nn\.Linear.*through PEFT"),
    (new_layer, {}, TypeError, "already carries a DVoRA adapter"),
    (lambda: nn.Linear(IN, OUT, device="meta"), {}, ValueError, r"Linear\(6, 5\): the base weight is on the meta"),
    (lambda: with_values("weight", float("nan")), {}, ValueError, r"Linear\(6, 5\): 2 of 5 rows .* no finite norm"),
    (lambda: with_values("bias", float("inf")), {}, ValueError, "Linear: 2 of 5 values of the bias are not finite"),
    (plain, {"shared": None}, ValueError, r"dvora\.initialize_shared_matrices\(input_size=6, output_size=5, rank=3\)"),
]


def snapshot(module: object) -> list[object]:
    """Attributes, names, dtypes, gradient flags and bytes of all parameters."""
    if not isinstance(module, nn.Module):
        return []
    tensors = [(name, t) for name, t in module.named_parameters() if not isinstance(t, nn.UninitializedParameter)]
    content = [b"" if t.is_meta else t.detach().view(torch.uint8).numpy().tobytes() for _, t in tensors]
    return [
        sorted(vars(module)),
        *((n, t.dtype, t.requires_grad, c) for (n, t), c in zip(tensors, content, strict=True)),
    ]


@pytest.mark.parametrize(("make", "options", "error", "message"), REFUSED)
def test_what_cannot_be_adapted_is_refused_and_stays_as_it_was(
    make: Callable[[], object], options: dict[str, object], error: type[Exception], message: str
) -> None:
    base = make()
    before = snapshot(base)
    with pytest.raises(error, match=message):
        DVoRAAdapter(base, **{"rank": RANK, "shared": SHARED, **options})
    assert snapshot(base) == before


def test_a_wrapper_that_says_what_it_wraps_is_no_other_forward() -> None:
    base = add_hook_to_module(linear(IN, OUT), ModelHook())
    assert torch.equal(new_layer(base)(X), linear(IN, OUT)(X))


# The process-wide default projections.


def test_the_error_without_default_projections_shows_the_call_that_makes_them() -> None:
    assert not dvora.are_shared_matrices_initialized()
    with pytest.raises(ValueError, match="not initialized") as caught:
        new_layer(shared=None)
    (call,) = re.findall(r"dvora\.initialize_shared_matrices\(.*?\)", str(caught.value))
    eval(call)  # the call as printed
    assert dvora.are_shared_matrices_initialized()
    layer = new_layer(shared=None)
    assert layer.shared is new_layer(linear(60, 50), 30, shared=None).shared
    dvora.reset_shared_matrices()
    assert not dvora.are_shared_matrices_initialized()


@pytest.mark.parametrize(("seed", "named"), [(None, 0), (0, 0), (17, 17)])
def test_layers_use_the_matrices_of_the_seed_and_keep_them(seed: int | None, named: int) -> None:
    dvora.initialize_shared_matrices(2, 2, 1, seed=seed)
    layer = train(new_layer(shared=None))
    expected, shared = layer(X), layer.shared
    assert torch.equal(shared.A(30, 60), SharedProjections(named).A(30, 60))
    dvora.initialize_shared_matrices(6, 5, 3, seed=99)
    assert layer.shared is shared
    assert torch.equal(layer(X), expected)
    assert new_layer(shared=None).shared.seed == 99
    own = SharedProjections(1)
    assert new_layer(shared=own).shared is own


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"input_size": 0}, ValueError, "input_size must be a positive integer, got 0"),
        ({"output_size": True}, TypeError, "output_size must be a positive integer, got True of type bool"),
        ({"rank": 0}, ValueError, "rank must be a positive integer, got 0"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
    ],
    ids=str,
)
def test_bad_sizes_are_refused_and_leave_the_default_as_it_was(
    wrong: dict[str, object], error: type[Exception], message: str
) -> None:
    dvora.initialize_shared_matrices(6, 5, 3, seed=5)
    with pytest.raises(error, match=re.escape(message)):
        dvora.initialize_shared_matrices(**{"input_size": 6, "output_size": 5, "rank": 3, **wrong})
    assert new_layer(shared=None).shared.seed == 5


# Diagnostics.


def test_diagnostics_equal_those_of_the_dense_matrices() -> None:
    layer = trained_layer(8, 7, 3)
    with torch.no_grad():
        layer.base_layer.weight[3] = 0
    dense = DenseDVoRA.of(layer)
    old, new = dense.weight.detach(), dense.updated_weight().detach()
    live = torch.arange(7) != 3
    ratio, angle = torch.ones(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    ratio[live] = dense.norm_ratio()[live]
    angle[live] = torch.nn.functional.cosine_similarity(old, new)[live].arccos().rad2deg()
    distance = (dense.gain() - 1).abs().detach()
    assert layer.diagnostics() == {
        "norm_ratio_mean": pytest.approx(float(ratio.mean()), rel=1e-5),
        "norm_ratio_max": pytest.approx(float(ratio.max()), rel=1e-5),
        "angle_degrees_mean": pytest.approx(float(angle.mean()), rel=1e-5),
        "angle_degrees_max": pytest.approx(float(angle.max()), rel=1e-5),
        "gain_distance_mean": pytest.approx(float(distance.mean()), rel=1e-5),
        "gain_distance_max": pytest.approx(float(distance.max()), rel=1e-5),
        "near_cancellation_share": 0.0,
        "zero_row_share": pytest.approx(1 / 7),
        "constant_bytes": 4 * (7 + 7 * 3),
        "parameter_count": 17,
        "dtype": "torch.float32",
        "base_dtype": "torch.float32",
        "device": "cpu",
    }


def test_diagnostics_count_rows_near_cancellation_and_show_no_change_at_the_start() -> None:
    layer = DVoRAAdapter(linear(1, 4), 1, shared=SHARED)
    values = layer.diagnostics()
    assert values["norm_ratio_max"] == 1
    assert values["angle_degrees_max"] == values["gain_distance_max"] == values["near_cancellation_share"] == 0
    with torch.no_grad():
        update = layer.lambda_d * SHARED.B(1, 4)[:, 0] * SHARED.A(1, 1)[0, 0]
        layer.lambda_b[0] = -0.98 * layer.base_layer.weight[0, 0].sign() / update[0]
    assert layer.diagnostics()["near_cancellation_share"] == 0.25


# No product of the weight's size once the constants exist, but for the folded weight.


def largest_made(step: Callable[[], object]) -> int:
    """Values of the largest tensor that the second of two steps makes: the first may make the constants."""
    step()
    with Census() as census:
        step()
    return census.largest() // 4


@directions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thin_step_makes_nothing_dense(dtype: torch.dtype, direction: str) -> None:
    layer = trained_layer(50, 60, 4, dtype=dtype, direction=direction)
    x = randn(8, 50, seed=0, dtype=dtype).requires_grad_()

    def step() -> None:
        layer(x).square().sum().backward()
        torch.optim.SGD(layer.parameters(), lr=1e-6).step()
        layer.diagnostics()

    assert largest_made(step) < 50 * 60 // 2
    assert largest_made(layer.merge_to_original_layer) >= 50 * 60


# Compiled, exported and transformed.


def compiled(layer: DVoRAAdapter, x: Tensor) -> Tensor:
    return torch.compile(layer, fullgraph=True, backend="aot_eager")(x)


def exported(layer: DVoRAAdapter, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        # torch.export's own use of what PyTorch has deprecated.
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(layer, (x[:3],), dynamic_shapes=({0: batch},)).module()
    return program(x)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("way", [compiled, exported])
def test_a_graph_has_the_constants_of_the_last_pass(way: Callable[..., Tensor]) -> None:
    layer, x = trained_layer(IN, OUT, RANK), randn(20, IN, seed=0)
    layer.base_layer.weight.data = layer.base_layer.weight.data.clone()
    torch.testing.assert_close(way(layer, x), layer(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        layer.base_layer.weight[0] *= 2
    torch._dynamo.reset()
    expected = layer(x)
    torch.testing.assert_close(way(layer, x), expected, rtol=1e-5, atol=1e-5)


def by_forward_mode(layer: DVoRAAdapter, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(layer(forward_ad.make_dual(torch.zeros_like(x), x))).tangent
    return y if layer.base_layer.bias is None else y + layer.base_layer.bias


def with_values_of(layer: DVoRAAdapter, x: Tensor) -> Tensor:
    values = {name: value.detach().clone() for name, value in layer.named_parameters()}
    other = trained_layer(IN, OUT, RANK, freeze_base_layer=layer.freeze_base_layer)
    other.set_parameters(1.5 * other.get_parameters())
    return functional_call(other, values, x)


def product_with_jacobian(layer: DVoRAAdapter, x: Tensor) -> Tensor:
    return x @ jacrev(layer)(x[0]).T + layer.base_layer.bias


WAYS: dict[str, Callable[[DVoRAAdapter, Tensor], Tensor]] = {
    "compile": compiled,
    "export": exported,
    "functional_call": with_values_of,
    "vmap": lambda layer, x: vmap(layer)(x),
    "jacrev": product_with_jacobian,
    "forward mode": by_forward_mode,
}


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("way", WAYS)
@frozen_or_not
def test_a_transformed_layer_equals_the_layer(freeze_base_layer: bool, way: str) -> None:
    layer, x = trained_layer(IN, OUT, RANK, freeze_base_layer=freeze_base_layer), randn(20, IN, seed=0)
    expected = layer(x)
    torch.testing.assert_close(WAYS[way](layer, x), expected, rtol=1e-5, atol=1e-5)
    layer.reset_state()
    WAYS[way](layer, x)
    assert_refused(layer)
    torch.testing.assert_close(layer(x), expected)


@frozen_or_not
def test_gradients_by_func_equal_autograd_and_those_of_each_sample_add_up(freeze_base_layer: bool) -> None:
    layer, x = trained_layer(IN, OUT, RANK, freeze_base_layer=freeze_base_layer), X
    values = {name: p.detach() for name, p in trained(layer).items()}
    expected = torch.autograd.grad(layer(x).square().sum(), list(trained(layer).values()))

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, values, x).square().sum()

    by_func, each = grad(loss)(values, x), vmap(grad(loss), (None, 0))(values, x)
    for name, gradient in zip(values, expected, strict=True):
        torch.testing.assert_close(by_func[name], gradient, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(each[name].sum(0), gradient, rtol=1e-4, atol=1e-4)


def test_a_layer_runs_on_tensors_without_values() -> None:
    layer = trained_layer(IN, OUT, RANK)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.empty(4, IN)).shape == (4, OUT)
    torch.testing.assert_close(layer(X), fresh_copy(layer)(X))


@pytest.mark.usefixtures("inductor")
def test_compiled_gradients_equal_eager_ones() -> None:
    layer = trained_layer(IN, OUT, RANK, freeze_base_layer=False, dtype=torch.float64)
    graph, x, d = torch.compile(layer, fullgraph=True), X.double(), D.double()
    leaves = list(trained(layer).values())
    for ours, theirs in zip(
        torch.autograd.grad(graph(x), leaves, d), torch.autograd.grad(layer(x), leaves, d), strict=True
    ):
        assert worst_error(ours, theirs) < 1e-12


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("change", ["step", "load", "cast", "base step"])
def test_a_compiled_layer_follows_a_change(change: str) -> None:
    layer, x = trained_layer(IN, OUT, RANK, freeze_base_layer=change != "base step"), X
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        layer(x)
    graph(x).square().mean().backward()
    if "step" in change:
        # A fused step is not counted as a write.
        torch.optim.SGD(layer.parameters(), lr=0.1, fused=change == "step").step()
        layer.zero_grad()
    elif change == "load":
        layer.load_state_dict({**layer.state_dict(), "base_layer.weight": randn(OUT, IN, seed=12)})
    else:
        layer.double()
        x = x.double()
    with torch.no_grad():
        for ours in (layer, graph):
            torch.testing.assert_close(ours(x), fresh_copy(layer)(x))
