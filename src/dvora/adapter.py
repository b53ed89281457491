"""DVoRAAdapter: one linear layer adapted by DVoRA, for plain PyTorch; and the process-wide matrices that it may use."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional as F
from .checks import (
    check_bias,
    check_linear,
    checked_d_initial,
    checked_not_negative,
    checked_rank,
    checked_real,
    checked_values,
    checked_vectors,
)
from .factors import delta_weight, relative_factors
from .functional import Direction, Vectors
from .layer import adapted_linear
from .matrices.interface import SharedProjections
from .tensors import (
    Float,
    at_least_float32,
    autocast_dtype,
    full_precision,
    grad_recorded,
    is_traced,
    local,
    saved_tensors_are_hooked,
    version_of,
    weight_in_memory,
)
from .weight import AdaptedWeight, check_can_be_set, merged_copy


class DVoRAAdapter(nn.Module):
    """A linear layer whose weight is adapted by three trained vectors; at the start it is its base, bit for bit.

    Trained are `magnitude` (O,), `lambda_b` (O,) and `lambda_d` (R,), by groups (G, R), in float32 (float64 for a
    float64 base) whatever the model is cast to. In training mode the layer keeps a reference to each thread's last
    input for `backward`, until a backward pass, the explicit one or autograd's, has reached it. Under checkpointing and
    other hooks on saved tensors, within autograd functions, in inference mode, compiled and under `torch.func` it keeps
    none.

    Args:
        base_layer: an `nn.Linear`, or a subclass with the same forward, with floating-point weights.
        rank: R, the rank of the update.
        alpha: the update is scaled by `alpha / rank`; None means `rank`.
        freeze_base_layer: train the vectors only. Otherwise the base is trained too and the norm follows it exactly.
        shared: the frozen projections; None takes the process-wide default of `initialize_shared_matrices`.
        direction: the update is added to the "unit" rows `W / ||W||` or to the "weight" itself (DoRA).
        d_initial: starting value of `lambda_d`; 0.1 in the VeRA paper.
        detach_norm: leave the gradient through the norm out (DoRA, section 4.3).
        lambda_d_groups: G, groups of consecutive inputs with a `lambda_d` each: a small rank then scores as a high one.

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
        lambda_d_groups: int = 1,
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
            groups=lambda_d_groups,
            name=f"{type(base_layer).__name__}({base_layer.in_features}, {base_layer.out_features})",
        )
        with torch.inference_mode(False):
            for name, value in self.adapted.initial_vectors(checked_d_initial(d_initial))._asdict().items():
                self.register_parameter(name, nn.Parameter(value))
        self.base_layer = base_layer
        self.freeze_base_layer = freeze_base_layer
        base_layer.requires_grad_(not freeze_base_layer)
        self._last = _LastOfThread()
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
        """Number of trained parameters: `2 O + G R`, plus the base's when it is not frozen."""
        return sum(parameter.numel() for parameter in self._trained())

    def forward(self, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        """`x W'^T + bias`, in the dtype of the base layer's output.

        Raises:
            ValueError: the last dimension of `x` is not the layer's `in_features`.
        """
        weight = weight_in_memory(self.base_layer, "weight")
        width = self.adapted.in_features if weight is None else local(weight).shape[1]
        if x.dim() == 0 or x.shape[-1] != width:
            raise ValueError(
                f"expected inputs of width {width} (the base layer's in_features), got shape {tuple(x.shape)}"
            )
        y = self._outputs(x)
        if is_traced():
            return y
        self._last.kept = []
        if self.training and not _saving_intercepted():
            kept = self._last.kept = [_Last(x, autocast_dtype(x.device), self._state(x))]
            if y.grad_fn is not None:
                y.grad_fn.register_prehook(lambda _: kept.clear())
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
        if not self._last.kept:
            raise RuntimeError(
                "no input is kept for backward: call the layer first, in training mode, neither compiled nor "
                "checkpointed; one forward serves one backward, the explicit one or autograd's"
            )
        x, autocast, state = self._last.kept[0]
        if self._state(x) != state:
            raise RuntimeError("the input or a parameter was changed since the last forward: call the layer again")
        expected = (*x.shape[:-1], self.adapted.out_features)
        if checked_real(output_gradient, "output_gradient").shape != expected:
            raise ValueError(
                f"output_gradient has shape {tuple(output_gradient.shape)}, the last outputs had {expected}"
            )
        trained = [parameter for parameter in self._trained() if parameter.requires_grad]
        with torch.inference_mode(False), torch.enable_grad():
            # Autograd cannot record inference tensors.
            x = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
            with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
                y = self._outputs(x)
            with full_precision(x.device):
                found = torch.autograd.grad(y, [x, *trained], output_gradient.to(y.dtype), allow_unused=True)
        _add_gradients(trained, found[1:])
        self._last.kept = []
        return found[0]

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
        self._last = _LastOfThread()
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
        return merged_copy(base, delta_weight(self.adapted, self.vectors, base.weight), self.adapted.name)

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
            self._last = _LastOfThread()
        return super().train(mode)

    def _outputs(self, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        weight = weight_in_memory(self.base_layer, "weight")
        return adapted_linear(self.base_layer, x, weight, self.adapted, self.adapted.local(self.vectors, weight))

    def _state(self, x: Tensor) -> list[tuple[int, int]]:
        """The input and all parameters, and their versions; iterating `parameters()` would take long."""
        tensors = [x, *self._parameters.values(), *self.base_layer._parameters.values()]
        return [(id(tensor), version_of(tensor)) for tensor in tensors if tensor is not None]

    def _trained(self) -> list[nn.Parameter]:
        vectors = [self.magnitude, self.lambda_b, self.lambda_d]
        return vectors if self.freeze_base_layer else [*vectors, *self.base_layer.parameters()]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Check everything before anything is copied: PyTorch would stop half-way.
        vectors = checked_vectors(state_dict, prefix, self.named_parameters(), self.adapted.extra_repr())
        state_dict |= vectors
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DVoRAAdapter":
        dtype = self.base_layer.weight.dtype
        self._last = _LastOfThread()
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
    layer.adapted.refresh_after_load(layer.base_layer.weight)


class _Last(NamedTuple):
    """A forward pass, and the state that must be unchanged when its input is used again."""

    x: Tensor
    autocast: torch.dtype | None
    state: list[tuple[int, int]]


class _LastOfThread(threading.local):
    """The last pass of a thread in training mode, until a backward pass reaches it."""

    def __init__(self) -> None:
        self.kept: list[_Last] = []

    def __reduce__(self) -> "tuple[type[_LastOfThread], tuple[()]]":
        return _LastOfThread, ()


_adding = threading.Lock()


def _add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add to `.grad`, under a lock, since other threads may do so too."""
    with torch.inference_mode(False), _adding:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _saving_intercepted() -> bool:
    """Whether surrounding code manages what is saved for a backward pass, or no backward pass will come.

    Checkpointing and offloading intercept what autograd saves; an autograd function (reentrant checkpointing) runs its
    forward pass unrecorded; both may run it again during a backward pass. In inference mode nothing is saved.
    """
    if grad_recorded():
        return saved_tensors_are_hooked() or torch._C._current_graph_task_id() != -1
    # An autograd function and inference mode switch forward-mode differentiation off; no_grad does not.
    return not torch._C._is_fwd_grad_enabled()


@torch.no_grad()
def diagnostics(adapted: AdaptedWeight, vectors: Vectors, weight: Tensor | None) -> dict[str, float]:
    """Norm ratios, angles (degrees) and gains of the adapted rows, shares of rows at risk, and bytes of constants.

    Args:
        adapted: the frozen side.
        vectors: the trained vectors.
        weight: as stored, or None.
    """
    if weight is not None:
        adapted.refresh_if_stale(weight)
    w = adapted.w
    vectors = vectors.to(w.dtype)
    with full_precision(w.device):
        _, cross, q = adapted.terms(vectors.lambda_d)
        factors = relative_factors(vectors.magnitude, vectors.lambda_b, cross, q, adapted.row_constants)
        s, g1 = factors.inverse.reciprocal(), (factors.gain - 1).abs()
        angle = F.row_angle(factors.kappa, cross, q).rad2deg()
    metrics = {
        "norm_ratio_mean": s.mean(),
        "norm_ratio_max": s.max(),
        "angle_degrees_mean": angle.mean(),
        "angle_degrees_max": angle.max(),
        "gain_distance_mean": g1.mean(),
        "gain_distance_max": g1.max(),
        "near_cancellation_share": (s.square() < 1e-3).to(s.dtype).mean(),
        "zero_row_share": (w == 0).to(s.dtype).mean(),
    }
    return {**{name: float(value) for name, value in metrics.items()}, "constant_bytes": w.nbytes + adapted.C.nbytes}


_lock = threading.Lock()
_default: SharedProjections | None = None


def initialize_shared_matrices(input_size: int, output_size: int, rank: int, seed: int | None = None) -> None:
    """Create the process-wide default `A` and `B`, used by every `DVoRAAdapter` that is given no `shared`.

    They grow as larger layers come; existing layers keep the matrices they were created with.

    Args:
        input_size: largest number of input features expected.
        output_size: largest number of output features expected.
        rank: largest rank expected.
        seed: names the matrices; None means 0.

    Raises:
        TypeError: a size or the seed is not an integer.
        ValueError: a size is not positive or the seed is out of range.
    """
    global _default
    for name, size in (("input_size", input_size), ("output_size", output_size)):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be a positive integer, got {size!r} of type {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size}")
    matrices = SharedProjections(seed=0 if seed is None else seed)
    matrices.reserve(checked_rank(rank), input_size, output_size)
    with _lock:
        _default = matrices


def are_shared_matrices_initialized() -> bool:
    """Whether the process-wide default projections exist."""
    with _lock:
        return _default is not None


def reset_shared_matrices() -> None:
    """Forget the process-wide default projections; existing layers keep theirs."""
    global _default
    with _lock:
        _default = None


def default_projections(input_size: int, output_size: int, rank: int) -> SharedProjections:
    """The process-wide default, for a layer of the given size.

    Raises:
        ValueError: it was not initialized.
    """
    with _lock:
        if _default is None:
            raise ValueError(
                "the shared matrices are not initialized: call dvora.initialize_shared_matrices("
                f"input_size={input_size}, output_size={output_size}, rank={rank}) first, "
                "or pass shared=dvora.SharedProjections(seed=0)"
            )
        return _default
