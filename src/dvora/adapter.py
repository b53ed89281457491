"""DVoRAAdapter: one linear layer adapted by DVoRA, for plain PyTorch."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .adapted_weight import AdaptedWeight
from .diagnostics import diagnostics
from .functional import Direction, Vectors
from .layouts import weight_at_hand
from .linear_outputs import combined, from_updated_weight, small_rows_of
from .merging import check_can_be_set, merge, warn_of_losses
from .parts import local
from .precision import at_least_float32
from .projections import SharedProjections
from .routes import takes_updated_weight
from .shapes import Float
from .shared import default_projections
from .validation import checked_d_initial, checked_not_negative, checked_rank

_VECTORS = Vectors._fields


class DVoRAAdapter(nn.Module):
    """A linear layer whose weight is adapted by three trained vectors; at the start it is its base, bit for bit.

    Trained are `magnitude` (O,), `lambda_b` (O,) and `lambda_d` (R,), in float32 (float64 for a float64 base) whatever
    the model is cast to. In training mode the layer keeps a reference to its last input for `backward`; `eval()`,
    `backward` and `reset_state` drop it.

    Args:
        base_layer: an `nn.Linear` with floating-point weights.
        rank: R, the rank of the update.
        alpha: the update is scaled by `alpha / rank`; None means `rank`.
        freeze_base_layer: train the vectors only. Otherwise the base is trained too and the norm follows it exactly.
        shared: the frozen projections; None takes the process-wide default of `initialize_shared_matrices`.
        direction: the update is added to the "unit" rows `W / ||W||` or to the "weight" itself (DoRA).
        d_initial: starting value of `lambda_d`; 0.1 in the VeRA paper.
        detach_norm: leave the gradient through the norm out (DoRA, section 4.3).

    Raises:
        TypeError: the base layer's type is not supported, it already carries an adapter, or its weight is not floating.
        ValueError: the base is on the meta device or not finite, a hyperparameter is out of range, or the shared
            matrices are not initialized.
    """

    magnitude: nn.Parameter
    lambda_b: nn.Parameter
    lambda_d: nn.Parameter

    def __init__(
        self,
        base_layer: nn.Linear,
        rank: int,
        alpha: float | None = None,
        freeze_base_layer: bool = True,
        *,
        shared: SharedProjections | None = None,
        direction: Direction = "unit",
        d_initial: float = 0.1,
        detach_norm: bool = False,
    ) -> None:
        super().__init__()
        _check_base_layer(base_layer)
        if shared is None:
            shared = default_projections(base_layer.in_features, base_layer.out_features, rank)
        self.adapted = AdaptedWeight(
            base_layer.weight,
            checked_rank(rank),
            shared=shared,
            alpha=alpha,
            direction=direction,
            detach_norm=detach_norm,
            name=f"{type(base_layer).__name__}({base_layer.in_features}, {base_layer.out_features})",
        )
        with torch.inference_mode(False):
            for name, value in self.adapted.initial_vectors(checked_d_initial(d_initial))._asdict().items():
                self.register_parameter(name, nn.Parameter(value))
        # Now, for a graph that is made of the layer cannot look for them.
        self.adapted.small_rows(base_layer.bias)
        self.base_layer = base_layer
        self.freeze_base_layer = freeze_base_layer
        base_layer.requires_grad_(not freeze_base_layer)
        self._last_input: Tensor | None = None
        self.register_load_state_dict_post_hook(_follow_loaded_base)

    @property
    def vectors(self) -> Vectors:
        """The trained vectors: magnitude, lambda_b, lambda_d."""
        return Vectors(self.magnitude, self.lambda_b, self.lambda_d)

    @property
    def rank(self) -> int:
        """R, the rank of the update."""
        return self.adapted.rank

    @property
    def alpha(self) -> float:
        """The update is scaled by `alpha / rank`."""
        return self.adapted.alpha

    @property
    def shared(self) -> SharedProjections:
        """The frozen projections of this layer."""
        return self.adapted.shared

    @property
    def parameter_count(self) -> int:
        """Number of trained values: `2 O + R`, plus the base's own when it is not frozen."""
        return sum(parameter.numel() for _, parameter in self._trained())

    def forward(self, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        """`x W'^T + bias`, in the dtype of the base layer's output.

        Raises:
            ValueError: the last dimension of `x` is not the layer's `in_features`.
        """
        held = weight_at_hand(self.base_layer, "weight")
        width = self.adapted.in_features if held is None else local(held).shape[1]
        if x.dim() == 0 or x.shape[-1] != width:
            raise ValueError(
                f"expected inputs of width {width} (the base layer's in_features), got shape {tuple(x.shape)}"
            )
        if not torch.compiler.is_compiling():
            self._last_input = x.detach() if self.training else None
        return self._outputs(x)

    def backward(self, output_gradient: Float[Tensor, "*T O"]) -> Float[Tensor, "*T I"]:
        """The explicit backward pass: add to the `.grad` of all trained values what autograd would.

        Args:
            output_gradient: gradient of the loss with respect to the outputs of the last `forward`.

        Returns:
            The gradient with respect to that forward's inputs, in their dtype.

        Raises:
            RuntimeError: no `forward` in training mode came before.
            ValueError: `output_gradient` has another shape than the last outputs.
        """
        x = self._last_input
        if x is None:
            raise RuntimeError("backward needs a forward before it: call the layer in training mode first")
        expected = (*x.shape[:-1], self.adapted.out_features)
        if output_gradient.shape != expected:
            raise ValueError(
                f"output_gradient has shape {tuple(output_gradient.shape)}, the last outputs had {expected}"
            )
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = self._outputs(x)
        parameters = [parameter for _, parameter in self._trained()]
        inputs_gradient, *gradients = torch.autograd.grad(y, [x, *parameters], output_gradient.to(y.dtype))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._last_input = None
        return inputs_gradient

    @torch.no_grad()
    def update_parameters(self, learning_rate: float) -> None:
        """One step of plain SGD on all trained values, after which their gradients are cleared.

        Raises:
            ValueError: `learning_rate` is not finite or negative.
            RuntimeError: no gradient is there.
        """
        checked_not_negative(learning_rate, "learning_rate")
        if all(parameter.grad is None for _, parameter in self._trained()):
            raise RuntimeError("no gradients to step along: call backward first")
        for _, parameter in self._trained():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=learning_rate)
                parameter.grad = None

    def get_parameters(self) -> Float[Tensor, "N"]:
        """A copy of all trained values as one vector: magnitude, lambda_b, lambda_d, then the base's if not frozen."""
        return torch.cat([parameter.detach().flatten() for _, parameter in self._trained()])

    @torch.no_grad()
    def set_parameters(self, parameters: Float[Tensor, "N"]) -> None:
        """Set all trained values from one vector, in the order of `get_parameters`.

        Raises:
            ValueError: it has not `parameter_count` values, or one is not finite.
        """
        if parameters.shape != (self.parameter_count,):
            raise ValueError(
                f"parameters must have shape ({self.parameter_count},) for this layer, got {tuple(parameters.shape)}"
            )
        if not parameters.isfinite().all():
            raise ValueError("parameters must be finite, got NaN or infinity")
        start = 0
        for _, parameter in self._trained():
            parameter.copy_(parameters[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()

    def reset_state(self) -> None:
        """Forget the last input and all gradients; the trained values stay."""
        self._last_input = None
        for _, parameter in self._trained():
            parameter.grad = None

    @torch.no_grad()
    def merge_to_original_layer(self) -> nn.Linear:
        """A new layer of the base's own class with the merged weight; this adapter stays as it is.

        Raises:
            TypeError: the base computes its weight (a parametrization), so that none can be set.

        Warns:
            MergePrecisionWarning: the base's dtype swallows a considerable part of the update.
        """
        base = self.base_layer
        check_can_be_set(base, "weight", self.adapted.name)
        merged = merge(base.weight, self.adapted.delta(self.vectors, base.weight))
        warn_of_losses({self.adapted.name: merged.lost}, base.weight.dtype)
        layer = copy.deepcopy(base)
        layer.weight.copy_(merged.weight)
        return layer

    def diagnostics(self) -> dict[str, float | int | str]:
        """How far training has moved the weight, as plain numbers.

        Mean and largest norm ratio n / w, angle between old and new rows (degrees) and distance of the gain from one;
        the share of rows near cancellation (n**2 < 1e-3 w**2) and of zero rows; trained values, dtypes and device.
        """
        return {
            **diagnostics(self.adapted, self.vectors, self.base_layer.weight),
            "parameter_count": self.parameter_count,
            "dtype": str(self.magnitude.dtype),
            "base_dtype": str(self.base_layer.weight.dtype),
            "device": str(self.magnitude.device),
        }

    def extra_repr(self) -> str:
        return f"trained={self.parameter_count}, freeze_base_layer={self.freeze_base_layer}"

    def train(self, mode: bool = True) -> "DVoRAAdapter":
        """Switch to training mode, or to evaluation, which forgets the last input."""
        if not mode:
            self._last_input = None
        return super().train(mode)

    def _outputs(self, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        base, weight = self.base_layer, weight_at_hand(self.base_layer, "weight")
        vectors = self.adapted.local(self.vectors, weight)
        factors = self.adapted.row_factors(vectors, weight)
        small = small_rows_of(self.adapted, x, weight, base.bias)
        if small is None and takes_updated_weight(base, x, self.shared.kind):
            return from_updated_weight(self.adapted, base, x, vectors.lambda_d, factors)
        return combined(self.adapted, base(x), x, vectors.lambda_d, factors, base.bias, small)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name in _VECTORS:
            yield name, self.get_parameter(name)
        if not self.freeze_base_layer:
            yield from self.base_layer.named_parameters(prefix="base_layer")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Everything is checked before anything is copied: torch would stop half-way.
        for name, own in self.named_parameters():
            loaded = state_dict.get(prefix + name)
            if loaded is None:
                continue
            if loaded.shape != own.shape:
                raise ValueError(
                    f"{prefix}{name} has shape {tuple(loaded.shape)} in the state dict, {tuple(own.shape)} in the "
                    f"layer ({self.adapted.extra_repr()}); sizes and rank cannot be changed by loading"
                )
            if name in _VECTORS:
                if not loaded.is_meta and not loaded.isfinite().all():
                    raise ValueError(f"{prefix}{name} has values that are not finite in the state dict")
                state_dict[prefix + name] = loaded.to(own.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DVoRAAdapter":
        dtype = self.base_layer.weight.dtype
        if recurse:
            for child in self.children():
                child._apply(fn)
        super()._apply(at_least_float32(fn), recurse=False)
        # A cast changes the base's values, and a graph compiled next cannot notice.
        if self.base_layer.weight.dtype != dtype:
            self.adapted.follow(self.base_layer.weight)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last_input": None}


def _follow_loaded_base(layer: nn.Module, _: object) -> None:
    assert isinstance(layer, DVoRAAdapter)
    layer.adapted.follow_loaded(layer.base_layer.weight)


def _check_base_layer(base_layer: nn.Module) -> None:
    if isinstance(base_layer, DVoRAAdapter):
        raise TypeError("base_layer already carries a DVoRA adapter; pass its base_layer, or merge it first")
    if not isinstance(base_layer, nn.Linear):
        raise TypeError(f"base_layer of type {type(base_layer).__name__} is not supported; supported: torch.nn.Linear")
