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

Dimensions: T tokens, I in, O out, R rank; of a sharded weight, those of this process's shard.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engines.tensor_parallel import local
from ..matrices.dense import DenseMatrices, is_few
from ..matrices.interface import Matrices, projected
from ..method import functional as F
from ..method.functional import Vectors
from ..method.gain import PackedFactors
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
    vectors: Vectors
    factors: PassFactors
    matrices: Matrices
    """A and B."""

    @classmethod
    def of(
        cls, adapted: AdaptedWeight, vectors: Vectors, weight: Tensor | None, strength: Tensor | None = None
    ) -> "Update":
        """That of an adapter of some strength; arguments as for `factors_of`."""
        return cls(adapted, vectors, factors_of(adapted, vectors, weight, strength), adapted.matrices)

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
    y: Tensor = _ThinProducts.apply(base_output, z, packed.lambda_d, packed.trained, bias, update)
    return y


def updated_linear(update: Update, layer: nn.Linear, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
    """The output by way of the updated weight V', where `takes_updated_weight` says so."""
    adapted, packed, bias = update.adapted, update.factors.packed, layer.bias
    vectors = update.vectors.to(adapted.w.dtype)
    beta = F.row_scale(vectors.lambda_b, adapted.w, adapted.scaling, adapted.direction)
    z = project(adapted, x)
    updated = _UpdatedLinear.apply(x, z, layer.weight, bias, vectors.lambda_d, beta, update.matrices)
    y: Tensor = _ThinProducts.apply(updated, None, vectors.lambda_d.detach(), packed.trained, bias, update)
    return y


def low_rank(adapted: AdaptedWeight, x: Float[Tensor, "*T I"], lambda_d: Float[Tensor, "R"]) -> Float[Tensor, "*T O"]:
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


WORTH_IT = 2.0
"""Required saving in multiply-adds: passes of the weight's size are bound by memory."""


def takes_updated_weight(layer: nn.Module, x: Tensor, matrices: Matrices) -> bool:
    """Whether training goes through the updated weight.

    Args:
        layer: the base.
        x: its inputs.
        matrices: the adapter's A and B.
    """
    if is_traced() or not (grad_recorded() and isinstance(matrices, DenseMatrices) and type(layer) is nn.Linear):
        return False
    out_features, in_features = layer.out_features, layer.in_features
    if not pays(x.numel() // max(1, in_features), out_features, in_features) or not _is_plain(layer):
        return False
    # In half precision small updates would round away.
    wide = layer.weight.dtype in (torch.float32, torch.float64) and x.dtype == layer.weight.dtype
    return wide and not layer.weight.requires_grad and not torch.is_autocast_enabled(x.device.type)


def pays(tokens: int, out_features: int, in_features: int) -> bool:
    """The cost model, in multiply-adds per rank: `z B^T`, its transpose and `h A`, against forming V' twice."""
    thin = tokens * (2 * out_features + in_features)
    updated = 2 * out_features * in_features
    return thin > WORTH_IT * updated


def keeps_update(z: Float[Tensor, "*T R"], matrices: Matrices) -> bool:
    """Whether training keeps the update: memory against the time of the product `z^T grad_output`."""
    return is_few(_rows(z)) and not matrices.products_are_cheap and not (matrices.use_triton and z.is_cuda)


def _is_plain(layer: nn.Linear) -> bool:
    """Whether the layer's forward is the product with its weight, with no hooks."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return (
        "forward" not in vars(layer)
        # Checked before the weight is accessed, which DeepSpeed's hooks would gather.
        and not any(hooks)
        and not torch.nn.modules.module._has_any_global_hook()
        and type(layer.weight) in (Tensor, nn.Parameter)
        and not layer.weight.is_meta
    )


def outputs_from(
    factors: PassFactors,
    matrices: Matrices,
    base_output: Float[Tensor, "*T O"],
    z: Float[Tensor, "*T R"] | None,
    bias: Float[Tensor, "O"] | None,
) -> Float[Tensor, "*T O"]:
    """The output from that of the base and z, without gradients; arguments as for `adapted_linear`."""
    packed, rows = factors.packed, _rows(base_output)
    gain = packed.constant[0]
    if z is None:
        return _reshaped(_rescaled(rows, packed, bias), base_output)
    if matrices.use_triton and base_output.is_cuda:
        return _reshaped(fused.outputs(rows, _rows(z), packed, matrices, bias), base_output)
    add, offset = factors.added(matrices, z.dtype), _offset(packed, bias)
    if rows.dtype.itemsize < 4 or rows.dtype != z.dtype:
        # In half precision a gain near one would round to one.
        y = rescaled(rows, gain, offset, as_dtype(add(_rows(z), None), rows.dtype))
    else:
        y = add(_rows(z), scaled_base(rows, gain, offset))
    return _reshaped(y, base_output)


def _forward_keeping(
    update: Update, base_output: Float[Tensor, "*T O"], z: Float[Tensor, "*T R"], bias: Tensor | None
) -> tuple[Float[Tensor, "*T O"], Float[Tensor, "S O"]]:
    """The outputs, and the update before its scale."""
    packed, rows = update.factors.packed, _rows(base_output)
    scale, gain = packed.trained[1].detach(), packed.constant[0]
    offset = _offset(packed, bias)
    low = update.matrices.expand(_rows(z) * as_dtype(packed.lambda_d.detach(), z.dtype), rows.shape[1])
    if rows.dtype.itemsize < 4 or rows.dtype != low.dtype:
        y = rescaled(rows, gain, offset, as_dtype(as_dtype(low * scale, low.dtype), rows.dtype))
    else:
        y = scaled_base(rows, gain, offset).addcmul_(low, scale)
    return _reshaped(y, base_output), low


def scaled_base(
    rows: Float[Tensor, "*T O"], gain: Float[Tensor, "O"], offset: Float[Tensor, "O"] | None
) -> Float[Tensor, "*T O"]:
    """`g y_b + offset`, a new tensor."""
    return rows * gain if offset is None else torch.addcmul(offset, rows, gain)


def _offset(packed: PackedFactors, bias: Float[Tensor, "O"] | None) -> Float[Tensor, "O"] | None:
    """`(1 - g) bias`, which the outputs need beside `g y_b`."""
    return None if bias is None else packed.constant[1] * bias


def _rescaled(rows: Float[Tensor, "S O"], packed: PackedFactors, bias: Float[Tensor, "O"] | None) -> Tensor:
    """`g rows - (g - 1) bias`: outputs without an update, and gradients of the base's outputs."""
    gain, offset = packed.constant[0], _offset(packed, bias)
    return rescaled(rows, gain, offset) if rows.dtype.itemsize < 4 else scaled_base(rows, gain, offset)


class _ThinProducts(torch.autograd.Function):
    """From the base's outputs and z."""

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
        rows, outputs, packed = _rows(grad_output), _rows(base_output), update.factors.packed
        d_base: Tensor | None
        d_z = d_lambda_d = None
        if z is not None and update.matrices.use_triton and grad_output.is_cuda:
            d_base, d_z, d_lambda_d, d_trained = fused.gradients(rows, outputs, _rows(z), packed, update.matrices, bias)
        else:
            d_base = _rescaled(rows, packed, None) if needed[0] else None
            d_trained = torch.zeros_like(trained) if z is None else torch.empty_like(trained)
            if needed[3]:
                _gain_gradient(rows, outputs, bias, d_trained[0])
            if z is not None and any(needed[1:4]):
                same, scale = as_dtype(rows, z.dtype), packed.trained[1].detach()
                if low is None:
                    d_z, d_lambda_d = update.matrices.update_gradients(same, _rows(z), lambda_d, scale, d_trained[1])
                else:
                    sum_of_products(same, low, d_trained[1])
                    h = update.matrices.expand_transpose(same, z.shape[-1], scale)
                    d_lambda_d = sum_of_products(h, _rows(z))
                    d_z = h.mul_(as_dtype(lambda_d, h.dtype))
        return (
            None if d_base is None else d_base.view(grad_output.shape),
            None if d_z is None else d_z.view(z.shape),
            d_lambda_d,
            d_trained if needed[3] else None,
            -trained[0] * _total(rows) if needed[4] else None,
            None,
        )


class _UpdatedLinear(torch.autograd.Function):
    """`x V'^T + bias` by `V' = W + diag(beta) B diag(lambda_d) A`, which is formed again in the backward pass.

    dL/dx = grad_output V',   M = grad_output^T z,   dL/dbeta = rowsum(M * B diag(lambda_d)),
    dL/dlambda_d = colsum(diag(beta) B * M)

    z gets no gradient: dx already includes this path.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lambda_d: Tensor,
        beta: Tensor,
        matrices: DenseMatrices,
    ) -> Tensor:
        ctx.matrices = matrices
        ctx.save_for_backward(z, weight, lambda_d, beta)
        return nn.functional.linear(x, matrices.updated(weight, lambda_d, beta), bias)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, lambda_d, beta = ctx.saved_tensors
        matrices: DenseMatrices = ctx.matrices
        needed, rows = ctx.needs_input_grad, _rows(grad_output)
        d_x = grad_output @ matrices.updated(weight, lambda_d, beta) if needed[0] else None
        d_lambda_d = d_beta = None
        if needed[4] or needed[5]:
            d_lambda_d, d_beta = matrices.update_products(rows, _rows(z), lambda_d, beta)
        d_bias = rows.sum(0) if needed[3] else None
        return d_x, None, None, d_bias, d_lambda_d, d_beta, None


def _traced(
    update: Update, base_output: Float[Tensor, "*T O"], x: Float[Tensor, "*T I"], bias: Tensor | None
) -> Float[Tensor, "*T O"]:
    """By operations that PyTorch sees and differentiates."""
    factors = update.factors.packed.rows
    if update.adapted.rank:
        low = factors.scale * low_rank(update.adapted, x, update.vectors.lambda_d)
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
    grad_output: Float[Tensor, "S O"],
    outputs: Float[Tensor, "S O"],
    bias: Float[Tensor, "O"] | None,
    into: Float[Tensor, "O"],
) -> None:
    """`sum_t grad_output (y_b - bias)`, in float32 or wider."""
    sum_of_products(grad_output, outputs, into)
    if bias is not None:
        into.addcmul_(_total(grad_output), as_dtype(bias, into.dtype), value=-1)


def _total(rows: Float[Tensor, "S O"]) -> Float[Tensor, "O"]:
    return rows.sum(0, dtype=norm_dtype(rows.dtype))


def _rows(tokens: Float[Tensor, "*T N"]) -> Float[Tensor, "S N"]:
    return tokens if tokens.dim() == 2 else tokens.reshape(-1, tokens.shape[-1])


def _reshaped(rows: Float[Tensor, "S O"], like: Float[Tensor, "*T O"]) -> Float[Tensor, "*T O"]:
    """Not a view to autograd, so callers may write into it."""
    if like.dim() == 2:
        return rows
    whole: Tensor = torch.ops.aten._unsafe_view(rows, like.shape)
    return whole
