"""The outputs of a linear layer with an adapted weight: from those of its base, or from the updated weight.

Dimensions: T tokens, I in, O out, R rank; of a weight that processes divide, those of the part that this one holds.
"""

from torch import Tensor, nn

from ..engines.tensor_parallel import local
from ..matrices.dense import DenseMatrices
from ..matrices.interface import projected
from ..method import functional as F
from ..method.combine import combine
from ..method.functional import RowFactors
from ..method.small_rows import SmallRows
from ..method.updated_weight import updated_linear
from ..ops.annotations import Float
from ..ops.tracing import transforming
from .adapted_weight import AdaptedWeight


def combined(
    adapted: AdaptedWeight,
    base_output: Float[Tensor, "*T O"],
    x: Float[Tensor, "*T I"],
    lambda_d: Float[Tensor, "R"],
    factors: RowFactors,
    bias: Float[Tensor, "O"] | None,
    small: SmallRows | None = None,
) -> Float[Tensor, "*T O"]:
    """The output, from that of the base.

    Args:
        adapted: the weight.
        base_output: `x W^T + bias`.
        x: the inputs of the update.
        lambda_d: the trained vector.
        factors: of this adapter.
        bias: the base's, or None.
        small: rows that are small beside their bias.

    Raises:
        TypeError, ValueError: inputs or outputs are not those of the part of the weight.
    """
    if adapted.part is not None:
        adapted.part.check_sizes(x, base_output, adapted.name)
    if small is not None:
        others = combined(adapted, base_output, x, lambda_d, small.left_out(factors), bias)
        return small.added(others, factors)
    bias = local(bias)
    if transforming():
        nothing = base_output.new_zeros(1).expand_as(base_output)
        update = factors.scale * low_rank(adapted, x, lambda_d) if adapted.rank else nothing
        return F.combine(base_output, update, factors.gain_minus_one, bias)
    z = _z(adapted, x) if adapted.rank else None
    g1, scale, gain, _ = factors
    return combine(base_output, z, lambda_d, g1, scale, bias, adapted.matrices, gain)


def from_updated_weight(
    adapted: AdaptedWeight,
    layer: nn.Linear,
    x: Float[Tensor, "*T I"],
    lambda_d: Float[Tensor, "R"],
    factors: RowFactors,
) -> Float[Tensor, "*T O"]:
    """The output by way of the updated weight; for a strength of one (`routes`)."""
    matrices = adapted.matrices
    assert isinstance(matrices, DenseMatrices)
    updated = updated_linear(x, _z(adapted, x), layer.weight, layer.bias, lambda_d, factors.beta, matrices)
    g1, scale, gain, _ = factors
    return combine(updated, None, lambda_d, g1, scale, layer.bias, matrices, gain)


def low_rank(adapted: AdaptedWeight, x: Float[Tensor, "*T I"], lambda_d: Float[Tensor, "R"]) -> Float[Tensor, "*T O"]:
    """`((x A^T) lambda_d) B^T`, in the dtype of `x`."""
    z = _z(adapted, x)
    return adapted.matrices.expand(z * lambda_d.to(z.dtype), len(adapted.w))


def _z(adapted: AdaptedWeight, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T R"]:
    """`x A^T`, made once for layers that read the same inputs."""
    part, shared = adapted.part, adapted.shared
    if part is not None and part.inputs is not None:
        return part.z(projected(x, adapted.rank, adapted.matrices))
    z = shared.project_once(x, adapted.rank, adapted)
    return z if part is None else part.z(z)
