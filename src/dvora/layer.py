"""The forward of a linear layer with an adapter: from x to y, and back.

There are three computations. `functional` defines all of them; which one runs is decided by `folds` and `is_traced`.

| computation | when | passes over tokens beyond the base's, forward + backward | formed or kept |
|---|---|---|---|
| definition | compiled, exported, under `torch.func`; a trained or sharded weight | - | PyTorch differentiates it |
| folded | training, `folds`: enough tokens in a plain linear layer | 0 + 1 | W'', y, z |
| thin | all else: evaluation, few tokens, half precision, each row of a batch its own adapter | 3 + 6 | y_b, z |

Folded, with `g` and `scale` of `factors`:

    W'' = diag(g) W + U A,   U = diag(scale) B diag(lambda_d)          y = x W''^T + bias
    dL/dx = dy W'',   dL/dU = dy^T z,   sum_t dy (y - bias) for dL/dg

Thin:

    y = y_b + (g - 1) (y_b - bias) + scale low        y_b = x W^T + bias,   z = x A^T,   low = (z lambda_d) B^T
    dL/dy_b = g dy,   h = (dy scale) B,   dL/dz = h lambda_d,   dL/dlambda_d = sum_t h z
    dL/d(g - 1) = sum_t dy (y_b - bias),   dL/dscale = sum_t dy low

Where every row of a batch has an adapter of its own, the formulas are the same: factors then have a value for each row,
and sums go over the tokens of a row.

Dimensions: T tokens, B rows of a batch, I in, O out, R rank; of a sharded weight, those of this process's shard.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from . import functional as F
from .factors import Factors, current_pass
from .matrices.interface import Matrices
from .tensors import (
    Float,
    as_dtype,
    autocast_dtype,
    bias_of,
    full_precision,
    grad_recorded,
    is_traced,
    local,
    saved_tensors_are_hooked,
    without_autocast,
)
from .weight import AdaptedWeight

FOLD_TOKENS = 8
"""Tokens for each rank from which on folding pays: `dy^T z` and `U A` cost more the higher the rank."""
FOLD_TIMES = 64
"""The same where thin products cost little whatever the rank: as many times the inputs as 64 is in the rank."""
FOLD_RANK = 0.7
"""Rank for each of the layer's inputs above which it does not: `dy^T z` costs about as much as the base's product."""
_FEW_VALUES = 2**17
"""Up to this many values, what launches an operation takes longer than what it computes: low is kept, not repeated."""


def adapted_linear(
    layer: nn.Module,
    x: Float[Tensor, "*T I"],
    adapted: AdaptedWeight,
    factors: Factors,
    dropout: nn.Module | None = None,
    measured_bias: Float[Tensor, "O"] | None = None,
) -> Float[Tensor, "*T O"]:
    """The outputs of a linear layer with one adapter.

    Args:
        layer: the base.
        x: its inputs.
        adapted, factors: of the adapter.
        dropout: of the inputs of the update, where some are dropped.
        measured_bias: of a layer that hides its own.
    """
    if dropout is None and folds(layer, x, adapted, factors):
        return folded_outputs(layer, x, adapted, factors)
    base_output = layer(x)
    # Only now: engines gather it for the base's forward.
    bias = bias_of(layer, measured_bias)
    return thin_outputs(base_output, x if dropout is None else dropout(x), adapted, factors, bias)


def folds(layer: nn.Module, x: Float[Tensor, "*T I"], adapted: AdaptedWeight, factors: Factors) -> bool:
    """Whether a layer computes with the folded weight.

    It does in training (else there are no `factors.folds`), for a plain `nn.Linear` with a frozen weight of float32 or
    float64 (in half precision a small update would be rounded away), where there are at least as many tokens as the
    layer has inputs; for a high rank more: 8 for each rank, or where structured matrices make thin products cheap,
    `inputs * rank / 64`.

    A training step of a BERT in units of the frozen base's, thin / folded, measured on two cores with PyTorch 2.13
    (LoRA r=1: 1.05 to 1.20); what the rule takes has a star:

    | width, matrices   | rank | 512 tokens    | 768 or 1,024  | 2,048         | 4,096         |
    |-------------------|------|---------------|---------------|---------------|---------------|
    | 384, structured   | 64   | 1.48 / 1.32*  |               | 1.39 / 1.16*  |               |
    |                   | 128  |               | 1.56 / 1.40*  |               |               |
    |                   | 256  | 1.60* / 1.91  | 1.35* / 1.63  | 1.58 / 1.44*  |               |
    | 768, structured   | 128  |               |               | 1.30 / 1.17*  |               |
    |                   | 256  |               |               | 1.35* / 1.46  |               |
    | 1,024, structured | 128  |               |               | 1.27 / 1.22*  |               |
    |                   | 256  |               |               | 1.29* / 1.34  | 1.27 / 1.22*  |
    | 1,024, dense      | 256  |               |               | 1.61 / 1.41*  |               |
    """
    if factors.folds is None or type(layer) is not nn.Linear:
        return False
    rank, in_features = adapted.rank, adapted.in_features
    dense = adapted.matrices.is_dense(rank, in_features)
    tokens = max(in_features, FOLD_TOKENS * rank if dense else in_features * rank // FOLD_TIMES)
    if x.numel() < tokens * in_features or rank > FOLD_RANK * in_features:
        return False
    weight = layer._parameters["weight"] if _is_plain(layer) else None
    if weight is None or weight.requires_grad or weight.dtype.itemsize < 4:
        return False
    # Under autocast the folded weight is cast as a trained one would be.
    same = x.dtype == weight.dtype or (autocast_dtype(x.device) is not None and weight.dtype == torch.float32)
    return same and factors.folds.precise


def _is_plain(layer: nn.Linear) -> bool:
    """Whether the layer's forward is the product with its weight, with no hooks."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    # By `_parameters`, since access to the attribute would make DeepSpeed gather the weight.
    return (
        "forward" not in vars(layer)
        and not any(hooks)
        and not torch.nn.modules.module._has_any_global_hook()
        and type(layer._parameters.get("weight")) in (Tensor, nn.Parameter)
    )


def folded_outputs(
    layer: nn.Module, x: Float[Tensor, "*T I"], adapted: AdaptedWeight, factors: Factors
) -> Float[Tensor, "*T O"]:
    """The outputs by way of the folded weight.

    Args:
        layer: the base, for which `folds` is true.
        x: its inputs.
        adapted, factors: of the adapter.
    """
    assert factors.folds is not None
    z, (U, carrier) = project(adapted, x), factors.folds.of(factors.position)
    gains = factors.gain_minus_one, factors.gain
    y: Tensor = _Folded.apply(x, z, U, carrier, *gains, layer.weight, layer.bias, adapted)
    return y


class _Folded(torch.autograd.Function):
    """`x W''^T + bias`. Neither z nor `g - 1` gets a gradient here: that of x includes z's, that of the carrier g's.

    Both are inputs for derivatives of higher order, to which the backward pass is differentiable in them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        U: Tensor,
        carrier: Tensor,
        gain_minus_one: Tensor,
        gain: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        adapted: AdaptedWeight,
    ) -> Tensor:
        folded = _folded_weight(weight, U, gain, adapted.matrices)
        y = linear(x, folded, bias)
        ctx.adapted = adapted
        # Kept while it is no larger than the inputs, which need not be kept.
        saved = folded if folded.numel() <= x.numel() else None
        ctx.save_for_backward(z, U, carrier, y, gain_minus_one, gain, weight, bias, saved)
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, U, carrier, y, gain_minus_one, gain, weight, bias, folded = _saved(ctx)
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():
            # A factor of one, by which the carrier gets back what it is charged for the gradient that U gets now.
            U, gain, folded = U * (1 + (carrier - carrier.detach()))[:, None], 1 + gain_minus_one, None
        d_x = None
        if needed[0]:
            folded = _folded_weight(weight, U, gain, ctx.adapted.matrices) if folded is None else folded
            d_x = dy @ as_dtype(folded, dy.dtype)
        rows = dy.reshape(-1, dy.shape[-1])
        d_U = as_dtype(rows.T @ as_dtype(z, dy.dtype).reshape(len(rows), -1), U.dtype)
        wide = as_dtype(rows, U.dtype)
        d_carrier = (wide * y.reshape(rows.shape)).sum(0)
        d_bias = None
        if bias is not None:
            d_bias = wide.sum(0)
            d_carrier = torch.addcmul(d_carrier, d_bias, as_dtype(bias, U.dtype), value=-1)
        return d_x, None, d_U, d_carrier, None, None, None, d_bias if needed[7] else None, None


def _saved(ctx: Any) -> tuple[Any, ...]:
    try:
        saved: tuple[Any, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise RuntimeError(
            f"{ctx.adapted.name}: the layer's output was written to in place before the backward pass, which needs it "
            "(for example by nn.ReLU(inplace=True)); let the next operation make a new tensor"
        ) from error
    return saved


def _folded_weight(
    weight: Float[Tensor, "O I"], U: Float[Tensor, "O R"], gain: Float[Tensor, "O"], matrices: Matrices
) -> Float[Tensor, "O I"]:
    """`diag(g) W + U A`."""
    if torch.is_autocast_enabled(weight.device.type):
        with full_precision(weight.device):
            return _folded_weight(weight, U, gain, matrices)
    return torch.addcmul(matrices.project_transpose(U, weight.shape[1]), weight, gain[:, None])


def thin_outputs(
    base_output: Float[Tensor, "*T O"],
    x: Float[Tensor, "*T I"],
    adapted: AdaptedWeight,
    factors: Factors,
    bias: Float[Tensor, "O"] | None,
) -> Float[Tensor, "*T O"]:
    """The outputs from those of the base, by two thin products and one combination; also by row of the batch.

    Args:
        base_output: `x W^T + bias`.
        x: the inputs of the update.
        adapted: the frozen side; where rows have adapters of their own, of any of them.
        factors: of the adapter, or of each row's.
        bias: the base's, or None.

    Raises:
        TypeError, ValueError: inputs or outputs are not those of the weight's shard.
    """
    if adapted.shard is not None:
        adapted.shard.check_sizes(x, base_output, adapted.name)
        bias = local(bias)
    z = project(adapted, x) if adapted.rank else None
    matrices = adapted.matrices
    if not is_traced():
        operands = base_output, z, factors.lambda_d, factors.gain_minus_one, factors.scale, factors.gain, bias
        if grad_recorded():
            y: Tensor = _Thin.apply(*operands, matrices)
            return y
        product = None if z is None else low_rank(z, factors.lambda_d, base_output, matrices)
        return _combined(base_output, product, *operands[3:])
    low = base_output.new_zeros(()) if z is None else low_rank(z, factors.lambda_d, base_output, matrices)
    return F.combine(base_output, low.expand_as(base_output), factors.gain_minus_one, factors.scale, bias)


def low_rank(
    z: Float[Tensor, "*T R"], lambda_d: Float[Tensor, "*B R"], base_output: Float[Tensor, "*T O"], matrices: Matrices
) -> Float[Tensor, "*T O"]:
    """`(z lambda_d) B^T`, in the dtype of z."""
    return matrices.expand(z * as_dtype(lambda_d, z.dtype), base_output.shape[-1])


def _combined(
    base_output: Float[Tensor, "*T O"],
    low: Float[Tensor, "*T O"] | None,
    gain_minus_one: Float[Tensor, "*B O"],
    scale: Float[Tensor, "*B O"],
    gain: Float[Tensor, "*B O"] | None,
    bias: Float[Tensor, "O"] | None,
) -> Float[Tensor, "*T O"]:
    """`functional.combine` in place; in float32 or wider, rounded once."""
    y = _rescaled(base_output, gain_minus_one, gain)
    if low is not None:
        y.addcmul_(low, scale)
    if bias is not None:
        y.addcmul_(gain_minus_one, as_dtype(bias, y.dtype), value=-1)
    return as_dtype(y, base_output.dtype)


def _rescaled(
    values: Float[Tensor, "*T O"], gain_minus_one: Float[Tensor, "*B O"], gain: Float[Tensor, "*B O"] | None
) -> Float[Tensor, "*T O"]:
    """`g values`, in the dtype of the factors."""
    return torch.addcmul(values, values, gain_minus_one) if gain is None else values * gain


class _Thin(torch.autograd.Function):
    """The outputs from those of the base and z. The backward pass is differentiable in all that is saved."""

    @staticmethod
    def forward(
        ctx: Any,
        base_output: Tensor,
        z: Tensor | None,
        lambda_d: Tensor,
        gain_minus_one: Tensor,
        scale: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        matrices: Matrices,
    ) -> Tensor:
        low = None if z is None else low_rank(z, lambda_d, base_output, matrices)
        ctx.matrices = matrices
        # Repeated in the backward pass only where that saves more memory than two B have.
        of_matrices = 0 if z is None else 2 * z.shape[-1] * base_output.shape[-1]
        saved = low if base_output.numel() <= max(_FEW_VALUES, of_matrices) else None
        ctx.save_for_backward(base_output, z, lambda_d, gain_minus_one, scale, gain, bias, saved)
        return _combined(base_output, low, gain_minus_one, scale, gain, bias)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        base_output, z, lambda_d, gain_minus_one, scale, gain, bias, low = ctx.saved_tensors
        needed, matrices = ctx.needs_input_grad, ctx.matrices
        if torch.is_grad_enabled():
            gain = low = None
        wide = as_dtype(dy, scale.dtype)
        d_base = as_dtype(_rescaled(wide, gain_minus_one, gain), base_output.dtype) if needed[0] else None
        d_z = d_lambda_d = d_gain = d_scale = d_bias = None
        if needed[3]:
            d_gain = _sum_over_tokens(wide * base_output, scale)
        if bias is not None and (needed[3] or needed[6]):
            total = _sum_over_tokens(wide, scale)
            if d_gain is not None:
                d_gain = torch.addcmul(d_gain, total, as_dtype(bias, total.dtype), value=-1)
            if needed[6]:
                d_bias = -(gain_minus_one * total).reshape(-1, len(bias)).sum(0)
        if z is not None and any(needed[1:5]):
            if needed[4]:
                low = low_rank(z, lambda_d, base_output, matrices) if low is None else low
                d_scale = _sum_over_tokens(wide * low, scale)
            h = matrices.expand_transpose(as_dtype(wide * scale, z.dtype), z.shape[-1])
            if needed[2]:
                d_lambda_d = _sum_over_tokens(as_dtype(h, lambda_d.dtype) * z, lambda_d)
            d_z = h * as_dtype(lambda_d, h.dtype) if needed[1] else None
        return d_base, d_z, d_lambda_d, d_gain, d_scale, None, d_bias, None


def _sum_over_tokens(values: Float[Tensor, "*T N"], like: Float[Tensor, "*B N"]) -> Float[Tensor, "*B N"]:
    """The sum over all tokens, or over those of each row of the batch."""
    if like.dim() == 1:
        # Of one token alone, a sum over no dimensions would be one over all.
        return values.sum(tuple(range(values.dim() - 1))) if values.dim() > 1 else values
    inner = tuple(range(1, values.dim() - 1))
    return values.sum(inner, keepdim=True) if inner else values


def project(adapted: AdaptedWeight, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T R"]:
    """`z = x A^T`, computed once for layers that read the same inputs, one after another."""
    shard, shared = adapted.shard, adapted.dvora_projections
    if shard is not None and shard.inputs is not None:
        return shard.z(adapted.matrices.project(x, adapted.rank))
    if shared.share_inputs and not (is_traced() or x.is_inference() or saved_tensors_are_hooked()):
        z = _shared(x, adapted.rank, shared.impl, id(adapted))
    else:
        z = adapted.matrices.project(x, adapted.rank)
    return z if shard is None else shard.z(z)


class _Last(threading.local):
    """The last projection of a thread, dropped with its input."""

    x: Callable[[], Tensor | None] | None = None
    key: tuple[object, ...] = ()
    z: Callable[[], Tensor | None] | None = None
    readers: frozenset[int] = frozenset()

    def forget(self, x: "weakref.ref[Tensor]") -> None:
        """Forget the projection of these inputs."""
        if self.x is x:
            self.x = self.z = None
            self.key = ()


_last = _Last()


def _shared(x: Tensor, rank: int, matrices: Matrices, reader: int) -> Tensor:
    """`x A^T`, from the last layer that read the same tensor in the same pass; a layer that asks twice gets a new one.

    So query, key and value, or gate and up, share one product, and autograd adds up their gradients before the one with
    A. Not seen are writes to x in between that PyTorch does not count: for those, `SharedProjections.share_inputs`.
    """
    autocast = autocast_dtype(x.device) if torch._C._is_any_autocast_enabled() else None
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    graph = (x.requires_grad, x.grad_fn) if torch.is_grad_enabled() else None
    key = matrices, rank, current_pass(), x._version, x.data_ptr(), graph, autocast, stream
    if _last.x is not None and _last.x() is x and _last.key == key and reader not in _last.readers:
        assert _last.z is not None
        if (z := _last.z()) is not None:
            _last.readers |= {reader}
            return z
    z = matrices.project(x, rank)
    last = _last
    last.x, last.key, last.readers = weakref.ref(x, last.forget), key, frozenset([reader])
    # The graph of z holds a leaf that requires a gradient, and would keep it.
    last.z = weakref.ref(z) if x.is_leaf and x.requires_grad else lambda: z
    return z
