"""Three layers that read the same inputs, and everything a user can do to them or to the inputs between two passes.

One table of changes for both caches of a layer: the row factors of an evaluation, and the projection of inputs that
siblings share.
"""

import copy
from collections.abc import Callable

import torch
from peft import get_peft_model
from torch import Tensor, nn

from dvora import DVoRAAdapter, DVoRAConfig, SharedProjections
from dvora.tuner import DVoRALayer
from dvora.weight.adapted_weight import AdaptedWeight
from tests.cases import SHARED, linear, randn, trained_layer

IN, RANK, OUTS = 6, 3, (5, 8, 9)
TOKENS = IN
"""A square, so that inputs can be transposed in place."""


class Siblings(nn.Module):
    """Layers of one input, whose outputs are concatenated."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


class Subject:
    """Siblings in evaluation and their inputs; changes of one layer are to the second."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self.x = randn(TOKENS, IN, seed=8)
        self.memory = self.x.numpy()
        """The values of the inputs, as an array that was there before any pass."""

    @property
    def layers(self) -> list[DVoRAAdapter | DVoRALayer]:
        """The adapted ones."""
        return [module for module in self.model.modules() if isinstance(module, DVoRAAdapter | DVoRALayer)]

    @property
    def base(self) -> nn.Linear:
        """The base of the layer that is changed."""
        return self.layers[1].base_layer

    @property
    def adapted(self) -> AdaptedWeight:
        """Its frozen side, of the active adapter."""
        layer = self.layers[1]
        return layer.adapted if isinstance(layer, DVoRAAdapter) else layer.adapted(layer.active_adapters[0])

    @property
    def vectors(self) -> list[nn.Parameter]:
        """Its magnitude, lambda_b, lambda_d."""
        layer = self.layers[1]
        return list(layer.vectors if isinstance(layer, DVoRAAdapter) else layer.vectors(layer.active_adapters[0]))

    def outputs(self, first: int = 0, last: int = 3) -> Tensor:
        """Those of some layers, one after another, for the inputs in the base's dtype."""
        x = self.x.to(self.base.weight.dtype)
        return torch.cat([layer(x) for layer in self.layers[first:last]], -1)

    def evaluated(self) -> Tensor:
        """The outputs of all layers, without gradients."""
        with torch.no_grad():
            return self.outputs()

    def train(self) -> None:
        """A step along the gradients of one pass."""
        self.outputs().square().sum().backward()
        torch.optim.SGD(self.vectors, lr=0.01).step()

    def anew(self) -> "Subject":
        """The same with nothing cached and no matrices in common, so that nothing can be stale or shared."""
        made = Subject(anew(self.model))
        made.x = self.x.detach().clone()
        return made


def anew(model: nn.Module) -> nn.Module:
    """A copy in which all constants are computed from the weights again, and layers share no projections."""
    made = copy.deepcopy(model)
    for layer in made.modules():
        if isinstance(layer, DVoRAAdapter):
            refreshed(layer.adapted, layer.base_layer.weight)
        elif isinstance(layer, DVoRALayer):
            for adapted in map(layer.adapted, layer.dvora_adapted):
                refreshed(adapted, layer.unmerged())
    return made


def refreshed(adapted: AdaptedWeight, weight: Tensor) -> None:
    """Constants from the weight, with a copy of the matrices for this layer alone: in equal memory, for equal bits."""
    adapted.dvora_projections = copy.deepcopy(adapted.shared)
    adapted.refresh(weight)


def plain(**options: object) -> Subject:
    """Three `DVoRAAdapter`s."""
    shared = SharedProjections(SHARED.seed)
    return Subject(Siblings([trained_layer(IN, out, RANK, shared=shared, **options) for out in OUTS]))


def in_peft() -> Subject:
    """The same layers in a PEFT model."""
    config = DVoRAConfig(
        r=RANK,
        target_modules=["0", "1", "2"],
        projection_seed=SHARED.seed,
        projection_init=SHARED.distribution,
    )
    subject = Subject(get_peft_model(Siblings([linear(IN, out) for out in OUTS]), config))
    with torch.no_grad():
        for layer, other in zip(subject.layers, plain().layers, strict=True):
            for own, value in zip(layer.vectors("default"), other.vectors, strict=True):
                own.copy_(value)
    return subject


Change = Callable[[Subject], object]


def other(vector: Tensor, seed: int = 21) -> Tensor:
    """Values like those of a vector, but different."""
    return vector.detach() * (1.2 + 0.3 * randn(*vector.shape, seed=seed, dtype=vector.dtype).tanh())


def new_weight(subject: Subject) -> Tensor:
    """Another weight for the base."""
    weight = subject.base.weight
    return 3 * randn(*weight.shape, seed=11, dtype=weight.dtype)


def new_inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    """Other inputs."""
    return randn(TOKENS, IN, seed=9, dtype=dtype)


def step(parameters: Callable[[Subject], list[nn.Parameter]], make: Callable[..., torch.optim.Optimizer]) -> Change:
    """An optimizer's step along gradients that came from elsewhere, so that no training pass comes in between."""

    def change(subject: Subject) -> None:
        optimizer = make(parameters(subject))
        for parameter in parameters(subject):
            parameter.grad = randn(*parameter.shape, seed=5, dtype=parameter.dtype)
        optimizer.step()

    return change


def of_vectors(change: Callable[[nn.Parameter], object], *indices: int) -> Change:
    """A change of some vectors, without gradients."""

    @torch.no_grad()
    def on(subject: Subject) -> None:
        for index in indices or range(3):
            change(subject.vectors[index])

    return on


def views_of_one_vector(subject: Subject) -> Tensor:
    """Make all vectors views of one."""
    whole = torch.cat([other(vector) for vector in subject.vectors])
    nn.utils.vector_to_parameters(whole, subject.vectors)
    return whole


def write_the_vector_they_view(subject: Subject) -> None:
    """A write that no parameter counts."""
    whole = views_of_one_vector(subject)
    subject.evaluated()
    whole.mul_(1.1)


def replace_parameters(subject: Subject) -> None:
    """New parameters under the same names."""
    ids = {id(vector) for vector in subject.vectors}
    for module in subject.model.modules():
        for name, parameter in list(module._parameters.items()):
            if id(parameter) in ids:
                setattr(module, name, nn.Parameter(other(parameter)))


def load_vectors(assign: bool) -> Change:
    """Other vectors from a state dict."""

    def load(subject: Subject) -> None:
        names = {name for name, parameter in subject.model.named_parameters() if parameter.requires_grad}
        state = {name: other(v) if name in names else v for name, v in subject.model.state_dict().items()}
        subject.model.load_state_dict(state, assign=assign)

    return load


def cast(*dtypes: torch.dtype) -> Change:
    """The whole model, with a pass after each cast."""

    def change(subject: Subject) -> None:
        for dtype in dtypes:
            subject.model.to(dtype)
            subject.evaluated()

    return change


def train_in_training_mode(subject: Subject) -> None:
    """A step between `train()` and `eval()`."""
    subject.model.train()
    subject.train()
    subject.model.eval()


def train_across_an_evaluation(subject: Subject) -> None:
    """An evaluation between the training pass and its step."""
    subject.outputs().square().sum().backward()
    subject.evaluated()
    torch.optim.AdamW(subject.vectors, lr=0.01).step()


def train_base(subject: Subject) -> None:
    """The base by a pass of its own layer."""
    subject.base.weight.requires_grad_()
    subject.outputs().square().sum().backward()
    torch.optim.SGD([subject.base.weight], lr=0.05).step()
    subject.base.weight.requires_grad_(False)


def load_base(assign: bool) -> Change:
    """The base from a state dict."""
    return lambda subject: subject.base.load_state_dict(
        {"weight": new_weight(subject), "bias": randn(OUTS[1], seed=12)}, assign=assign
    )


def of_inputs(change: Callable[[Tensor], object]) -> Change:
    """A change of the inputs."""
    return lambda subject: change(subject.x)


def write_in_inference_mode(tensor: Tensor) -> None:
    """Which PyTorch counts for ordinary tensors."""
    with torch.inference_mode():
        tensor.mul_(3)


OPTIMIZERS = {
    f"{make.__name__} {way}": lambda p, make=make, settings=settings: make(p, lr=0.1, **settings)
    for make in (torch.optim.SGD, torch.optim.AdamW)
    for way, settings in {
        "one by one": {"foreach": False},
        "foreach": {"foreach": True},
        "fused": {"fused": True},
    }.items()
}
CHANGES_OF_LAYERS: dict[str, Change] = {
    **{f"{name} of vectors": step(lambda subject: subject.vectors, make) for name, make in OPTIMIZERS.items()},
    **{f"{name} of the base": step(lambda subject: [subject.base.weight], make) for name, make in OPTIMIZERS.items()},
    "magnitude": of_vectors(lambda v: v.copy_(other(v)), 0),
    "lambda_b": of_vectors(lambda v: v.copy_(other(v)), 1),
    "lambda_d": of_vectors(lambda v: v.copy_(other(v)), 2),
    "one value": of_vectors(lambda v: v[2].mul_(1.001), 0),
    "through detach": of_vectors(lambda v: v.detach().mul_(1.1)),
    "in inference mode": of_vectors(write_in_inference_mode, 0),
    "data in place": of_vectors(lambda v: v.data.copy_(other(v))),
    "NumPy": of_vectors(lambda v: v.detach().numpy().fill(0.7), 0),
    "data assigned": of_vectors(lambda v: setattr(v, "data", other(v))),
    "views of one vector": views_of_one_vector,
    "the vector they view": write_the_vector_they_view,
    "parameters replaced": replace_parameters,
    "vectors loaded": load_vectors(assign=False),
    "vectors loaded with assign": load_vectors(assign=True),
    "cast to double": cast(torch.float64),
    "cast to bfloat16": cast(torch.bfloat16),
    "cast to bfloat16 and back": cast(torch.bfloat16, torch.float32),
    "trained in training mode": train_in_training_mode,
    "trained in evaluation mode": lambda subject: subject.train(),
    "trained across an evaluation": train_across_an_evaluation,
    "base in place": torch.no_grad()(lambda subject: subject.base.weight.copy_(new_weight(subject))),
    "base data assigned": lambda subject: setattr(subject.base.weight, "data", new_weight(subject)),
    "base replaced": lambda subject: setattr(subject.base, "weight", nn.Parameter(new_weight(subject), False)),
    "base trained": train_base,
    "base loaded": load_base(assign=False),
    "base loaded with assign": load_base(assign=True),
}
CHANGES_OF_INPUTS: dict[str, Change] = {
    "add_": of_inputs(lambda x: x.add_(1)),
    "copy_": of_inputs(lambda x: x.copy_(new_inputs())),
    "out": of_inputs(lambda x: torch.mul(x, 3, out=x)),
    "foreach": of_inputs(lambda x: torch._foreach_mul_([x], 3.0)),
    "index_fill_": of_inputs(lambda x: x.index_fill_(0, torch.tensor([1]), 2.0)),
    "item": of_inputs(lambda x: x.__setitem__(slice(1, 3), 0)),
    "set_": of_inputs(lambda x: x.set_(new_inputs())),
    "resize_": of_inputs(lambda x: x.resize_(2, IN)),
    "unsqueeze_": of_inputs(lambda x: x.unsqueeze_(0)),
    "transposed in place": of_inputs(lambda x: x.t_()),
    "relu": of_inputs(lambda x: torch.nn.functional.relu(x, inplace=True)),
    "a view": of_inputs(lambda x: x.view(-1)[3:9].zero_()),
    "inputs in inference mode": of_inputs(write_in_inference_mode),
    "inputs' data assigned": of_inputs(lambda x: setattr(x, "data", new_inputs())),
    "inputs' data in place": of_inputs(lambda x: x.data.mul_(2)),
    "inputs by NumPy": of_inputs(lambda x: x.numpy().fill(0.5)),
    "inputs by an older array": lambda subject: subject.memory.fill(0.5),
    "a view with other strides": lambda subject: setattr(subject, "x", subject.x.T),
    "a view with the same values": lambda subject: setattr(subject, "x", subject.x[:]),
    "detached inputs": lambda subject: setattr(subject, "x", subject.x.detach()),
}
CHANGES = CHANGES_OF_LAYERS | CHANGES_OF_INPUTS
UNCOUNTED = {"data in place", "NumPy", "inputs' data in place", "inputs by NumPy", "inputs by an older array"}
"""Writes that PyTorch does not count."""
SAME_VALUES = {"a view with the same values", "detached inputs"}
