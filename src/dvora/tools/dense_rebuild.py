"""Adapted layers built again as dense matrices in float64, from the definition of their method.

    DVoRA   V' = W + diag(c w lambda_b) B A',   A' = diag(lambda_d) A or by groups of columns,   W' = m V' / ||V'||_row
    VeRA    W' = W + diag(lambda_b) B diag(lambda_d) A
    LoRA    W' = W + s B A
    DoRA    V' = W + s B A,                                   W' = m V' / ||V'||_row

Nothing here is fast, and nothing is shared with what it is compared with.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.vera.layer import VeraLayer
from torch import Tensor, nn
from torch.func import functional_call

from ..peft.base_weight import device_of, input_dtype
from ..peft.layer import DVoRALayer
from ..peft.layer_types import LAYER_TYPES
from ..tensors import Float
from ..weight import WeightLayout

Values = Mapping[str, Tensor]
"""Trained parameters by the name of their vector or matrix, in float64."""


@dataclass(frozen=True)
class Term:
    """What one adapter does to a weight.

    Args:
        adapter: its name.
        parameters: the trained ones.
        updated: V' from the values and W.
        magnitude: name of the vector that the rows are rescaled to; None where they are not.
        detached: the norm of V' is a constant for gradients.
        strength: s of `W + s (W' - W)`.
    """

    adapter: str
    parameters: Mapping[str, nn.Parameter]
    updated: Callable[[Values, Tensor], Tensor]
    magnitude: str | None = None
    detached: bool = False
    strength: float = 1.0

    def values(self) -> dict[str, Tensor]:
        """The current trained parameters, in float64."""
        return {name: parameter.double() for name, parameter in self.parameters.items()}

    def delta(self, weight: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
        """`W' - W` in float64, for `weight` W; where autograd records, it has the gradients of the definition."""
        values = self.values()
        updated = self.updated(values, weight)
        if self.magnitude is not None:
            norm = self.norm(weight).detach() if self.detached else self.norm(weight)
            # A gradient through a quotient by zero is no number, even where the quotient is not taken.
            gain = torch.where(norm > 0, values[self.magnitude].flatten() / torch.where(norm > 0, norm, 1.0), 1.0)
            updated = gain[:, None] * updated
        return self.strength * (updated - weight)

    def moves(self, weight: Float[Tensor, "O I"]) -> bool:
        """Whether it changes the weight by more than rounding; values that are no numbers do."""
        precision = max(torch.finfo(parameter.dtype).eps for parameter in self.parameters.values())
        return not bool(self.delta(weight).norm() <= 4 * precision * weight.norm())

    def norm(self, weight: Float[Tensor, "O I"]) -> Float[Tensor, "O"]:
        """Norms of the rows of V'."""
        norms: Tensor = torch.linalg.vector_norm(self.updated(self.values(), weight), dim=1)
        return norms


@dataclass(frozen=True)
class Subject:
    """An adapted layer of a PEFT model.

    Args:
        name: in the model.
        layer: as PEFT wraps it.
        base: the layer that it wraps.
        terms: of the adapters that it has.
        layout: how the base stores its weight; None where its forward is the only way to it.
    """

    name: str
    layer: Any
    base: Any
    terms: tuple[Term, ...]
    layout: WeightLayout | None

    @torch.no_grad()
    def weight(self) -> Float[Tensor, "O I"]:
        """W in float64, as the base computes with it."""
        if self.layout is not None:
            return self.layout.matrix(self.base.weight.detach()).double()
        every = torch.eye(self.base.in_features, device=device_of(self.base), dtype=self.dtype)
        columns: Tensor = self.base(every).double() - self.base(torch.zeros_like(every[:1])).double()
        return columns.T

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs that the base takes."""
        if self.layout is None:
            return input_dtype(self.base)
        dtype: torch.dtype = self.base.weight.dtype
        return dtype

    def make_differentiable(self) -> None:
        """Leave the fast paths of evaluation, through which quantised layers give no gradient."""
        if self.layout is None:
            self.base.train()

    def outputs(self, x: Tensor, weight: Float[Tensor, "O I"]) -> Tensor:
        """The base's outputs with another weight, in float64."""
        x = x.double() if x.is_floating_point() else x
        bias = getattr(self.base, "bias", None)
        wide = None if bias is None else bias.detach().double()
        if self.layout is None:
            return nn.functional.linear(x, weight, wide)
        state = {"weight": self.layout.stored(weight, self.base.weight.shape)}
        y: Tensor = functional_call(self.base, state if wide is None else {**state, "bias": wide}, (x,))
        return y

    def rebuilt(self, weight: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
        """W' of all its terms together."""
        return weight + sum(term.delta(weight) for term in self.terms)


def adapters_of(model: nn.Module, adapters: Sequence[str] | None = None) -> tuple[str, ...]:
    """The names of a model's adapters, or those of them that are asked for.

    Raises:
        TypeError: the model is not of PEFT.
        ValueError: it has no such adapter.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"model must be a PeftModel, got {type(model).__name__}; adapt it with get_peft_model first")
    if unknown := [name for name in adapters or () if name not in model.peft_config]:
        raise ValueError(f"there is no adapter {unknown[0]!r}, only {', '.join(model.peft_config)}")
    return tuple(model.peft_config if adapters is None else adapters)


def subjects(model: nn.Module, adapters: Sequence[str] | None = None) -> tuple[Subject, ...]:
    """The adapted layers of a model that can be rebuilt.

    Args:
        model: adapted with PEFT.
        adapters: by name; None: the active ones.

    Raises:
        ValueError: adapters are merged.
    """
    layers: list[Subject] = []
    for path, layer in model.named_modules():
        for kind, term_of in _METHODS.items():
            if isinstance(layer, kind):
                names = layer.active_adapters if adapters is None else adapters
                terms = tuple(term for name in names if (term := term_of(layer, name)) is not None)
                layers += _subject(path.removeprefix("base_model.model."), layer, terms)
    if any(subject.layer.merged for subject in layers):
        raise ValueError("an adapter is merged into the model; unmerge it first (model.unmerge_adapter())")
    return tuple(layers)


def _subject(name: str, layer: Any, terms: tuple[Term, ...]) -> list[Subject]:
    """The layer; nothing where it has no adapter, is never called, or gives no way to its weight."""
    base = layer.get_base_layer()
    is_dvora = isinstance(layer, DVoRALayer)
    # Parameters and attention's projections are read by the modules around them.
    if not terms or (is_dvora and layer.layer_type.low_rank is None):
        return []
    layout = next((kind.layout for layer_type, kind in LAYER_TYPES.items() if isinstance(base, layer_type)), None)
    if is_dvora:
        layout = layer.layer_type.layout
    weight = base._parameters.get("weight")
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        # It has no weight, or one whose numbers are not what they seem.
        layout = None
    if layout is None and not isinstance(getattr(base, "in_features", None), int):
        return []
    return [Subject(name, layer, base, terms, layout)]


def _dvora(layer: DVoRALayer, adapter: str) -> Term | None:
    if adapter not in layer.dvora_adapted:
        return None
    adapted = layer.adapted(adapter)
    like = torch.empty(0, dtype=torch.float64, device=adapted.w.device)
    parameters = {"magnitude": layer.dvora_magnitude[adapter]}
    if adapted.rank:
        parameters |= {"lambda_b": layer.dvora_lambda_b[adapter], "lambda_d": layer.dvora_lambda_d[adapter]}

    def updated(values: Values, weight: Tensor) -> Tensor:
        if not adapted.rank:
            return weight
        rows = adapted.scaling * values["lambda_b"]
        if adapted.direction == "unit":
            rows = rows * weight.norm(dim=1)
        A, lambda_d = adapted.A(like), values["lambda_d"].view(-1, adapted.rank)
        group = [column * len(lambda_d) // A.shape[1] for column in range(A.shape[1])]
        update: Tensor = rows[:, None] * (adapted.B(like) @ (A * lambda_d[group].T))
        return weight + update

    return Term(adapter, parameters, updated, "magnitude", adapted.detach_norm, layer.strength(adapter))


def _vera(layer: Any, adapter: str) -> Term | None:
    if adapter not in layer.vera_lambda_b:
        return None
    parameters = {"lambda_b": layer.vera_lambda_b[adapter], "lambda_d": layer.vera_lambda_d[adapter]}

    def updated(values: Values, weight: Tensor) -> Tensor:
        A = layer.vera_A[adapter][:, : weight.shape[1]].to(weight)
        B = layer.vera_B[adapter][: weight.shape[0], :].to(weight)
        update: Tensor = values["lambda_b"][:, None] * ((B * values["lambda_d"]) @ A)
        return weight + update

    return Term(adapter, parameters, updated)


def _lora(layer: Any, adapter: str) -> Term | None:
    if adapter in layer.lora_A:
        parameters = {"lora_A": layer.lora_A[adapter].weight, "lora_B": layer.lora_B[adapter].weight}
    elif adapter in layer.lora_embedding_A:
        parameters = {"lora_A": layer.lora_embedding_A[adapter], "lora_B": layer.lora_embedding_B[adapter]}
    else:
        return None
    dora = bool(layer.use_dora.get(adapter))
    if layer.lora_bias.get(adapter) or (dora and adapter in layer.lora_embedding_A):
        return None
    if dora:
        parameters["magnitude"] = layer.lora_magnitude_vector[adapter].weight

    def updated(values: Values, weight: Tensor) -> Tensor:
        product = values["lora_B"].flatten(1) @ values["lora_A"].flatten(1)
        update: Tensor = layer.scaling[adapter] * product
        return weight + update

    # PEFT holds the norm, as section 4.3 of the DoRA paper proposes.
    return Term(adapter, parameters, updated, "magnitude" if dora else None, detached=True)


_METHODS: Mapping[type[Any], Callable[[Any, str], Term | None]] = {
    DVoRALayer: _dvora,
    VeraLayer: _vera,
    LoraLayer: _lora,
}
