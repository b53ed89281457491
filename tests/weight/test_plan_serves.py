"""The questions that a plan is asked: whether it still serves, and whether it may be kept.

Vectors whose values are not read, as on other devices, are made here as an entry without copies.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dvora import SharedProjections
from dvora.matrices.interface import DISTRIBUTIONS
from dvora.method.functional import Vectors
from dvora.ops.passes import Pass
from dvora.weight.adapted_weight import AdaptedWeight
from dvora.weight.factors import Asked, EvaluatedEntry, PassFactors, joined_values
from dvora.weight.plan import EvaluationPlan, Operands
from tests.cases import linear, randn
from tests.reference import DenseDVoRA

IN, OUT, RANK = 6, 5, 3
both = pytest.mark.parametrize("compared", [True, False], ids=["vectors compared", "vectors not read"])


class Planned:
    """A layer's plan with all that it was made from."""

    def __init__(self, compared: bool, strength: bool = False, distribution: str = "kaiming_uniform") -> None:
        self.base, self.x = linear(IN, OUT).requires_grad_(False), randn(4, IN, seed=8)
        weight, bias = self.base.weight, self.base.bias
        self.adapted = AdaptedWeight(weight, RANK, shared=SharedProjections(3, distribution))
        vectors = Vectors(*(1 + 0.2 * randn(size, seed=seed) for seed, size in enumerate((OUT, OUT, RANK))))
        s = torch.tensor(0.5 if strength else 1.0)
        self.inputs: tuple[Tensor, ...] = (*vectors, s) if strength else vectors
        self.copies = joined_values(self.inputs) if compared else None
        self.entry = EvaluatedEntry(Asked.of(self.adapted, vectors, weight), self.inputs, self.copies, weight)
        packed, self.entry.w = self.adapted.packed_factors(vectors, weight)
        self.entry.factors = PassFactors(packed.weakened(s) if strength else packed, {})
        self.operands = Operands(*vectors, s, weight, bias)
        self.plan = EvaluationPlan(self.adapted, self.entry, self.operands, self.x)
        self.running = Pass()
        self.whole = not strength

    def is_kept(self, operands: Operands | None = None, whole: bool | None = None) -> bool:
        self.entry.plan = None
        whole = self.whole if whole is None else whole
        self.plan.keep(self.adapted, self.entry, whole, operands or self.operands, self.running)
        return self.entry.plan is self.plan

    def serves(self, operands: Operands | None = None, running: Pass | None = None) -> bool:
        return self.plan.serves(self.entry, operands or self.operands, self.x, running or self.running)


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda t: t.add_(1),
    "through detach": lambda t: t.detach().add_(1),
    "data assigned": lambda t: setattr(t, "data", t.data + 1),
    "inference": lambda t: torch.inference_mode()(t.add_)(1),
}


@both
@pytest.mark.parametrize("strength", [False, True])
def test_a_plan_that_is_kept_serves(compared: bool, strength: bool) -> None:
    of = Planned(compared, strength)
    assert of.is_kept()
    assert of.serves()
    # Of vectors that are read, every pass must have seen that they have their values.
    assert of.serves(running=Pass()) != compared


@both
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("operand", Operands._fields)
def test_a_plan_does_not_serve_after_a_change_of_an_operand(operand: str, change: str, compared: bool) -> None:
    of = Planned(compared)
    assert of.is_kept()
    assert of.serves()
    CHANGES[change](getattr(of.operands, operand))
    assert not of.serves()


@both
@pytest.mark.parametrize("operand", Operands._fields)
def test_a_plan_does_not_serve_other_operands(operand: str, compared: bool) -> None:
    of = Planned(compared)
    assert of.is_kept()
    value = getattr(of.operands, operand)
    assert not of.serves(of.operands._replace(**{operand: value.clone()}))
    if operand in ("weight", "bias"):
        assert not of.serves(of.operands._replace(**{operand: None}))


@both
@pytest.mark.parametrize("change", ["in place", "data assigned"])
@pytest.mark.parametrize("operand", ["magnitude", "lambda_b", "lambda_d", "weight"])
def test_a_plan_is_not_kept_with_factors_of_before_a_change(operand: str, change: str, compared: bool) -> None:
    of = Planned(compared)
    CHANGES[change](getattr(of.operands, operand))
    assert not of.is_kept()
    # Nor if it is made now, with the factors of before.
    of.plan = EvaluationPlan(of.adapted, of.entry, of.operands, of.x)
    assert not of.is_kept()


@both
def test_a_plan_is_kept_with_factors_of_the_strength_that_the_layer_has(compared: bool) -> None:
    for strength in (False, True):
        of = Planned(compared, strength)
        assert not of.is_kept(whole=strength)
        assert of.is_kept(whole=not strength)
    of.operands.strength.mul_(2)
    assert not of.is_kept()


@both
def test_a_plan_is_not_kept_with_norms_of_before(compared: bool) -> None:
    of = Planned(compared)
    of.adapted.w = of.adapted.w.clone()
    assert not of.is_kept()


@both
def test_a_plan_is_not_kept_for_twins_of_the_vectors(compared: bool) -> None:
    of = Planned(compared)
    twins = Operands(*(nn.Parameter(vector.clone(), False) for vector in of.operands[:3]), *of.operands[3:])
    of.plan = EvaluationPlan(of.adapted, of.entry, twins, of.x)
    assert not of.is_kept(twins)
    views = Operands(*(vector.view_as(vector) for vector in of.operands[:3]), *of.operands[3:])
    of.plan = EvaluationPlan(of.adapted, of.entry, views, of.x)
    assert not of.is_kept(views)


@both
def test_a_plan_is_not_kept_for_rows_small_beside_their_bias(compared: bool) -> None:
    of = Planned(compared)
    of.base.bias.fill_(1e4)
    of.plan = EvaluationPlan(of.adapted, of.entry, of.operands, of.x)
    assert not of.is_kept()


@both
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("strength", [False, True])
def test_what_a_plan_gives_is_the_definition(strength: bool, distribution: str, compared: bool) -> None:
    of = Planned(compared, strength, distribution)
    vectors, shared = of.operands[:3], of.adapted.shared
    A, B = shared.A(RANK, IN, torch.float64), shared.B(RANK, OUT, torch.float64)
    dense = DenseDVoRA(of.base.weight, of.base.bias, A, B, *vectors)
    for x in (of.x, of.x[:1], of.x[0]):
        base = of.base(x).double()
        expected = base + (0.5 if strength else 1.0) * (dense(x).detach() - base)
        for on_cpu in (True, False):  # tokens on other devices share by the cache of all modes
            of.plan.prepared._on_cpu, running = on_cpu, Pass()
            found = of.plan.outputs(x, of.base, running)
            assert (running.projected is not None) == on_cpu
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
