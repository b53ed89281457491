"""The forward of a linear layer with an adapter: from x to y, and back.

There are two computations, and `functional` defines both. `computation` says which one runs:

| computation | when | products beyond the base's, of T tokens | kept |
|---|---|---|---|
| thin | few tokens; half precision, quantised, sharded; rows of a batch | with A and B, there and back | z, y_b |
| folded | many tokens of a plain layer | in training with A, and `dy^T z` | W'', z, y |

Thin adds the update to the base's outputs, with `g` and `scale` of `factors`:

    y = y_b + (g - 1) (y_b - bias) + scale low        y_b = x W^T + bias,   z = x A^T,   low = (z lambda_d) B^T
    dL/dy_b = g dy,   h = (dy scale) B,   dL/dz = h lambda_d,   dL/dlambda_d = sum_t h z
    dL/d(g - 1) = sum_t dy (y_b - bias),   dL/dscale = sum_t dy low

Folded forms one weight. The gradients of the factors are taken from thin products, so that they cost `T O R` and not
`T O I`:

    D = B diag(lambda_d) A,   W'' = diag(g) W + diag(scale) D,   y = x W''^T + bias,   dL/dx = dy W''
    E = dy^T z,   dL/dscale = rowsum(E * B diag(lambda_d)),   dL/dlambda_d = scale (E * B)
    dL/dg = (sum_t dy (y - bias) - scale dL/dscale) / g

With lambda_d by groups of columns, `A'` (A with its columns scaled) takes the place of A and lambda_d: `z = x A'^T` is
of one layer, and a gradient needs x instead of it, as LoRA's does:

    low = z B^T,   D = B A',   dL/dA' = h^T x,   dL/dlambda_d[g] = the sum of dL/dA' * A over the columns of g

Where every row of a batch has an adapter of its own, factors have a value for each row, and sums go over the tokens
of a row. What is compiled, exported or transformed is thin, by plain operations.

Dimensions: T tokens, B rows of a batch, I in, O out, R rank; of a sharded weight, those of this process's shard.
"""

from functools import partial
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.linalg import vecdot
from torch.nn.functional import linear

from . import functional as F
from .factors import (
    Factors,
    RelativeFactors,
    defined_factors,
    differentiated,
    factors_of,
    needs_graph,
    relative_factors,
    vector_gradients,
)
from .functional import Vectors
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
    times,
    without_autocast,
)
from .weight import AdaptedWeight

Computation = Literal["thin", "folded"]

FEW_TOKENS = 64
"""An evaluation of fewer tokens is thin, in small layers too, where the time is that of launches."""
_PART = 2**16
"""Values that are multiplied at a time where their products are only summed."""
_FEW_VALUES = 2**17
"""Up to this many values, what launches an operation takes longer than what it computes: low is kept, not repeated."""


def adapted_linear(
    layer: nn.Module,
    x: Float[Tensor, "*T I"],
    weight: Tensor | None,
    adapted: AdaptedWeight,
    vectors: Vectors,
    strength: float = 1.0,
    dropout: nn.Module | None = None,
    measured_bias: Float[Tensor, "O"] | None = None,
) -> Float[Tensor, "*T O"]:
    """The outputs of a linear layer with one adapter.

    Args:
        layer: the base.
        x: its inputs.
        weight: its weight; None where it is not in memory.
        adapted, vectors: the adapter; of a sharded weight the vectors of this process.
        strength: s of `W + s (W' - W)`.
        dropout: of the inputs of the update, where some are dropped.
        measured_bias: of a layer that hides its own.
    """
    if dropout is None and adapted.rank and _is_plain(layer, x):
        trained = grad_recorded() and vectors.are_trained()
        way = computation(x.numel() // adapted.in_features, adapted, trained)
        if trained and way == "folded":
            adapted.follow(weight)
            return trained_outputs(layer, x, adapted, vectors, strength)
        if way == "folded":
            factors = factors_of(adapted, vectors, weight, strength)
            assert factors.gain is not None
            with full_precision(x.device):
                updated = _updated_weight(layer.weight, adapted, factors.lambda_d, factors.gain, factors.scale)
            return linear(x, updated, layer.bias)
    factors = factors_of(adapted, vectors, weight, strength)
    base_output = layer(x)
    # Only now: engines gather it for the base's forward.
    bias = bias_of(layer, measured_bias)
    return thin_outputs(base_output, x if dropout is None else dropout(x), adapted, factors, bias)


def computation(tokens: int, adapted: AdaptedWeight, trained: bool) -> Computation:
    """The faster of the computations for a plain layer, by sizes.

    Forming a weight pays from `O I / (O + I) + R / 2` tokens on. Training steps of one layer, thin / folded, in units
    of LoRA r=1's, measured on one core with PyTorch 2.13 in float32 (bfloat16 under autocast crosses at the same
    sizes); what the rule takes has a star:

    | O x I         | rank  | 64 tokens    | 256          | 512          | 2,048        |
    |---------------|-------|--------------|--------------|--------------|--------------|
    | 384 x 384     | 64    | 2.52* / 2.53 | 1.73 / 1.83* | 1.97 / 1.49* | 1.61 / 1.14* |
    | 384 x 384     | 256   | 2.47* / 3.45 | 1.85* / 2.20 | 1.98 / 1.74* | 2.13 / 1.41* |
    | 384 x 384     | 1,024 | 8.10* / 10.5 | 5.71* / 6.66 | 6.25* / 4.76 | 4.75 / 3.20* |
    | 1,536 x 384   | 256   | 2.14* / 3.98 | 1.66* / 2.10 | 1.56 / 1.56* | 2.13 / 1.49* |
    | 384 x 1,536   | 256   | 1.61* / 2.53 | 1.79* / 1.74 | 1.51 / 1.36* | 1.37 / 1.18* |
    | 1,024 x 1,024 | 256   |              |              | 1.21* / 1.35 | 1.42 / 1.10* |
    | 1,024 x 1,024 | 1,024 |              |              | 1.64* / 2.61 | 1.87 / 1.62* |

    Args:
        tokens: T.
        adapted: the frozen side.
        trained: whether a vector gets a gradient.
    """
    rank, out_features, in_features = adapted.rank, adapted.out_features, adapted.in_features
    least = out_features * in_features / (out_features + in_features) + rank / 2
    if adapted.by_groups is not None and trained:
        # What forming takes is little more than what the norm takes of the weight in any case.
        least /= 3
    return "thin" if tokens < (least if trained else max(least, FEW_TOKENS)) else "folded"


def _is_plain(layer: nn.Module, x: Float[Tensor, "*T I"]) -> TypeGuard[nn.Linear]:
    """Whether a layer is a product with a frozen weight of float32 or float64 and nothing else.

    In half precision a small update would be rounded away; under autocast the weight is cast as a trained one would be.
    """
    if type(layer) is not nn.Linear or is_traced():
        return False
    # By `_parameters`, since access to the attribute would make DeepSpeed gather the weight.
    weight = layer._parameters.get("weight")
    if weight is None or type(weight) not in (Tensor, nn.Parameter):
        return False
    if weight.requires_grad or weight.dtype.itemsize < 4:
        return False
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if "forward" in vars(layer) or any(hooks) or torch.nn.modules.module._has_any_global_hook():
        return False
    return x.dtype == weight.dtype or (autocast_dtype(x.device) is not None and weight.dtype == torch.float32)


def _as_multiplied(x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T I"]:
    """x in the dtype in which autocast multiplies: cast once, for the product and for its gradient."""
    autocast = None if x.dtype == torch.float64 else autocast_dtype(x.device)
    return x if autocast is None else as_dtype(x, autocast)


def _updated_weight(
    weight: Float[Tensor, "O I"],
    adapted: AdaptedWeight,
    lambda_d: Float[Tensor, "R"],
    gain: Float[Tensor, "O"],
    scale: Float[Tensor, "O"],
) -> Float[Tensor, "O I"]:
    """`W'' = diag(g) W + diag(scale) D`; W itself, bit for bit, where nothing was trained."""
    update = adapted.update(lambda_d, scale)
    # Fresh memory takes as long as the sum.
    add = torch.addcmul if torch.is_grad_enabled() else Tensor.addcmul_
    return add(update, weight, gain[:, None])


def trained_outputs(
    layer: nn.Linear, x: Float[Tensor, "*T I"], adapted: AdaptedWeight, vectors: Vectors, strength: float
) -> Float[Tensor, "*T O"]:
    """The outputs by way of W'', which vectors of a plain layer are trained with. Arguments as for `adapted_linear`."""
    z = project(adapted, x) if adapted.by_groups is None else None
    x, vectors = _as_multiplied(x), vectors.to(adapted.w.dtype)
    y: Tensor = _Folded.apply(x, z, *vectors, layer.weight, layer.bias, adapted, strength)
    return y


class _Folded(torch.autograd.Function):
    """`x W''^T + bias` from the vectors.

    z, of a layer with one lambda_d, gets no gradient here, since that of x includes it; it is an input for derivatives
    of higher order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        m: Tensor,
        lambda_b: Tensor,
        lambda_d: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        adapted: AdaptedWeight,
        strength: float,
    ) -> Tensor:
        constants = adapted.row_constants
        with full_precision(x.device):
            if adapted.by_groups is None:
                factors = relative_factors(m, lambda_b, *adapted.terms(lambda_d)[1:], constants)
                gain, scale = factors.weakened(strength)
                updated = _updated_weight(weight, adapted, lambda_d, gain, scale)
            else:
                # The terms of the norm take less from D than from the weight.
                update = adapted.update(lambda_d)
                cross = vecdot(weight, update).div_(constants.w)
                factors = relative_factors(m, lambda_b, cross, vecdot(update, update), constants)
                gain, scale = factors.weakened(strength)
                updated = update.mul_(scale[:, None]).addcmul_(weight, gain[:, None])
            updated = as_dtype(updated, x.dtype)
        y = linear(x, updated, bias)
        ctx.adapted, ctx.strength = adapted, strength
        # Made again in the backward pass where it is larger than the inputs, which others may keep anyway.
        kept = None if updated.numel() > x.numel() else updated
        ctx.save_for_backward(x if z is None else None, z, y, m, lambda_b, lambda_d, weight, bias, kept, *factors)
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        adapted, strength, needed = ctx.adapted, ctx.strength, ctx.needs_input_grad
        # Not every optimizer's step is counted as a write.
        adapted.kept = None
        x, z, y, m, lambda_b, lambda_d, weight, bias, updated, *saved = _saved(ctx)
        factors, graph = RelativeFactors(*saved), needs_graph(dy)
        gain, scale = factors.weakened(strength)
        if graph:
            gain_minus_one, scale = defined_factors(adapted, strength, m, lambda_b, lambda_d)
            gain, updated = 1 + gain_minus_one, None
        rows, d_x = dy.reshape(-1, len(m)), None
        if z is not None:
            E = as_dtype(rows.T @ as_dtype(z, dy.dtype).reshape(-1, z.shape[-1]), m.dtype)
            products = E * adapted.matrices.matrix("B", len(lambda_d), len(m), m.dtype, m.device).T
            d_scale, d_d = products @ lambda_d, scale @ products
        else:
            inputs, scaled = x.reshape(-1, x.shape[-1]), as_dtype(adapted.scaled(lambda_d), dy.dtype)
            B = adapted.matrices.matrix("B", adapted.rank, len(m), m.dtype, m.device).T
            h = rows @ as_dtype(scale[:, None] * B, dy.dtype)
            d_scale = vecdot(as_dtype(rows.T @ (inputs @ scaled.T), m.dtype), B)
            d_d = adapted.scaled_gradient(as_dtype(h.T @ inputs, m.dtype))
        if needed[0] and z is None and updated is None:
            # Less than to form W'' once more.
            d_x = (rows * as_dtype(gain, dy.dtype)) @ as_dtype(weight, dy.dtype)
            d_x = torch.addmm(d_x, h, scaled).view(x.shape)
        elif needed[0]:
            if updated is None:
                updated = _updated_weight(weight, adapted, lambda_d, gain, scale)
            d_x = dy @ as_dtype(updated, dy.dtype)
        d_g, d_bias = _column_dots(rows, y.reshape(rows.shape), m.dtype), None
        if bias is not None:
            d_bias = rows.sum(0, dtype=m.dtype)
            d_g = torch.addcmul(d_g, d_bias, as_dtype(bias, m.dtype), value=-1)
        # A gain of zero gets no gradient.
        d_g = torch.addcmul(d_g, scale, d_scale, value=-1) / gain.masked_fill(gain == 0, float("inf"))
        if graph:
            of_factors = partial(defined_factors, adapted, strength)
            d_m, d_b, d_norm = differentiated(of_factors, (m, lambda_b, lambda_d), (d_g, d_scale))
            d_d = d_d if d_norm is None else d_d + d_norm
        else:
            if strength != 1:
                d_g, d_scale = strength * d_g, strength * d_scale
            constants = adapted.row_constants
            d_m, d_b, d_cross, d_half_q = vector_gradients(d_g, d_scale, factors, constants, adapted.detach_norm)
            if d_cross is not None and d_half_q is not None:
                d_d += adapted.terms_gradient(d_cross, d_half_q, lambda_d)
        return d_x, None, d_m, d_b, d_d, None, d_bias if needed[6] else None, None, None


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


def _column_dots(first: Float[Tensor, "T O"], second: Float[Tensor, "T O"], dtype: torch.dtype) -> Float[Tensor, "O"]:
    """`(first * second).sum(0)`, by parts that stay in a processor's cache; half precision rounds products only."""
    if torch.is_grad_enabled() or not first.is_cpu:
        return (first * second).sum(0, dtype=dtype)
    rows = max(1, _PART // first.shape[1])
    parts = zip(first.split(rows), second.split(rows), strict=True)
    return torch.stack([(a * b).sum(0, dtype=dtype) for a, b in parts]).sum(0)


def thin_outputs(
    base_output: Float[Tensor, "*T O"],
    x: Float[Tensor, "*T I"],
    adapted: AdaptedWeight,
    factors: Factors,
    bias: Float[Tensor, "O"] | None,
    in_place: bool = False,
) -> Float[Tensor, "*T O"]:
    """The outputs from those of the base, by two thin products and one combination; also by row of the batch.

    Args:
        base_output: `x W^T + bias`.
        x: the inputs of the update.
        adapted: the frozen side; where rows have adapters of their own, of any of them.
        factors: of the adapter, or of each row's.
        bias: the base's, or None.
        in_place: whether nobody else has the base's outputs, which may be written to where no gradient is recorded.

    Raises:
        TypeError, ValueError: inputs or outputs are not those of the weight's shard.
    """
    if adapted.shard is not None:
        adapted.shard.check_sizes(x, base_output, adapted.name)
        bias = local(bias)
    z: Tensor | None = None
    lambda_d: Tensor | None = factors.lambda_d
    if adapted.by_groups is not None:
        z, lambda_d = project_scaled(adapted, x, factors.lambda_d), None
    elif adapted.rank:
        z = project(adapted, x)
    matrices = adapted.matrices
    if not is_traced():
        operands = base_output, z, lambda_d, factors.gain_minus_one, factors.scale, factors.gain, bias
        if grad_recorded():
            y: Tensor = _Thin.apply(*operands, matrices)
            return y
        product = None if z is None else low_rank(z, lambda_d, base_output, matrices)
        return _combined(base_output, product, *operands[3:], in_place)
    low = base_output.new_zeros(()) if z is None else low_rank(z, lambda_d, base_output, matrices)
    return F.combine(base_output, low.expand_as(base_output), factors.gain_minus_one, factors.scale, bias)


def low_rank(
    z: Float[Tensor, "*T R"],
    lambda_d: Float[Tensor, "*B R"] | None,
    base_output: Float[Tensor, "*T O"],
    matrices: Matrices,
) -> Float[Tensor, "*T O"]:
    """`(z lambda_d) B^T`, in the dtype of z; `z B^T` without a lambda_d, which z has then."""
    return matrices.expand(z if lambda_d is None else z * as_dtype(lambda_d, z.dtype), base_output.shape[-1])


def _combined(
    base_output: Float[Tensor, "*T O"],
    low: Float[Tensor, "*T O"] | None,
    gain_minus_one: Float[Tensor, "*B O"],
    scale: Float[Tensor, "*B O"],
    gain: Float[Tensor, "*B O"] | None,
    bias: Float[Tensor, "O"] | None,
    in_place: bool = False,
) -> Float[Tensor, "*T O"]:
    """`functional.combine`; in float32 or wider, rounded once."""
    if is_written := in_place and gain is None and base_output.dtype == gain_minus_one.dtype:
        # One pass less, and no new memory, which takes longer to get than to fill.
        shift = base_output.new_zeros(()) if bias is None else -gain_minus_one * bias
        y = torch.addcmul(shift, base_output, 1 + gain_minus_one, out=base_output)
    else:
        y = _rescaled(base_output, gain_minus_one, gain)
    if low is not None:
        y.addcmul_(low, scale)
    if bias is not None and not is_written:
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
        lambda_d: Tensor | None,
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
            if lambda_d is not None and needed[2]:
                d_lambda_d = _sum_over_tokens(as_dtype(h, lambda_d.dtype) * z, lambda_d)
            if needed[1]:
                d_z = h if lambda_d is None else h * as_dtype(lambda_d, h.dtype)
        return d_base, d_z, d_lambda_d, d_gain, d_scale, None, d_bias, None


def _sum_over_tokens(values: Float[Tensor, "*T N"], like: Float[Tensor, "*B N"]) -> Float[Tensor, "*B N"]:
    """The sum over all tokens, or over those of each row of the batch."""
    if like.dim() == 1:
        # Of one token alone, a sum over no dimensions would be one over all.
        return values.sum(tuple(range(values.dim() - 1))) if values.dim() > 1 else values
    inner = tuple(range(1, values.dim() - 1))
    return values.sum(inner, keepdim=True) if inner else values


def project(adapted: AdaptedWeight, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T R"]:
    """`z = x A^T`, of all inputs where they are sharded."""
    z = adapted.matrices.project(x, adapted.rank)
    return z if adapted.shard is None else adapted.shard.z(z)


def project_scaled(
    adapted: AdaptedWeight, x: Float[Tensor, "*T I"], lambda_d: Float[Tensor, "*B K"]
) -> Float[Tensor, "*T R"]:
    """`z = x A'^T` with lambda_d by groups, of one adapter or of each row's."""
    x, shard = _as_multiplied(x), adapted.shard
    if shard is not None:
        x, lambda_d = shard.of_update(x, lambda_d)
    assert adapted.by_groups is not None
    leading = x.shape[:-1]
    if lambda_d.dim() > 1:
        lambda_d = lambda_d.view(-1, lambda_d.shape[-1])
        x = x.flatten(1, -2) if x.dim() > 2 else x[:, None]
        if shard is None and adapted.by_groups.are_few(x) and not (is_traced() or grad_recorded()):
            return adapted.by_groups.contracted(x, adapted.A(x), as_dtype(lambda_d, x.dtype)).view(*leading, -1)
    scaled = adapted.scaled(lambda_d)
    if shard is not None and shard.inputs is not None:
        scaled = shard.inputs.of(scaled)
    scaled = as_dtype(scaled, x.dtype)
    product = _times_scaled if is_traced() or not grad_recorded() else _TimesScaled.apply
    z = product(x, scaled).view(*leading, adapted.rank)
    return z if shard is None or shard.inputs is None else shard.z(z)


def _times_scaled(x: Float[Tensor, "*T I"], scaled: Float[Tensor, "*B R I"]) -> Float[Tensor, "*T R"]:
    return times(x, scaled.T) if scaled.dim() == 2 else x @ scaled.mT


class _TimesScaled(torch.autograd.Function):
    """`x A'^T`, whose backward pass is in the dtypes of the forward pass, whatever autocast says by then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scaled: Tensor) -> Tensor:
        ctx.save_for_backward(x, scaled)
        return _times_scaled(x, scaled)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, d_z: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, scaled = ctx.saved_tensors
        if scaled.dim() == 2:
            x, rows = x.reshape(-1, x.shape[-1]), d_z.reshape(-1, len(scaled))
        else:
            rows = d_z
        d_x = d_z @ scaled if ctx.needs_input_grad[0] else None
        return d_x, rows.mT @ x if ctx.needs_input_grad[1] else None
