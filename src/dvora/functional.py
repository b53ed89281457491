"""The method as pure functions: magnitude and direction of a weight (DoRA) adapted by shared random matrices (VeRA).

    w  = ||W||_row
    V' = W + diag(beta) B diag(lambda_d) A          beta = c w lambda_b ("unit") or c lambda_b ("weight")
    n  = ||V'||_row,   g = m / n,   W' = diag(g) V'
    y  = x W'^T + bias

W, A and B are frozen, so the norm needs no dense update. With A = L Q, the rows of Q orthonormal, every row of W is a
point P = W Q^T in the row space of A and a rest outside, which the update never reaches:

    U     = B diag(lambda_d) L
    cross = rowsum(P * U),   q = rowsum(U * U)
    n**2  = w**2 + 2 beta cross + beta**2 q = rest**2 + ||P + diag(beta) U||_row**2

The first form is exact for small updates, the second for a row that the update nearly cancels.

Dimensions: T tokens, I in, O out, R rank, K = min(R, I). lambda_b, lambda_d and their sizes are those of the VeRA paper
(arXiv 2310.11454); m and the norm those of DoRA (arXiv 2402.09353).
"""

from contextlib import nullcontext
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .precision import norm_dtype
from .projections import decompose
from .shapes import Float

Direction = Literal["unit", "weight"]
DIRECTIONS: tuple[str, ...] = get_args(Direction)

NEAR_CANCELLATION = -0.9
"""Below this relative change of the squared norm the form without cancellation is used."""


class Vectors(NamedTuple):
    """The trained vectors of one adapted weight."""

    magnitude: Float[Tensor, "O"]
    lambda_b: Float[Tensor, "O"]
    lambda_d: Float[Tensor, "R"]


class NormConstants(NamedTuple):
    """What the norm needs to know of one frozen weight, for one pair of projections."""

    w: Float[Tensor, "O"]
    """Row norms of W."""
    coordinates: Float[Tensor, "O K"]
    """P: the rows of W in the orthonormal basis Q of the row space of A."""
    rest_squared: Float[Tensor, "O"]
    """Squared norms of what of each row lies outside that space."""
    factor: Float[Tensor, "R K"]
    """L of A = L Q: one tensor for all weights of the same width."""


def row_norm(weight: Float[Tensor, "O I"]) -> Float[Tensor, "O"]:
    """Euclidean norm of each row, in float32 (float64 for a float64 weight)."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=norm_dtype(weight.dtype))
    return norms


def norm_constants(
    weight: Float[Tensor, "O I"], factor: Float[Tensor, "R K"], basis: Float[Tensor, "K I"]
) -> NormConstants:
    """The constants of a weight's norm, differentiable in the weight.

    Args:
        weight: W, in any floating dtype.
        factor, basis: L and Q of `decompose(A)`, in the dtype the constants shall have.
    """
    wide = weight.to(basis.dtype)
    coordinates = wide @ basis.T
    return NormConstants(row_norm(wide), coordinates, row_norm(wide - coordinates @ basis).square(), factor)


def row_scale(
    lambda_b: Float[Tensor, "O"], w: Float[Tensor, "O"], scaling: float, direction: Direction
) -> Float[Tensor, "O"]:
    """beta, the scale of each row's update: added to the unit rows W / w ("unit") or to W itself ("weight")."""
    return scaling * w * lambda_b if direction == "unit" else scaling * lambda_b


def relative_norm(
    constants: NormConstants, B: Float[Tensor, "O R"], lambda_d: Float[Tensor, "R"], beta: Float[Tensor, "O"]
) -> tuple[Float[Tensor, "O"], Float[Tensor, "O"]]:
    """How the update changes the row norms, from vectors alone.

    Returns:
        `eps = n**2 / w**2 - 1` and `s = n / w`; zero and one for a zero row of W.
    """
    w, P, rest_squared, L = constants
    U = (B * lambda_d) @ L
    live = w > 0
    w2 = torch.where(live, w.square(), 1.0)
    cross, q = torch.linalg.vecdot(P, U), torch.linalg.vecdot(U, U)
    eps = (2 * beta * cross + beta.square() * q) / w2
    squared, near = 1 + eps, eps < NEAR_CANCELLATION
    if _may_hold(near):
        shifted = torch.addcmul(P, beta[:, None], U)
        # A row that vanishes altogether has no direction; the floor keeps its gain finite.
        floor = torch.finfo(w.dtype).eps ** 2
        exact = (rest_squared + torch.linalg.vecdot(shifted, shifted)) / w2
        squared = torch.where(near, exact.clamp_min(floor), squared)
    return torch.where(live, eps, 0.0), torch.where(live, squared, 1.0).sqrt()


def _may_hold(condition: Tensor) -> bool:
    """Whether a condition holds in some row, or yes where it cannot be asked: in a graph, under vmap, on a device."""
    if torch.compiler.is_compiling() or condition.device.type != "cpu":
        return True
    try:
        return bool(condition.any())
    except RuntimeError:
        return True


def row_angle(
    constants: NormConstants, B: Float[Tensor, "O R"], lambda_d: Float[Tensor, "R"], beta: Float[Tensor, "O"]
) -> Float[Tensor, "O"]:
    """Angle between each row of W and the same row of V', in radians; zero for a zero row of W."""
    w, P, _, L = constants
    U = (B * lambda_d) @ L
    cross, q, w2 = torch.linalg.vecdot(P, U), torch.linalg.vecdot(U, U), w.square()
    # atan2 of the parts across and along the row: arccos would lose half the digits of a small angle.
    across = beta.abs() * (q * w2 - cross.square()).clamp_min(0).sqrt()
    return torch.where(w > 0, torch.atan2(across, w2 + beta * cross), 0.0)


def gain_minus_one(
    vectors: Vectors,
    constants: NormConstants,
    B: Float[Tensor, "O R"],
    beta: Float[Tensor, "O"],
    detach_norm: bool = False,
) -> Float[Tensor, "O"]:
    """`g - 1 = m / n - 1` of every row without cancellation: exactly zero where nothing was trained.

    Args:
        vectors: magnitude, lambda_b, lambda_d.
        constants: of the frozen weight.
        B: shared matrix.
        beta: of `row_scale`.
        detach_norm: leave the gradient through n out (DoRA, section 4.3).
    """
    with torch.no_grad() if detach_norm else nullcontext():
        eps, s = relative_norm(constants, B, vectors.lambda_d, beta)
    w = constants.w.detach() if detach_norm else constants.w
    live = w > 0
    mu = vectors.magnitude / torch.where(live, w, 1.0) - 1
    return torch.where(live, (mu - eps / (1 + s)) / s, 0.0)


def combine(
    base_output: Float[Tensor, "*T O"],
    update: Float[Tensor, "*T O"],
    gain_minus_one: Float[Tensor, "O"],
    bias: Float[Tensor, "O"] | None,
) -> Float[Tensor, "*T O"]:
    """`g x W^T + update + bias` from a base output that already holds the bias; in the base output's dtype.

    The gain enters as `g` on the outputs and as `g - 1` on the bias, so that `g = 1` returns the base's own bits.
    Several adapters on one weight add up: pass the sums of their updates and of their `g - 1`.

    Args:
        base_output: `x W^T + bias`.
        update: `g beta ((x A^T) lambda_d) B^T`.
        gain_minus_one: `g - 1`, float32 or float64.
        bias: the base's, or None.
    """
    y = torch.addcmul(update, base_output, 1 + gain_minus_one)
    if bias is not None:
        y = y - gain_minus_one * bias
    return y.to(base_output.dtype)


def rescaled_delta(
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    lambda_d: Float[Tensor, "R"],
    beta: Float[Tensor, "O"],
    gain_minus_one: Float[Tensor, "O"],
) -> Float[Tensor, "O I"]:
    """`W' - W = (g - 1) W + g beta B diag(lambda_d) A`, dense, in the dtype of the gain; exactly zero if untrained."""
    update = (beta[:, None] * B * lambda_d) @ A
    # g by itself, because g - 1 times an update far above W would cancel the update.
    return gain_minus_one[:, None] * weight.to(beta.dtype) + (1 + gain_minus_one)[:, None] * update


def gain(
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    vectors: Vectors,
    constants: NormConstants | None = None,
    *,
    scaling: float = 1.0,
    direction: Direction = "unit",
    detach_norm: bool = False,
) -> Float[Tensor, "O"]:
    """`g = m / n` of every row; one for a zero row of W.

    Args:
        weight: W, (O, I).
        A, B: shared matrices, in the dtype of the vectors.
        vectors: magnitude, lambda_b, lambda_d.
        constants: `norm_constants(weight, *decompose(A))`; made here, at the cost of a QR of A, when left out.
        scaling: c = alpha / rank.
        direction: "unit" or "weight".
        detach_norm: leave the gradient through n out (DoRA, section 4.3).
    """
    _, g1 = _row_terms(weight, A, B, vectors, constants, scaling, direction, detach_norm)
    return 1 + g1


def dvora_linear(
    x: Float[Tensor, "*T I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, "O"] | None,
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    vectors: Vectors,
    constants: NormConstants | None = None,
    *,
    scaling: float = 1.0,
    direction: Direction = "unit",
    detach_norm: bool = False,
) -> Float[Tensor, "*T O"]:
    """`torch.nn.functional.linear(x, weight, bias)` with the weight adapted. Other arguments as for `gain`."""
    beta, g1 = _row_terms(weight, A, B, vectors, constants, scaling, direction, detach_norm)
    z = x @ A.to(x.dtype).T
    update = (1 + g1) * beta * ((z * vectors.lambda_d.to(x.dtype)) @ B.to(x.dtype).T)
    return combine(torch.nn.functional.linear(x, weight, bias), update, g1, bias)


def delta_weight(
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    vectors: Vectors,
    constants: NormConstants | None = None,
    *,
    scaling: float = 1.0,
    direction: Direction = "unit",
) -> Float[Tensor, "O I"]:
    """`W' - W`, dense, in the dtype of the vectors. Arguments as for `gain`."""
    beta, g1 = _row_terms(weight, A, B, vectors, constants, scaling, direction, detach_norm=False)
    return rescaled_delta(weight, A, B, vectors.lambda_d, beta, g1)


def merged_weight(
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    vectors: Vectors,
    constants: NormConstants | None = None,
    *,
    scaling: float = 1.0,
    direction: Direction = "unit",
) -> Float[Tensor, "O I"]:
    """`W'`, dense, in the dtype of the vectors; W to the last bit if untrained. Arguments as for `gain`."""
    delta = delta_weight(weight, A, B, vectors, constants, scaling=scaling, direction=direction)
    return weight.to(delta.dtype) + delta


def _row_terms(
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    vectors: Vectors,
    constants: NormConstants | None,
    scaling: float,
    direction: Direction,
    detach_norm: bool,
) -> tuple[Float[Tensor, "O"], Float[Tensor, "O"]]:
    """`beta` and `g - 1` of every row, from the whole layer."""
    constants = constants or norm_constants(weight, *decompose(A))
    beta = row_scale(vectors.lambda_b, constants.w, scaling, direction)
    return beta, gain_minus_one(vectors, constants, B, beta, detach_norm)
