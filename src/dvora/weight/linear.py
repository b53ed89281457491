"""A linear layer with an adapted weight, from x to y and back.

    y = y_b + (g - 1) (y_b - bias) + scale ((z lambda_d) B^T)        y_b = x W^T + bias,   z = x A^T

    dL/dy_b      = g grad_output
    dL/d(g - 1)  = sum_t grad_output (y_b - bias)
    dL/dscale    = sum_t grad_output ((z lambda_d) B^T)
    h            = (grad_output scale) B,   dL/dz = h lambda_d,   dL/dlambda_d = sum_t h z

| route | situation | forward | backward | formed for it |
|---|---|---|---|---|
| traced | compiled, exported, under `torch.func` | - | - | nothing: PyTorch differentiates `functional` |
| updated weight | training with many tokens, dense matrices, a plain layer of float32 or float64 | 3 | 6 | V', twice |
| thin products | other training | 4 | 6 to 9 | nothing, or B with its scales |
| evaluation | without gradients | 4 | - | nothing; factors and scales are kept |

Forward and backward are passes over tensors of (tokens, out), read or written, beyond those of the base's own product.
For the backward pass y_b and z are saved, not the layer's inputs or the update.

Dimensions: T tokens, I in, O out, R rank; of a sharded weight, those of this process's shard.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engines.tensor_parallel import local
from ..matrices.dense import DenseMatrices
from ..matrices.interface import Matrices, projected
from ..method import functional as F
from ..method.functional import Vectors
from ..method.gain import PackedFactors
from ..method.small_rows import SmallRows
from ..ops.annotations import Float
from ..ops.chunked import rescaled, sum_of_products
from ..ops.dtypes import as_dtype, norm_dtype, without_autocast
from ..ops.tracing import grad_recorded, is_batched, is_traced
from .adapted_weight import AdaptedWeight
from .factors import PassFactors, Prepared
from .tensor_state import SameTensor


class Update(NamedTuple):
    """What one adapter does to the outputs of one layer in one pass."""

    adapted: AdaptedWeight
    vectors: Vectors
    factors: PassFactors
    bias: Float[Tensor, "O"] | None
    """The base's."""

    @property
    def matrices(self) -> Matrices:
        """A and B."""
        return self.adapted.matrices

    def with_factors(self, packed: PackedFactors) -> "Update":
        """The same with other factors."""
        return self._replace(factors=PassFactors(packed))


def adapted_linear(
    update: Update, base_output: Float[Tensor, "*T O"], x: Float[Tensor, "*T I"], small: SmallRows | None = None
) -> Float[Tensor, "*T O"]:
    """The output from that of the base by two thin products.

    Args:
        update: the adapter's.
        base_output: `x W^T + bias`.
        x: the inputs of the update.
        small: rows that are small beside their bias.

    Raises:
        TypeError, ValueError: inputs or outputs are not those of the weight's shard.
    """
    adapted = update.adapted
    if adapted.shard is not None:
        adapted.shard.check_sizes(x, base_output, adapted.name)
        update = update._replace(bias=local(update.bias))
    if small is not None:
        factors = update.factors.packed.rows
        others = update.with_factors(PackedFactors.of(small.left_out(factors), update.factors.packed.lambda_d))
        return small.added(adapted_linear(others, base_output, x), factors)
    if is_traced():
        return _traced(update, base_output, x)
    z = project(adapted, x) if adapted.rank else None
    if not grad_recorded():
        return _forward(update, base_output, z)
    y: Tensor = _ThinProducts.apply(
        base_output, z, update.factors.packed.lambda_d, update.factors.packed.trained, update.bias, update
    )
    return y


def updated_linear(update: Update, layer: nn.Linear, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
    """The output by way of the updated weight V', where `takes_updated_weight` says so."""
    adapted, vectors, bias = update.adapted, update.vectors.to(update.adapted.w.dtype), update.bias
    beta = F.row_scale(vectors.lambda_b, adapted.w, adapted.scaling, adapted.direction)
    z = project(adapted, x)
    updated = _UpdatedLinear.apply(x, z, layer.weight, bias, vectors.lambda_d, beta, update.matrices)
    y: Tensor = _ThinProducts.apply(
        updated, None, vectors.lambda_d.detach(), update.factors.packed.trained, bias, update
    )
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


def _forward(update: Update, base_output: Float[Tensor, "*T O"], z: Float[Tensor, "*T R"] | None) -> Tensor:
    packed, bias, rows = update.factors.packed, update.bias, _rows(base_output)
    gain = packed.constant[0]
    if z is None:
        return _reshaped(_rescaled(rows, packed, bias), base_output)
    matrices = update.matrices
    if matrices.use_triton and base_output.is_cuda:
        return _reshaped(_forward_in_triton(update, rows, _rows(z)), base_output)
    prepared = _prepared(update, z.dtype, base_output.dtype)
    y = as_dtype(prepared.update(_rows(z)), base_output.dtype)
    if y.dtype.itemsize < 4:
        # In half precision a gain near one would round to one.
        y = rescaled(rows, gain, prepared.offset, y)
    else:
        y.addcmul_(rows, gain)
    return _reshaped(y, base_output)


def _prepared(update: Update, dtype: torch.dtype, outputs: torch.dtype) -> Prepared:
    """The update for tokens of a dtype, kept with factors that are kept."""
    kept, bias = update.factors.prepared, update.bias
    if kept is not None and (known := kept.get((dtype, outputs))) is not None and known.fits(bias):
        return known
    # Copied before it is used, since another thread may write to it meanwhile.
    same = None if bias is None else SameTensor(bias)
    copied = None if bias is None or kept is None or not bias.is_cpu else bias.detach().clone()
    bias = bias if copied is None else copied
    gain_minus_one, scale = update.factors.packed.trained.detach().unbind()
    offset = None if bias is None else gain_minus_one * bias
    # Subtracted within the product, where that is in the dtype of the outputs.
    shift = None if offset is None or outputs.itemsize < 4 else offset.neg()
    made = update.matrices.prepared_update(update.factors.packed.lambda_d.detach(), scale, shift, dtype)
    prepared = Prepared(made, offset if shift is None else None, same, copied)
    if kept is not None:
        kept[dtype, outputs] = prepared
    return prepared


def _rescaled(rows: Float[Tensor, "S O"], packed: PackedFactors, bias: Float[Tensor, "O"] | None) -> Tensor:
    """`g rows - (g - 1) bias`: outputs without an update, and gradients of the base's outputs."""
    gain = packed.constant[0]
    offset = None if bias is None else packed.trained[0].detach() * bias
    if rows.dtype.itemsize < 4:
        return rescaled(rows, gain, offset)
    y = rows * gain
    return y if offset is None else y.sub_(offset)


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
        ctx.update = update
        ctx.save_for_backward(base_output, z, lambda_d, trained, bias)
        return _forward(update, base_output, z)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        base_output, z, lambda_d, trained, bias = ctx.saved_tensors
        update, needed = ctx.update, ctx.needs_input_grad
        if torch.is_grad_enabled() or is_batched(grad_output):
            inputs = (base_output, z, lambda_d, trained, bias)
            return *_differentiable_gradients(grad_output, inputs, needed, update.matrices), None
        rows, outputs, packed = _rows(grad_output), _rows(base_output), update.factors.packed
        d_base: Tensor | None
        d_z = d_lambda_d = None
        if z is not None and update.matrices.use_triton and grad_output.is_cuda:
            d_base, d_z, d_lambda_d, d_trained = _backward_in_triton(update, rows, outputs, _rows(z))
        else:
            d_base = _rescaled(rows, packed, None) if needed[0] else None
            d_trained = torch.zeros_like(trained) if z is None else torch.empty_like(trained)
            if needed[3]:
                _gain_gradient(rows, outputs, bias, d_trained[0])
            if z is not None and any(needed[1:4]):
                same, scale = as_dtype(rows, z.dtype), packed.trained[1].detach()
                d_z, d_lambda_d = update.matrices.update_gradients(same, _rows(z), lambda_d, scale, d_trained[1])
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


def _traced(update: Update, base_output: Float[Tensor, "*T O"], x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
    """By operations that PyTorch sees and differentiates."""
    factors = update.factors.packed.rows
    if update.adapted.rank:
        low = factors.scale * low_rank(update.adapted, x, update.vectors.lambda_d)
    else:
        low = base_output.new_zeros(1).expand_as(base_output)
    return F.combine(base_output, low, factors.gain_minus_one, update.bias)


def _differentiable_gradients(
    grad_output: Tensor, inputs: Sequence[Tensor | None], needed: Sequence[bool], matrices: Matrices
) -> list[Tensor | None]:
    """The gradients as a graph, for derivatives of higher order, and for batches of them."""
    graph = torch.is_grad_enabled()
    wanted = [need for need, _ in zip(needed, inputs, strict=False)]
    with torch.enable_grad():
        # Views: factors of all layers come from one node, to which there is also a way through the layers before.
        inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        base_output, z, lambda_d, trained, bias = inputs
        assert base_output is not None
        assert lambda_d is not None
        assert trained is not None
        low = base_output.new_zeros(1).expand_as(base_output)
        if z is not None:
            low = trained[1] * matrices.expand(z * as_dtype(lambda_d, z.dtype), base_output.shape[-1])
        y = F.combine(base_output, low, trained[0], bias)
        of = [tensor for tensor, need in zip(inputs, wanted, strict=True) if need and tensor is not None]
        found = iter(torch.autograd.grad(y, of, grad_output, create_graph=graph, allow_unused=True))
    return [next(found) if need and tensor is not None else None for tensor, need in zip(inputs, wanted, strict=True)]


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


def _forward_in_triton(update: Update, rows: Float[Tensor, "S O"], z: Float[Tensor, "S R"]) -> Float[Tensor, "S O"]:
    from ..ops.triton import combine as fused

    gain_minus_one, scale = update.factors.packed.trained.detach().unbind()
    low = update.matrices.expand(z * as_dtype(update.factors.packed.lambda_d.detach(), z.dtype), rows.shape[1])
    return fused.combine(rows, low, gain_minus_one, scale, update.bias)


def _backward_in_triton(
    update: Update, grad_output: Float[Tensor, "S O"], outputs: Float[Tensor, "S O"], z: Float[Tensor, "S R"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the base's outputs, z, lambda_d, and g and scale; those of the outputs' size in one pass."""
    from ..ops.triton import combine as fused

    matrices, inner = update.matrices, as_dtype(update.factors.packed.lambda_d.detach(), z.dtype)
    gain_minus_one, scale = update.factors.packed.trained.detach().unbind()
    low = matrices.expand(z * inner, grad_output.shape[1]) if matrices.products_are_cheap else None
    found = fused.combine_backward(grad_output, outputs, low, gain_minus_one, scale, update.bias)
    d_scale = found.scale
    if d_scale is None:
        assert isinstance(matrices, DenseMatrices)
        d_scale = matrices.update_products(as_dtype(grad_output, z.dtype), z, inner, scale)[1]
    h = matrices.expand_transpose(as_dtype(found.scaled, z.dtype), z.shape[1])
    d_lambda_d = sum_of_products(h, z)
    return found.base, h.mul_(inner), d_lambda_d, torch.stack([found.gain, d_scale])


def _total(rows: Float[Tensor, "S O"]) -> Float[Tensor, "O"]:
    return rows.sum(0, dtype=norm_dtype(rows.dtype))


def _rows(tokens: Float[Tensor, "*T N"]) -> Float[Tensor, "S N"]:
    return tokens.reshape(-1, tokens.shape[-1])


def _reshaped(rows: Float[Tensor, "S O"], like: Float[Tensor, "*T O"]) -> Float[Tensor, "*T O"]:
    """Not a view to autograd, so callers may write into it."""
    whole: Tensor = torch.ops.aten._unsafe_view(rows, like.shape)
    return whole
