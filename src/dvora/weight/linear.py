"""A linear layer with an adapted weight, from x to y and back.

    y = y_b + (g - 1) (y_b - bias) + scale ((z lambda_d) B^T)        y_b = x W^T + bias,   z = x A^T

    dL/dy_b      = g grad_output
    dL/d(g - 1)  = sum_t grad_output (y_b - bias)
    dL/dscale    = sum_t grad_output ((z lambda_d) B^T)
    h            = (grad_output scale) B,   dL/dz = h lambda_d,   dL/dlambda_d = sum_t h z

| route | situation | forward | backward | formed or kept for it |
|---|---|---|---|---|
| traced | compiled, exported, under `torch.func` | - | - | nothing: PyTorch differentiates `functional` |
| updated weight | training, dense, where `pays`, a plain layer of float32 or float64 | 2 | 5 | V', twice |
| thin products | other training, dense | 4 | 6 | B with its scales, twice |
| thin products, few tokens | training, dense, at most two tokens a rank | 6 | 7 to 9 | the update is kept |
| thin products, structured | training, structured | 4 | 8 | nothing |
| evaluation | without gradients | 4 to 6 | - | factors and scales are kept |

Forward and backward count passes over tensors of (tokens, out) that are read or written, beyond those of the base's own
product. For the backward pass y_b and z are saved, not the layer's inputs.

Where every row of a batch has an adapter of its own, the formulas are the same: factors and lambda_d then have a value
for each row, and sums go over the tokens of a row. They cannot go into B, so the route is that of few tokens.

Dimensions: T tokens, B rows of a batch, I in, O out, R rank; of a sharded weight, those of this process's shard.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engines.tensor_parallel import local
from ..matrices.dense import is_few
from ..matrices.interface import Matrices, projected
from ..method import functional as F
from ..method.functional import Vectors
from ..method.packed_factors import PackedFactors
from ..method.small_rows import SmallRows
from ..ops.annotations import Float
from ..ops.chunked import rescaled, sum_of_products
from ..ops.dtypes import as_dtype, norm_dtype, without_autocast
from ..ops.tracing import grad_recorded, gradients_of, is_batched, is_traced
from . import fused
from .adapted_weight import AdaptedWeight
from .factors import PassFactors, factors_of


class Update(NamedTuple):
    """What one adapter does to the outputs of one layer in one pass."""

    adapted: AdaptedWeight
    vectors: Vectors | None
    """None where every row of the batch has an adapter of its own."""
    factors: PassFactors
    matrices: Matrices
    """A and B."""

    @classmethod
    def of(
        cls, adapted: AdaptedWeight, vectors: Vectors, weight: Tensor | None, strength: Tensor | None = None
    ) -> "Update":
        """That of an adapter of some strength; arguments as for `factors_of`."""
        return cls(adapted, vectors, factors_of(adapted, vectors, weight, strength), adapted.matrices)

    @classmethod
    def by_row(cls, adapted: AdaptedWeight, packed: PackedFactors) -> "Update":
        """That of adapters which share A and B, each with the tokens of its rows."""
        return cls(adapted, None, PassFactors(packed, {}), adapted.matrices)

    def with_factors(self, packed: PackedFactors) -> "Update":
        """The same with other factors."""
        return self._replace(factors=PassFactors(packed))


def adapted_linear(
    update: Update,
    base_output: Float[Tensor, "*T O"],
    x: Float[Tensor, "*T I"],
    bias: Float[Tensor, "O"] | None,
    small: SmallRows | None = None,
) -> Float[Tensor, "*T O"]:
    """The output from that of the base by two thin products.

    Args:
        update: the adapter's.
        base_output: `x W^T + bias`.
        x: the inputs of the update.
        bias: the base's, or None.
        small: rows that are small beside their bias.

    Raises:
        TypeError, ValueError: inputs or outputs are not those of the weight's shard.
    """
    adapted = update.adapted
    if adapted.shard is not None:
        adapted.shard.check_sizes(x, base_output, adapted.name)
        bias = local(bias)
    if small is not None:
        factors = update.factors.packed.rows
        others = update.with_factors(PackedFactors.of(small.left_out(factors), update.factors.packed.lambda_d))
        return small.added(adapted_linear(others, base_output, x, bias), factors)
    if is_traced():
        return _traced(update, base_output, x, bias)
    z = project(adapted, x) if adapted.rank else None
    if not grad_recorded():
        return outputs_from(update.factors, update.matrices, base_output, z, bias)
    packed = update.factors.packed
    y: Tensor = ThinProducts.apply(base_output, z, packed.lambda_d, packed.trained, bias, update)
    return y


def low_rank(
    adapted: AdaptedWeight, x: Float[Tensor, "*T I"], lambda_d: Float[Tensor, "*B R"]
) -> Float[Tensor, "*T O"]:
    """`((x A^T) lambda_d) B^T`, in the dtype of `x`."""
    z = project(adapted, x)
    return adapted.matrices.expand(z * lambda_d.to(z.dtype), len(adapted.w))


def project(adapted: AdaptedWeight, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T R"]:
    """`x A^T`, computed once for layers that read the same inputs."""
    shard = adapted.shard
    if shard is not None and shard.inputs is not None:
        return shard.z(projected(x, adapted.rank, adapted.matrices))
    z = adapted.shared.project_once(x, adapted.rank, adapted)
    return z if shard is None else shard.z(z)


def keeps_update(z: Float[Tensor, "*T R"], matrices: Matrices) -> bool:
    """Whether training keeps the update: memory against the time of the product `z^T grad_output`."""
    return is_few(token_list(z)) and not matrices.products_are_cheap and not (matrices.use_triton and z.is_cuda)


def outputs_from(
    factors: PassFactors,
    matrices: Matrices,
    base_output: Float[Tensor, "*T O"],
    z: Float[Tensor, "*T R"] | None,
    bias: Float[Tensor, "O"] | None,
) -> Float[Tensor, "*T O"]:
    """The output from that of the base and z, without gradients; arguments as for `adapted_linear`."""
    packed = factors.packed
    rows = _rows_for(packed, base_output)
    if z is None:
        return _reshaped(_without_update(rows, packed, bias), base_output)
    if matrices.use_triton and base_output.is_cuda and not packed.is_by_row:
        return _reshaped(fused.outputs(rows, token_list(z), packed, matrices, bias), base_output)
    add = factors.added(matrices, z.dtype)
    if rows.dtype.itemsize < 4 or rows.dtype != z.dtype:
        # In half precision a gain near one would round to one.
        y = _rescaled(rows, packed, bias, as_dtype(add(_rows_for(packed, z), None), rows.dtype))
    else:
        y = add(_rows_for(packed, z), scaled_base_of(rows, packed, bias))
    return _reshaped(y, base_output)


def _forward_keeping(
    update: Update, base_output: Float[Tensor, "*T O"], z: Float[Tensor, "*T R"], bias: Tensor | None
) -> tuple[Float[Tensor, "*T O"], Float[Tensor, "*S O"]]:
    """The outputs, and the update before its scale."""
    packed = update.factors.packed
    rows, scale = _rows_for(packed, base_output), packed.trained[1].detach()
    low = _unscaled(update, _rows_for(packed, z), rows.shape[-1])
    if rows.dtype.itemsize < 4 or rows.dtype != low.dtype:
        y = _rescaled(rows, packed, bias, as_dtype(as_dtype(low * scale, low.dtype), rows.dtype))
    else:
        y = scaled_base_of(rows, packed, bias).addcmul_(low, scale)
    return _reshaped(y, base_output), low


def _unscaled(update: Update, z: Float[Tensor, "*T R"], out_features: int) -> Float[Tensor, "*T O"]:
    """`(z lambda_d) B^T`, without a graph."""
    return update.matrices.expand(z * as_dtype(update.factors.packed.lambda_d.detach(), z.dtype), out_features)


def scaled_base(
    rows: Float[Tensor, "*T O"], gain: Float[Tensor, "*B O"], offset: Float[Tensor, "*B O"] | None
) -> Float[Tensor, "*T O"]:
    """`g y_b + offset`, a new tensor."""
    return rows * gain if offset is None else torch.addcmul(offset, rows, gain)


def scaled_base_of(
    rows: Float[Tensor, "*T O"], packed: PackedFactors, bias: Float[Tensor, "O"] | None
) -> Float[Tensor, "*T O"]:
    """`g y_b + (1 - g) bias`, a new tensor."""
    if packed.constant is None and bias is None:
        return torch.addcmul(rows, rows, packed.trained[0].detach())
    return scaled_base(rows, packed.gain, None if bias is None else packed.offset(bias))


def _rescaled(
    rows: Float[Tensor, "*T O"],
    packed: PackedFactors,
    bias: Float[Tensor, "O"] | None,
    update: Float[Tensor, "*T O"] | None = None,
) -> Float[Tensor, "*T O"]:
    """`g y_b + (1 - g) bias + update`, rounded once."""
    return rescaled(rows, packed.gain, None if bias is None else packed.offset(bias), update)


def _without_update(rows: Float[Tensor, "*T O"], packed: PackedFactors, bias: Float[Tensor, "O"] | None) -> Tensor:
    """`g rows - (g - 1) bias`: outputs without an update, and gradients of the base's outputs."""
    return _rescaled(rows, packed, bias) if rows.dtype.itemsize < 4 else scaled_base_of(rows, packed, bias)


class ThinProducts(torch.autograd.Function):
    """The outputs from those of the base and z."""

    @staticmethod
    def forward(
        ctx: Any,
        base_output: Tensor,
        z: Tensor | None,
        lambda_d: Tensor,
        trained: Tensor,
        bias: Tensor | None,
        update: Update,
    ) -> Tensor:
        ctx.update, low = update, None
        if z is not None and keeps_update(z, update.matrices):
            y, low = _forward_keeping(update, base_output, z, bias)
        else:
            y = outputs_from(update.factors, update.matrices, base_output, z, bias)
        ctx.save_for_backward(base_output, z, lambda_d, trained, bias, low)
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        base_output, z, lambda_d, trained, bias, low = ctx.saved_tensors
        update, needed = ctx.update, ctx.needs_input_grad
        if torch.is_grad_enabled() or is_batched(grad_output):
            inputs = (base_output, z, lambda_d, trained, bias)
            return *_differentiable_gradients(grad_output, inputs, update.matrices), None
        packed = update.factors.packed
        rows, outputs = _rows_for(packed, grad_output), _rows_for(packed, base_output)
        d_base: Tensor | None
        d_z = d_lambda_d = None
        if z is not None and update.matrices.use_triton and grad_output.is_cuda and not packed.is_by_row:
            d_base, d_z, d_lambda_d, d_trained = fused.gradients(
                rows, outputs, token_list(z), packed, update.matrices, bias
            )
        else:
            d_base = _without_update(rows, packed, None) if needed[0] else None
            d_trained = torch.zeros_like(trained) if z is None else torch.empty_like(trained)
            if needed[3]:
                _gain_gradient(rows, outputs, bias, d_trained[0])
            if z is not None and any(needed[1:4]):
                same, tokens = as_dtype(rows, z.dtype), _rows_for(packed, z)
                if low is None and packed.is_by_row:
                    low = _unscaled(update, tokens, rows.shape[-1])
                if low is None:
                    scale = packed.trained[1].detach()
                    d_z, d_lambda_d = update.matrices.update_gradients(same, tokens, lambda_d, scale, d_trained[1])
                else:
                    d_z, d_lambda_d = _update_gradients(update, same, tokens, low, d_trained[1])
        return (
            None if d_base is None else d_base.view(grad_output.shape),
            None if d_z is None else d_z.view(z.shape),
            d_lambda_d,
            d_trained if needed[3] else None,
            token_list(-trained[0] * _total(rows, trained[0])).sum(0) if needed[4] else None,
            None,
        )


def _update_gradients(
    update: Update,
    d: Float[Tensor, "*T O"],
    z: Float[Tensor, "*T R"],
    low: Float[Tensor, "*T O"],
    d_scale: Float[Tensor, "*B O"],
) -> tuple[Float[Tensor, "*T R"], Float[Tensor, "*B R"]]:
    """Those of z and lambda_d, from the update before its scale; that of the scale is written into `d_scale`."""
    packed = update.factors.packed
    scale = packed.trained[1].detach()
    sum_of_products(d, low, d_scale)
    if packed.is_by_row:
        h = update.matrices.expand_transpose(as_dtype(d * scale, d.dtype), z.shape[-1])
    else:
        h = update.matrices.expand_transpose(d, z.shape[-1], scale)
    d_lambda_d = sum_of_products(h, z, torch.empty_like(packed.lambda_d, dtype=norm_dtype(h.dtype)))
    return h.mul_(as_dtype(packed.lambda_d.detach(), h.dtype)), d_lambda_d


def _traced(
    update: Update, base_output: Float[Tensor, "*T O"], x: Float[Tensor, "*T I"], bias: Tensor | None
) -> Float[Tensor, "*T O"]:
    """By operations that PyTorch sees and differentiates."""
    factors = update.factors.packed.rows
    if update.adapted.rank:
        low = factors.scale * low_rank(update.adapted, x, update.factors.packed.lambda_d)
    else:
        low = base_output.new_zeros(1).expand_as(base_output)
    return F.combine(base_output, low, factors.gain_minus_one, bias)


def _differentiable_gradients(
    grad_output: Tensor, inputs: Sequence[Tensor | None], matrices: Matrices
) -> list[Tensor | None]:
    """The gradients as a graph, for derivatives of higher order, and for batches of them."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: gradients end at them, whatever the inputs were computed from.
        aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        base_output, z, lambda_d, trained, bias = aliases
        assert base_output is not None
        assert lambda_d is not None
        assert trained is not None
        low = base_output.new_zeros(1).expand_as(base_output)
        if z is not None:
            low = trained[1] * matrices.expand(z * as_dtype(lambda_d, z.dtype), base_output.shape[-1])
        return gradients_of(F.combine(base_output, low, trained[0], bias), aliases, grad_output, graph)


def _gain_gradient(
    grad_output: Float[Tensor, "*T O"],
    outputs: Float[Tensor, "*T O"],
    bias: Float[Tensor, "O"] | None,
    into: Float[Tensor, "*B O"],
) -> None:
    """`sum_t grad_output (y_b - bias)`, in float32 or wider."""
    sum_of_products(grad_output, outputs, into)
    if bias is not None:
        into.addcmul_(_total(grad_output, into), as_dtype(bias, into.dtype), value=-1)


def _total(rows: Float[Tensor, "*T O"], like: Float[Tensor, "*B O"]) -> Float[Tensor, "*B O"]:
    """The sum over all tokens, or over those of each row."""
    dtype, inner = norm_dtype(rows.dtype), tuple(range(1, rows.dim() - 1))
    if like.dim() == 1:
        return rows.sum(0, dtype=dtype)
    return rows.sum(inner, keepdim=True, dtype=dtype) if inner else as_dtype(rows, dtype)


def _rows_for(packed: PackedFactors, tokens: Float[Tensor, "*T N"]) -> Tensor:
    """Tokens as factors are multiplied with them: as one list, or by row of the batch."""
    return tokens if packed.is_by_row else token_list(tokens)


def token_list(tokens: Float[Tensor, "*T N"]) -> Float[Tensor, "S N"]:
    """The tokens of a batch as one list."""
    return tokens if tokens.dim() == 2 else tokens.reshape(-1, tokens.shape[-1])


def _reshaped(rows: Tensor, like: Float[Tensor, "*T O"]) -> Float[Tensor, "*T O"]:
    """Not a view to autograd, so callers may write into it."""
    if like.dim() == rows.dim():
        return rows
    whole: Tensor = torch.ops.aten._unsafe_view(rows, like.shape)
    return whole
