"""DVoRAAdapter: one linear layer adapted by DVoRA, for plain PyTorch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..engines.fsdp2 import note_never_gathered
from ..engines.tensor_parallel import local
from ..engines.zero3 import weight_in_memory
from ..matrices.interface import SharedProjections
from ..method.functional import FAR, Direction, Vectors, are_finite
from ..method.small_rows import SmallRows
from ..method.validation import (
    check_bias,
    check_linear,
    checked_d_initial,
    checked_not_negative,
    checked_rank,
    checked_real,
    checked_values,
    checked_vectors,
)
from ..ops.annotations import Float
from ..ops.dtypes import at_least_float32
from ..ops.tracing import is_traced
from .adapted_weight import AdaptedWeight
from .default_projections import default_projections
from .diagnostics import diagnostics
from .last_input import LastInput, add_gradients
from .linear import Update, adapted_linear
from .merge import check_can_be_set, merged_copy
from .updated_linear import takes_updated_weight, updated_linear


class DVoRAAdapter(nn.Module):
    """A linear layer whose weight is adapted by three trained vectors; at the start it is its base, bit for bit.

    Trained are `magnitude` (O,), `lambda_b` (O,) and `lambda_d` (R,), in float32 (float64 for a float64 base) whatever
    the model is cast to. In training mode the layer keeps a reference to each thread's last input for `backward`, until
    a backward pass, the explicit one or autograd's, has reached it. Under checkpointing and other hooks on saved
    tensors, within autograd functions, in inference mode, compiled and under `torch.func` it keeps none.

    Args:
        base_layer: an `nn.Linear`, or a subclass with the same forward, with floating-point weights.
        rank: R, the rank of the update.
        alpha: the update is scaled by `alpha / rank`; None means `rank`.
        freeze_base_layer: train the vectors only. Otherwise the base is trained too and the norm follows it exactly.
        shared: the frozen projections; None takes the process-wide default of `initialize_shared_matrices`.
        direction: the update is added to the "unit" rows `W / ||W||` or to the "weight" itself (DoRA).
        d_initial: starting value of `lambda_d`; 0.1 in the VeRA paper.
        detach_norm: leave the gradient through the norm out (DoRA, section 4.3).

    Raises:
        TypeError: the base layer's type is not supported, its forward is not that of `nn.Linear`, it already carries
            an adapter, or its weight is not floating.
        ValueError: the base is empty, on the meta device or not finite, a hyperparameter is out of range, or the
            shared matrices are not initialized.
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
        if isinstance(base_layer, DVoRAAdapter):
            raise TypeError("base_layer already carries a DVoRA adapter; pass its base_layer, or merge it first")
        check_linear(base_layer)
        check_bias(local(base_layer.bias), type(base_layer).__name__)
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
                note_never_gathered(self.get_parameter(name))
        # Now, since a traced graph of the layer cannot search for them.
        self.adapted.small_rows(base_layer.bias)
        self.base_layer = base_layer
        self.freeze_base_layer = freeze_base_layer
        base_layer.requires_grad_(not freeze_base_layer)
        self._last_input: LastInput | None = None
        self._before_load: list[tuple[nn.Module, str, nn.Parameter, Tensor]] = []
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
        """Number of trained parameters: `2 O + R`, plus the base's when it is not frozen."""
        return sum(parameter.numel() for parameter in self._trained())

    def forward(self, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        """`x W'^T + bias`, in the dtype of the base layer's output.

        Raises:
            ValueError: the last dimension of `x` is not the layer's `in_features`.
        """
        held = weight_in_memory(self.base_layer, "weight")
        width = self.adapted.in_features if held is None else local(held).shape[1]
        if x.dim() == 0 or x.shape[-1] != width:
            raise ValueError(
                f"expected inputs of width {width} (the base layer's in_features), got shape {tuple(x.shape)}"
            )
        if is_traced():
            if self._last_input is not None:
                self._last_input = None
            return self._outputs(x)
        last_input = self._last_input = self._last_input or LastInput()
        last_input.forget()
        y = self._outputs(x)
        if self.training:
            last_input.keep(x, y, self._tensors())
        return y

    def backward(self, output_gradient: Float[Tensor, "*T O"]) -> Float[Tensor, "*T I"]:
        """The explicit backward pass: add to the `.grad` of all trained parameters what autograd would.

        It runs under the autocast of the forward pass. Parameters that do not require gradients get none.

        Args:
            output_gradient: gradient of the loss with respect to the outputs of this thread's last `forward`.

        Returns:
            The gradient with respect to that forward's inputs, in their dtype.

        Raises:
            RuntimeError: no `forward` in training mode came before whose input was kept, or the input or a parameter
                was written to since.
            TypeError, ValueError: `output_gradient` is no real tensor of the shape of the last outputs.
        """
        last_input = self._last_input or LastInput()
        last = last_input.of_this_thread(self._tensors())
        expected = (*last.x.shape[:-1], self.adapted.out_features)
        if checked_real(output_gradient, "output_gradient").shape != expected:
            raise ValueError(
                f"output_gradient has shape {tuple(output_gradient.shape)}, the last outputs had {expected}"
            )
        trained = [parameter for parameter in self._trained() if parameter.requires_grad]
        inputs_gradient, *gradients = last.gradients(self._outputs, output_gradient, trained)
        assert inputs_gradient is not None
        add_gradients(trained, gradients)
        last_input.forget()
        return inputs_gradient

    @torch.no_grad()
    def update_parameters(self, learning_rate: float) -> None:
        """One step of plain SGD on all trained parameters, after which their gradients are cleared.

        Raises:
            ValueError: `learning_rate` is not finite or negative.
            RuntimeError: no parameter has a gradient.
        """
        checked_not_negative(learning_rate, "learning_rate")
        steps = {p: p.grad for p in self._trained() if p.requires_grad and p.grad is not None}
        if not steps:
            raise RuntimeError("no gradients to step along: call backward first")
        # One call, so that an interruption finds all parameters before the step or all after it.
        torch._foreach_sub_([*steps], [*steps.values()], alpha=learning_rate)
        for parameter in self._trained():
            parameter.grad = None

    def get_parameters(self) -> Float[Tensor, "N"]:
        """All trained parameters copied into one vector: magnitude, lambda_b, lambda_d, the base's if not frozen."""
        return torch.cat([parameter.detach().flatten() for parameter in self._trained()])

    @torch.no_grad()
    def set_parameters(self, parameters: Float[Tensor, "N"]) -> None:
        """Set all trained parameters from one vector, in the order of `get_parameters`.

        Raises:
            TypeError: it is no real tensor.
            ValueError: it has not `parameter_count` values, or one is not finite in its parameter's dtype.
        """
        own = self._trained()
        values = checked_values(parameters, own)
        # One call, so that an interruption finds all old values or all new ones.
        torch._foreach_copy_([*own], values)

    def reset_state(self) -> None:
        """Forget the last inputs and all gradients; the trained parameters stay."""
        self._last_input = None
        for parameter in self._trained():
            parameter.grad = None

    @torch.no_grad()
    def merge_to_original_layer(self) -> nn.Linear:
        """A new layer of the base's class with the merged weight; this adapter is not changed.

        Raises:
            TypeError: the base computes its weight in every pass (a parametrization).
            ValueError: the merged weight is not finite.

        Warns:
            MergePrecisionWarning: rounding to the base's dtype loses more than a small part of the update.
        """
        base = self.base_layer
        check_can_be_set(base, "weight", self.adapted.name)
        return merged_copy(base, self.adapted.delta(self.vectors, base.weight), self.adapted.name)

    def diagnostics(self) -> dict[str, float | int | str]:
        """How far training has moved the weight, as plain numbers.

        Mean and largest norm ratio n / w, angle between old and new rows (degrees) and distance of the gain from one;
        the share of rows near cancellation (n**2 < 1e-3 w**2) and of zero rows; parameter count, dtypes and device.
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
        base, weight = self.base_layer, weight_in_memory(self.base_layer, "weight")
        vectors = self.adapted.local(self.vectors, weight)
        update = Update.of(self.adapted, vectors, weight)
        rows = self.adapted.small_rows(base.bias)
        small = None if rows is None else SmallRows(rows, None if weight is None else linear(x, weight[rows]))
        if small is None and takes_updated_weight(base, x, self.shared.impl):
            return updated_linear(update, base, x)
        return adapted_linear(update, base(x), x, base.bias, small)

    def _tensors(self) -> Iterator[Tensor]:
        """All parameters; iterating `parameters()` would take as long as a small layer's forward."""
        for module in (self, self.base_layer):
            yield from (parameter for parameter in module._parameters.values() if parameter is not None)

    def _trained(self) -> list[nn.Parameter]:
        vectors = [self.magnitude, self.lambda_b, self.lambda_d]
        return vectors if self.freeze_base_layer else [*vectors, *self.base_layer.parameters()]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Check everything before anything is copied: PyTorch would stop half-way.
        vectors = checked_vectors(state_dict, prefix, self.named_parameters(), self.adapted.extra_repr())
        state_dict |= vectors
        # Only then, since copies take as much memory as the layer; `_finish_load` runs once the base is loaded too.
        far = any(not value.is_meta and value.abs().max() > FAR for value in vectors.values())
        self._before_load = self._as_it_is() if far else []
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _as_it_is(self) -> list[tuple[nn.Module, str, nn.Parameter, Tensor]]:
        """Every parameter with its module and name, and a copy of its values."""
        return [
            (module, name, parameter, parameter.detach().clone())
            for module in (self, self.base_layer)
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    @torch.no_grad()
    def _finish_load(self) -> None:
        """Recompute the constants of the loaded base, and undo the load if the factors are not finite.

        Raises:
            ValueError: they are not.
        """
        before, self._before_load = self._before_load, []
        weight = self.base_layer.weight
        self.adapted.refresh_after_load(weight)
        if not before or are_finite(self.adapted.factors(self.vectors, weight)):
            return
        for module, name, parameter, values in before:
            parameter.copy_(values)
            module._parameters[name] = parameter
        self.adapted.refresh_after_load(self.base_layer.weight)
        raise ValueError(
            f"{self.adapted.name}: magnitude, lambda_b and lambda_d in the state dict are so large that outputs would "
            "not be finite; their training diverged: go back to an earlier checkpoint"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DVoRAAdapter":
        dtype = self.base_layer.weight.dtype
        self._last_input = None
        if recurse:
            for child in self.children():
                child._apply(fn)
        super()._apply(at_least_float32(fn), recurse=False)
        # A cast changes the base's values, which a graph that is compiled next could not detect.
        if self.base_layer.weight.dtype != dtype:
            self.adapted.refresh_if_stale(self.base_layer.weight)
        return self


def _follow_loaded_base(layer: nn.Module, _: object) -> None:
    assert isinstance(layer, DVoRAAdapter)
    layer._finish_load()
