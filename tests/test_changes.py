"""After any change the outputs and gradients are those of a fresh layer: one table.

A row is something that a user can do between two passes. What a layer keeps from one pass to the next (constants of its
weight, row factors) must not be seen in what comes after it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

from dvora import DVoRAAdapter, SharedProjections
from dvora.functional import Vectors
from tests.cases import COPIES, fresh_copy, linear, randn, trained_layer
from tests.reference import worst_error

WIDTH = 6
SIZES = {"few tokens": (4, 3), "many tokens": (70, 3)}
"""Tokens and rank, by which passes are thin or folded."""
MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "training": torch.enable_grad,
    "evaluation": torch.no_grad,
    "inference mode": torch.inference_mode,
}


class Subject:
    """What is changed, and passed through in one mode."""

    def __init__(self, mode: str, tokens: int, rank: int) -> None:
        shared = SharedProjections(3)
        self.model: nn.Module = trained_layer(WIDTH, WIDTH, rank, shared=shared)
        self.mode, self.tokens = mode, tokens
        self.model.train(mode == "training")

    @property
    def layers(self) -> list[DVoRAAdapter]:
        return [module for module in self.model.modules() if isinstance(module, DVoRAAdapter)]

    @property
    def layer(self) -> DVoRAAdapter:
        """The one that is changed."""
        return self.layers[-1]

    @property
    def base(self) -> nn.Linear:
        return self.layer.base_layer

    @property
    def vectors(self) -> list[nn.Parameter]:
        return list(self.layer.vectors)

    def passed(self, model: nn.Module | None = None) -> list[Tensor]:
        """The outputs, and in training the gradients of all that is trained."""
        model = self.model if model is None else model
        with MODES[self.mode]():
            y = model(randn(self.tokens, WIDTH, seed=8, dtype=self.base.weight.dtype))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.mode != "training" or not y.requires_grad:
            return [y]
        return [y, *torch.autograd.grad(y.square().sum(), trained)]

    def fresh(self) -> list[Tensor]:
        """The same by new layers with nothing kept."""
        layers = [fresh_copy(layer).train(layer.training) for layer in self.layers]
        for new, layer in zip(layers, self.layers, strict=True):
            for own, other in zip(new.parameters(), layer.parameters(), strict=True):
                own.requires_grad_(other.requires_grad)
        return self.passed(nn.Sequential(*layers))


def other(vector: Tensor, seed: int = 21) -> Tensor:
    """Values like those of a vector, but different."""
    return vector.detach() * (1.2 + 0.3 * randn(*vector.shape, seed=seed, dtype=vector.dtype).tanh())


def new_weight(s: Subject) -> Tensor:
    return 3 * randn(WIDTH, WIDTH, seed=11, dtype=s.base.weight.dtype)


Change = Callable[[Subject], object]


def of_vectors(change: Callable[[nn.Parameter], object], *indices: int) -> Change:
    @torch.no_grad()
    def on(s: Subject) -> None:
        for index in indices or range(3):
            change(s.vectors[index])

    return on


def step(make: Callable[..., torch.optim.Optimizer], of_base: bool = False, **settings: bool) -> Change:
    """An optimizer's step along gradients from elsewhere, so that no pass trains the vectors in between."""

    def change(s: Subject) -> None:
        parameters = [s.base.weight] if of_base else s.vectors
        s.base.weight.requires_grad_(of_base)
        if of_base:
            s.passed()
        optimizer = make(parameters, lr=0.1, **settings)
        for parameter in parameters:
            parameter.grad = randn(*parameter.shape, seed=5, dtype=parameter.dtype)
        optimizer.step()
        # A fused step is not counted as a write: noticed is that there were gradients, here or in a backward pass.
        s.passed()
        s.model.zero_grad()
        s.base.weight.requires_grad_(False)

    return change


def fused_step(where: str) -> Change:
    """A fused optimizer's step, not counted as a write, with an evaluation somewhere around the backward pass."""

    def evaluate(s: Subject) -> None:
        with torch.no_grad():
            s.model(randn(s.tokens, WIDTH, seed=8))

    def change(s: Subject) -> None:
        optimizer = torch.optim.AdamW(s.vectors, lr=0.1, fused=True)
        loss = s.model(randn(s.tokens, WIDTH, seed=9)).square().sum()
        evaluate(s) if where == "before" else None
        loss.backward()
        evaluate(s) if where == "after" else None
        optimizer.step()
        evaluate(s) if where == "with gradients" else None
        s.model.zero_grad()

    return change


def write_in_inference_mode(tensor: Tensor) -> None:
    with torch.inference_mode():
        tensor.mul_(1.3)


def replace_parameters(s: Subject) -> None:
    for name, vector in s.layer.vectors._asdict().items():
        setattr(s.layer, name, nn.Parameter(other(vector)))


def swap_parameters(s: Subject) -> None:
    for vector in s.vectors:
        torch.utils.swap_tensors(vector, nn.Parameter(other(vector)))


def load(assign: bool) -> Change:
    def change(s: Subject) -> None:
        values = {name: other(value) for name, value in s.model.state_dict().items()}
        s.model.load_state_dict(values, assign=assign)

    return change


def cast(*dtypes: torch.dtype) -> Change:
    def change(s: Subject) -> None:
        for dtype in dtypes:
            s.model.to(dtype)
            s.passed()

    return change


def train_a_step(s: Subject) -> None:
    training = s.model.training
    s.model.train()
    s.model(randn(s.tokens, WIDTH, seed=9, dtype=s.base.weight.dtype)).square().sum().backward()
    torch.optim.SGD(s.vectors, lr=1e-4).step()
    s.model.zero_grad()
    s.model.train(training)


def train_the_base(s: Subject) -> None:
    s.base.weight.requires_grad_()
    s.model(randn(s.tokens, WIDTH, seed=9)).square().sum().backward()
    torch.optim.SGD([s.base.weight], lr=0.001, fused=True).step()
    s.model.zero_grad()
    s.base.weight.requires_grad_(False)


def assign_until_the_address_returns(s: Subject) -> None:
    # An address alone does not identify a weight: freed memory is allocated again.
    address = s.base.weight.data_ptr()
    for factor in range(3, 100):
        s.base.weight.data = factor * new_weight(s)
        if s.base.weight.data_ptr() == address:
            break


def replace_the_base_layer(s: Subject) -> None:
    s.layer.base_layer = linear(WIDTH, WIDTH).requires_grad_(False)
    with torch.no_grad():
        s.base.weight.copy_(new_weight(s))


def through(copied: Callable[[nn.Module], nn.Module]) -> Change:
    """A copy, of which the original is changed after it was made."""

    def change(s: Subject) -> None:
        original, s.model = s.model, copied(s.model)
        with torch.no_grad():
            for parameter in original.parameters():
                parameter.mul_(2)

    return change


def other_modes(s: Subject) -> None:
    x = randn(s.tokens, WIDTH, seed=9)
    for mode in MODES.values():
        for training in (True, False):
            s.model.train(training)
            with mode():
                s.model(x)
    with torch.autocast("cpu", torch.bfloat16):
        s.model(x)
    s.model.train(s.mode == "training")


def an_error_in_a_pass(s: Subject) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        s.model(randn(4, WIDTH, seed=0).long())
    with pytest.raises(ValueError, match="width"):
        s.model(randn(4, WIDTH + 1, seed=0))


def freeze(*names: str) -> Change:
    return lambda s: [s.layer.get_parameter(name).requires_grad_(False) for name in names]


def move_the_layer(s: Subject) -> None:
    values = {name: other(value) for name, value in s.model.state_dict().items()}
    s.model.to("meta").to_empty(device="cpu").load_state_dict(values)


CHANGES: dict[str, Change] = {
    "SGD of vectors, one by one": step(torch.optim.SGD, foreach=False),
    "AdamW of vectors, fused": step(torch.optim.AdamW, fused=True),
    "a fused step after a pass": fused_step("nowhere"),
    "evaluated between pass and backward pass": fused_step("before"),
    "evaluated between pass and step": fused_step("after"),
    "evaluated before gradients are gone": fused_step("with gradients"),
    # Fused steps are not counted as writes: of a weight that was trained in a pass they are noticed all the same
    # (`train_the_base`), of a frozen one they are not.
    "SGD of the base, one by one": step(torch.optim.SGD, True, foreach=False),
    "AdamW of the base, foreach": step(torch.optim.AdamW, True, foreach=True),
    "magnitude": of_vectors(lambda v: v.copy_(other(v)), 0),
    "lambda_b": of_vectors(lambda v: v.copy_(other(v)), 1),
    "lambda_d": of_vectors(lambda v: v.copy_(other(v)), 2),
    "one value": of_vectors(lambda v: v[2].mul_(1.01), 0),
    "in inference mode": of_vectors(write_in_inference_mode, 0),
    "set_parameters": lambda s: s.layer.set_parameters(other(s.layer.get_parameters())),
    **{
        f"data of {name} assigned": of_vectors(lambda v: setattr(v, "data", other(v)), index)
        for index, name in enumerate(Vectors._fields)
    },
    "parameters replaced": replace_parameters,
    "parameters swapped": swap_parameters,
    "vectors in float64": of_vectors(lambda v: setattr(v, "data", other(v).double())),
    "loaded": load(assign=False),
    "loaded with assign": load(assign=True),
    "through the meta device": move_the_layer,
    "no change": lambda s: None,
    "cast to double": cast(torch.float64),
    "cast to bfloat16": cast(torch.bfloat16),
    "cast to bfloat16 and back": cast(torch.bfloat16, torch.float32),
    "trained a step": train_a_step,
    "base in place": torch.no_grad()(lambda s: s.base.weight.copy_(new_weight(s))),
    "one row of the base": torch.no_grad()(lambda s: s.base.weight.view(-1)[:WIDTH].copy_(new_weight(s)[0])),
    "base's data assigned until its address returns": assign_until_the_address_returns,
    "base loaded": lambda s: s.base.load_state_dict({**s.base.state_dict(), "weight": new_weight(s)}),
    "base loaded with assign": lambda s: s.base.load_state_dict(
        {**s.base.state_dict(), "weight": nn.Parameter(new_weight(s), False)}, assign=True
    ),
    "base refreshed after an uncounted write": lambda s: (
        s.base.weight.data.copy_(new_weight(s)),
        s.layer.adapted.refresh(s.base.weight),
    ),
    "bias in place": torch.no_grad()(lambda s: s.base.bias.mul_(2)),
    "base's data assigned": lambda s: setattr(s.base.weight, "data", new_weight(s)),
    "base replaced": lambda s: setattr(s.base, "weight", nn.Parameter(new_weight(s), False)),
    "base layer replaced": replace_the_base_layer,
    "base trained": train_the_base,
    "bias trained": lambda s: s.base.bias.requires_grad_(),
    "magnitude frozen": freeze("magnitude"),
    "all frozen": freeze("magnitude", "lambda_b", "lambda_d"),
    "other modes": other_modes,
    "an error in a pass": an_error_in_a_pass,
    **{name: through(copied) for name, copied in COPIES.items()},
}
SAME_OUTPUTS = {
    *COPIES,
    "no change",
    "cast to double",
    "an error in a pass",
    "other modes",
    "bias trained",
    "magnitude frozen",
    "all frozen",
}
"""Changes that are none of the values."""


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", MODES)
def test_after_a_change_the_pass_is_that_of_a_fresh_layer(mode: str, change: str) -> None:
    for sizes in SIZES.values():
        subject = Subject(mode, *sizes)
        before, *_ = [subject.passed()[0] for _ in range(2)]
        CHANGES[change](subject)
        expected = subject.fresh()
        assert torch.allclose(expected[0].to(before.dtype), before, 1e-4, 1e-5) == (change in SAME_OUTPUTS)
        for _ in range(2):
            found = subject.passed()
            for ours, theirs in zip(found, expected, strict=True):
                assert worst_error(ours, theirs.double()) < (1e-2 if ours.dtype == torch.bfloat16 else 1e-5)
