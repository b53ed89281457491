"""A layer in evaluation, plain or in a PEFT model, and everything that can change what it should return."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dvora import DVoRAAdapter, DVoRAConfig
from dvora.method.functional import RowFactors
from dvora.tuner import DVoRALayer
from dvora.weight.adapted_weight import AdaptedWeight
from tests.cases import SHARED, fresh_copy, linear, randn, trained_layer

IN, OUT, RANK = 6, 5, 3
Change = Callable[["Evaluated"], object]


class Evaluated(NamedTuple):
    """A trained layer and the model that it is in."""

    model: nn.Module

    @property
    def layer(self) -> DVoRAAdapter | DVoRALayer:
        """The adapted one."""
        return next(m for m in self.model.modules() if isinstance(m, DVoRAAdapter | DVoRALayer))

    @property
    def base(self) -> nn.Linear:
        """What it adapts."""
        return self.layer.base_layer

    @property
    def adapted(self) -> AdaptedWeight:
        """Its frozen side, of the active adapter."""
        layer = self.layer
        return layer.adapted if isinstance(layer, DVoRAAdapter) else layer.adapted(layer.active_adapters[0])

    @property
    def vectors(self) -> list[nn.Parameter]:
        """Magnitude, lambda_b, lambda_d of the active adapter."""
        layer = self.layer
        return list(layer.vectors if isinstance(layer, DVoRAAdapter) else layer.vectors(layer.active_adapters[0]))

    def x(self) -> Tensor:
        """Inputs."""
        return randn(4, IN, seed=8, dtype=self.base.weight.dtype)

    def outputs(self) -> Tensor:
        """Without gradients."""
        with torch.no_grad():
            return self.model(self.x())

    def factors(self) -> RowFactors | None:
        """What is kept."""
        kept = self.adapted._last._kept
        return None if kept is None else kept.factors

    def fresh(self) -> "Evaluated":
        """The same made anew from the values: nothing in it can be stale."""
        if isinstance(self.model, DVoRAAdapter):
            return Evaluated(fresh_copy(self.model).eval())
        layer, name = self.layer, self.layer.active_adapters[0]
        base = linear(IN, OUT).to(self.base.weight.dtype)
        base.load_state_dict({"weight": layer.unmerged(), "bias": self.base.bias})
        made = _peft_model(base, strength=float(layer.strength(name)))
        with torch.no_grad():
            for own, other in zip(made.vectors, self.vectors, strict=True):
                own.data = other.detach().clone()
        return made


def plain() -> Evaluated:
    """A `DVoRAAdapter`."""
    return Evaluated(trained_layer(IN, OUT, RANK).eval())


def in_peft() -> Evaluated:
    """The only layer of a PEFT model."""
    made = _peft_model(linear(IN, OUT))
    with torch.no_grad():
        for own, other in zip(made.vectors, trained_layer(IN, OUT, RANK).vectors, strict=True):
            own.copy_(other)
    return made


def config(**settings: object) -> DVoRAConfig:
    """Of the adapter in the PEFT model."""
    return DVoRAConfig(**{"r": RANK, "target_modules": ["0"], "projection_seed": SHARED.seed, **settings})


def _peft_model(base: nn.Linear, **settings: object) -> Evaluated:
    model: PeftModel = get_peft_model(nn.Sequential(base), config(**settings))
    return Evaluated(model.eval())


def other(vector: Tensor, seed: int = 21) -> Tensor:
    """Values like those of a vector, but others."""
    return vector.detach() * (1.2 + 0.3 * randn(*vector.shape, seed=seed, dtype=vector.dtype).tanh())


def new_weight(case: Evaluated) -> Tensor:
    """Another weight for the base."""
    return 3 * randn(OUT, IN, seed=11, dtype=case.base.weight.dtype)


def optimizer_step(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Change:
    """A step along gradients that came from elsewhere, so that no training pass comes between."""

    def step(case: Evaluated) -> None:
        optimizer = make(case.vectors)
        for vector in case.vectors:
            vector.grad = randn(*vector.shape, seed=5, dtype=vector.dtype)
        optimizer.step()

    return step


def write_one(index: int) -> Change:
    """One vector in place."""

    @torch.no_grad()
    def write(case: Evaluated) -> None:
        case.vectors[index].copy_(other(case.vectors[index]))

    return write


def write_one_value(case: Evaluated) -> None:
    """A thousandth more in one place."""
    with torch.no_grad():
        case.vectors[0][2] *= 1.001


def write_data(case: Evaluated) -> None:
    """Writes that PyTorch does not count."""
    for vector in case.vectors:
        vector.data.copy_(other(vector))


def write_with_numpy(case: Evaluated) -> None:
    """The same."""
    case.vectors[0].detach().numpy()[1] = 7


def assign_data(case: Evaluated) -> None:
    """Other memory."""
    for vector in case.vectors:
        vector.data = other(vector)


def assign_one_vector(case: Evaluated) -> None:
    """All of them views of one."""
    whole = torch.cat([other(vector) for vector in case.vectors])
    nn.utils.vector_to_parameters(whole, case.vectors)


def write_the_vector_they_view(case: Evaluated) -> None:
    """Writes that no parameter counts."""
    whole = torch.cat([other(vector) for vector in case.vectors])
    nn.utils.vector_to_parameters(whole, case.vectors)
    case.outputs()
    whole.mul_(1.1)


def replace_parameters(case: Evaluated) -> None:
    """New parameters under the same names."""
    ids = {id(vector) for vector in case.vectors}
    for module in case.model.modules():
        for name, parameter in list(module._parameters.items()):
            if id(parameter) in ids:
                setattr(module, name, nn.Parameter(other(parameter)))


def load_vectors(assign: bool) -> Change:
    """Other vectors from a state dict."""

    def load(case: Evaluated) -> None:
        names = {name for name, parameter in case.model.named_parameters() if parameter.requires_grad}
        state = {name: other(v) if name in names else v for name, v in case.model.state_dict().items()}
        case.model.load_state_dict(state, assign=assign)

    return load


def cast(*dtypes: torch.dtype) -> Change:
    """The whole model, and back."""

    def change(case: Evaluated) -> None:
        for dtype in dtypes:
            case.model.to(dtype)
            case.outputs()

    return change


def train(case: Evaluated) -> None:
    """A training pass, a step, and evaluation again."""
    case.model.train()
    case.model(case.x()).square().sum().backward()
    torch.optim.SGD(case.vectors, lr=0.01).step()
    case.model.eval()


def train_in_evaluation_mode(case: Evaluated) -> None:
    """The same without `train()`."""
    case.model(case.x()).square().sum().backward()
    torch.optim.SGD(case.vectors, lr=0.01).step()


def train_across_an_evaluation(case: Evaluated) -> None:
    """An evaluation between the training pass and its step."""
    case.model(case.x()).square().sum().backward()
    case.outputs()
    torch.optim.AdamW(case.vectors, lr=0.01).step()


@torch.no_grad()
def write_base(case: Evaluated) -> None:
    """The base's weight in place."""
    case.base.weight.copy_(new_weight(case))


def assign_base_data(case: Evaluated) -> None:
    """The base's weight in other memory."""
    case.base.weight.data = new_weight(case)


def replace_base_weight(case: Evaluated) -> None:
    """A new parameter."""
    case.base.weight = nn.Parameter(new_weight(case), requires_grad=False)


def load_base(assign: bool) -> Change:
    """The base from a state dict."""
    return lambda case: case.base.load_state_dict(
        {"weight": new_weight(case), "bias": randn(OUT, seed=12)}, assign=assign
    )


def step_base(case: Evaluated) -> None:
    """The base's weight by an optimizer, outside any pass of the layer."""
    case.base.weight.grad = randn(OUT, IN, seed=5)
    torch.optim.AdamW([case.base.weight], lr=0.1).step()


def train_base(case: Evaluated) -> None:
    """The base by a pass of its own layer."""
    case.base.weight.requires_grad_()
    case.model(case.x()).square().sum().backward()
    torch.optim.SGD([case.base.weight], lr=0.05).step()
    case.base.weight.requires_grad_(False)


SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
CHANGES: dict[str, Change] = {
    "SGD one by one": optimizer_step(lambda p: SGD(p, lr=0.1, foreach=False)),
    "SGD foreach": optimizer_step(lambda p: SGD(p, lr=0.1, foreach=True)),
    "SGD fused": optimizer_step(lambda p: SGD(p, lr=0.1, fused=True)),
    "AdamW one by one": optimizer_step(lambda p: AdamW(p, lr=0.1, foreach=False)),
    "AdamW foreach": optimizer_step(lambda p: AdamW(p, lr=0.1, foreach=True)),
    "AdamW fused": optimizer_step(lambda p: AdamW(p, lr=0.1, fused=True)),
    "magnitude": write_one(0),
    "lambda_b": write_one(1),
    "lambda_d": write_one(2),
    **{change.__name__: change for change in (write_one_value, write_data, write_with_numpy, assign_data)},
    **{change.__name__: change for change in (assign_one_vector, write_the_vector_they_view, replace_parameters)},
    "load vectors": load_vectors(assign=False),
    "assign vectors": load_vectors(assign=True),
    "double": cast(torch.float64),
    "bfloat16": cast(torch.bfloat16),
    "bfloat16 and back": cast(torch.bfloat16, torch.float32),
    **{change.__name__: change for change in (train, train_in_evaluation_mode, train_across_an_evaluation)},
    **{
        change.__name__: change for change in (write_base, assign_base_data, replace_base_weight, step_base, train_base)
    },
    "load base": load_base(assign=False),
    "assign base": load_base(assign=True),
}
