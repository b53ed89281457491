"""The factors of the rows of many weights of one shape as one autograd function with closed-form gradients.

In the units of `functional.row_change` (u, b and h are of the order of one, whatever the vectors are):

g = m / (k h),   scale = g beta = m b / h,   h**2 = u**2 + 2 b cross / k + b**2 q

dL/dh       = -(g dL/dg + scale dL/dscale) / h
dL/dm       = (dL/dg / k + b dL/dscale) / h
dL/dbeta    = g dL/dscale + dL/dh (cross / k + b q) / (k h)
dL/dlambda_d through cross (dL/dh b / (k h)) and q (dL/dh b**2 / (2 h))

All of it acts on small vectors, so one operation on the stacked vectors of all layers costs what one layer's would.
What the backward pass needs is computed here and never changes, so it is kept on the node, not as saved tensors: any
number of forward passes may use the factors, and any number of backward passes may reach them.

Dimensions: L layers, O out, R rank.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..ops.annotations import Float
from ..ops.dtypes import as_dtype, full_precision, without_autocast
from ..ops.tracing import grad_recorded, gradients_of, is_batched, saved_tensors_are_hooked, version_of
from . import functional as F
from .functional import NEAR_CANCELLATION, Direction, RowFactors, Vectors, measured_ratio, row_scale
from .norm import FrozenNorm, crosses, crosses_gradient


class RowSettings(NamedTuple):
    """What the layers of one call have in common besides their shape."""

    scaling: float
    """c = alpha / rank."""
    direction: Direction
    detach_norm: bool
    """Leave the gradient through the norm out (DoRA, section 4.3)."""


class PackedFactors(NamedTuple):
    """The factors of one layer's rows as few tensors, which token functions take as they are."""

    trained: Float[Tensor, "2 O"]
    """`g - 1` and `g beta`."""
    constant: Float[Tensor, "3 O"]
    """`g`, `1 - g` and `beta`, without a gradient."""
    lambda_d: Float[Tensor, "R"]
    """The vector itself, so that its gradients from tokens and norm are added for all layers at once."""

    @classmethod
    def of(cls, factors: RowFactors, lambda_d: Float[Tensor, "R"]) -> "PackedFactors":
        """The same from separate tensors."""
        gain_minus_one, scale, gain, beta = factors
        return cls(torch.stack([gain_minus_one, scale]), _constant(gain, gain_minus_one, beta), lambda_d)

    @property
    def rows(self) -> RowFactors:
        """The factors as separate tensors."""
        (gain_minus_one, scale), (gain, _, beta) = self.trained.unbind(), self.constant.unbind()
        return RowFactors(gain_minus_one, scale, gain, beta)

    def weakened(self, strength: Tensor) -> "PackedFactors":
        """The factors of `W + s (W' - W)`, for s without dimensions; for s = 1 these."""
        gain, _, beta = self.constant.unbind()
        # For a strength of one exactly the gain.
        weaker = torch.lerp(torch.ones_like(gain), gain, strength.to(gain.dtype))
        trained = strength * self.trained
        return PackedFactors(trained, _constant(weaker, trained[0], beta), self.lambda_d)


def _constant(gain: Tensor, gain_minus_one: Tensor, beta: Tensor) -> Float[Tensor, "3 O"]:
    return torch.stack([gain.detach(), -gain_minus_one.detach(), beta.detach()])


class StackedFactors(NamedTuple):
    """The factors of several layers, and the vectors that they were made from."""

    packed: list[PackedFactors]
    vectors: Vectors
    measured: bool
    """Whether rows of some layer were measured, whose graph serves one backward pass only."""


def row_factors(vectors: Sequence[Vectors], norms: Sequence[FrozenNorm], settings: RowSettings) -> StackedFactors:
    """`functional.row_factors` of layers with frozen weights of one shape.

    On the CPU, rows that an update nearly cancels are measured from the weight, with a graph of their own.

    Args:
        vectors: of every layer.
        norms: of every layer; they differ in w, C and the weight only.
        settings: of all of them.
    """
    with full_precision(norms[0].w.device):
        if grad_recorded():
            leaves = [vector for three in zip(*vectors, strict=True) for vector in three]
            # What is not a saved tensor would outlive a checkpoint around it.
            keeps = not saved_tensors_are_hooked()
            state, *made = _RowFactors.apply(norms, settings, keeps, *leaves)
        else:
            state = _forward(vectors, norms, settings, trains=False, keeps_half_dq=False)
            made = [*state.trained.unbind(), *state.vectors.lambda_d.unbind()]
        trained, lambdas_d = made[: len(norms)], made[len(norms) :]
        packed = [
            PackedFactors(*of_layer) for of_layer in zip(trained, state.constant.unbind(), lambdas_d, strict=True)
        ]
        near = _nearly_cancelled(state)
        layers = [] if near is None else near.any(1).nonzero()[:, 0].tolist()
        measured = [layer for layer in layers if norms[layer].matrix is not None]
        for layer in measured:
            assert near is not None
            rows = near[layer].nonzero()[:, 0]
            with _saved_here():
                packed[layer] = _with_measured(rows, packed[layer], vectors[layer], norms[layer], settings)
        return StackedFactors(packed, state.vectors, bool(measured))


class _State(NamedTuple):
    """Factors, and what their gradients are computed from."""

    trained: Float[Tensor, "L 2 O"]
    constant: Float[Tensor, "L 3 O"]
    vectors: Vectors
    """Of all layers."""
    beta_unit: Tensor | float
    """beta / lambda_b."""
    k: Float[Tensor, "L O"]
    u: Float[Tensor, "L O"]
    b: Float[Tensor, "L O"]
    h: Float[Tensor, "L O"]
    inner: Float[Tensor, "L O"]
    """`cross / k + b q`."""
    live: Tensor | None
    """Which rows of W are not zero; None: all."""
    fixed: Tensor | None
    """Which norms are at their floor."""
    half_dq: Float[Tensor, "L R O"] | None
    """Kept where it is small."""


def _forward(
    vectors: Sequence[Vectors], norms: Sequence[FrozenNorm], settings: RowSettings, trains: bool, keeps_half_dq: bool
) -> _State:
    norm = norms[0]
    w = torch.stack([of_layer.w for of_layer in norms])
    # The vectors may have been cast to half precision; the norm is not computed in it.
    m, lambda_b, lambda_d = (as_dtype(torch.stack(three), w.dtype) for three in zip(*vectors, strict=True))
    beta_unit = settings.scaling * w if settings.direction == "unit" else settings.scaling
    beta = turned = lambda_b * beta_unit
    live = (w > 0) if any(of_layer.zero_rows for of_layer in norms) else None
    if live is not None:
        w, turned = torch.where(live, w, 1.0), torch.where(live, beta, 0.0)
    half_dq = norm.half_dq(lambda_d) if keeps_half_dq else None
    q, cross = norm.squares(lambda_d, half_dq), crosses(norms, lambda_d)

    k = torch.maximum(w, turned.abs())
    u, b, cross = w / k, turned / k, cross / k
    inner = torch.addcmul(cross, b, q)
    u2 = u.square()
    change = torch.maximum(cross.add_(inner).mul_(b), -u2)
    h2, smallest = u2 + change, torch.finfo(w.dtype)
    floor = u2.mul_(smallest.eps**2).add_(smallest.tiny)
    # At its floor the norm is constant.
    fixed = h2 < floor if trains else None
    h = torch.maximum(h2, floor).sqrt_()

    trained, constant = (torch.empty(len(w), n, w.shape[1], dtype=w.dtype, device=w.device) for n in (2, 3))
    of_unit = m / k
    torch.div(of_unit, h, out=constant[:, 0])
    torch.div(of_unit.sub_(u).sub_(change.div_(u + h)), h, out=trained[:, 0])
    torch.div(m * b, h, out=trained[:, 1])
    constant[:, 2] = beta
    if live is not None:
        trained[:, 0].masked_fill_(~live, 0.0)
        torch.where(live, trained[:, 1], beta, out=trained[:, 1])
        constant[:, 0].masked_fill_(~live, 1.0)
    torch.neg(trained[:, 0], out=constant[:, 1])
    return _State(trained, constant, Vectors(m, lambda_b, lambda_d), beta_unit, k, u, b, h, inner, live, fixed, half_dq)


class _RowFactors(torch.autograd.Function):
    """From all magnitudes, all lambda_b and all lambda_d to `g - 1` and `g beta` of every layer."""

    @staticmethod
    def forward(
        ctx: Any, norms: Sequence[FrozenNorm], settings: RowSettings, keeps: bool, *leaves: Tensor
    ) -> tuple[Any, ...]:
        ctx.norms, ctx.settings, ctx.leaves = norms, settings, leaves
        ctx.versions = [version_of(leaf) for leaf in leaves]
        layers = len(norms)
        # What backward reads again must not have been written to in between.
        ctx.read_again = [(n.matrix, version_of(n.matrix)) for n in norms if n.C is None and n.matrix is not None]
        trains = not settings.detach_norm
        keeps_half_dq = keeps and trains and any(ctx.needs_input_grad[-layers:])
        state = ctx.state = _forward(_by_layer(leaves, layers), norms, settings, trains, keeps_half_dq)
        ctx.set_materialize_grads(False)
        return state, *state.trained.unbind(), *state.vectors.lambda_d.unbind()

    @staticmethod
    @without_autocast
    def backward(ctx: Any, _: None, *all_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        norms, settings = ctx.norms, ctx.settings
        gradients, of_lambda_d = all_gradients[: len(norms)], all_gradients[len(norms) :]
        if any(version_of(matrix) != version for matrix, version in ctx.read_again):
            raise RuntimeError(
                "a base weight was written to between the forward and the backward pass of an adapted layer, which "
                "computes its norm from the weight again in the backward pass; write to it after backward"
            )
        if torch.is_grad_enabled() or any(g is not None and is_batched(g) for g in all_gradients):
            if [version_of(leaf) for leaf in ctx.leaves] != ctx.versions:
                raise RuntimeError(
                    "a vector was written to between the forward pass and a backward pass that computes from it again "
                    "(create_graph or is_grads_batched); write to it after backward"
                )
            return None, None, None, *_differentiable_gradients(gradients, of_lambda_d, ctx.leaves, norms, settings)
        state: _State = ctx.state
        gain, scale = state.constant[:, 0], state.trained[:, 1]
        vectors, beta_unit, k, b, h = state.vectors, state.beta_unit, state.k, state.b, state.h
        live, fixed = state.live, state.fixed
        d_g, d_scale = _stacked(gradients, state.trained[0]).unbind(1)
        d_m = torch.addcmul(d_g / k, b, d_scale).div_(h)
        d_beta = gain * d_scale
        if live is not None:
            d_m, d_beta = torch.where(live, d_m, 0.0), torch.where(live, d_beta, d_scale)
        d_lambda_d = _stacked(of_lambda_d, vectors.lambda_d[0])
        if fixed is not None:
            minus_d_h = torch.addcmul(gain * d_g, scale, d_scale).div_(h)
            minus_d_h.masked_fill_(fixed if live is None else fixed | ~live, 0.0)
            kh = k * h
            d_beta.addcmul_(minus_d_h, state.inner / kh, value=-1)
            minus_d_change = minus_d_h.mul_(b)
            half = norms[0].squares_half_gradient((minus_d_change * b).div_(h), vectors.lambda_d, state.half_dq)
            # The largest of what is kept; another backward pass makes it again.
            ctx.state = state._replace(half_dq=None)
            d_lambda_d -= half.add_(crosses_gradient(norms, minus_d_change.div_(kh)))
        used = [not (g is None and d is None) for g, d in zip(gradients, of_lambda_d, strict=True)]
        return None, None, None, *_unbound(used, d_m, d_beta * beta_unit, d_lambda_d)


def _stacked(gradients: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Gradients of all layers, zero for those that were not used."""
    zero = torch.zeros_like(like) if any(g is None for g in gradients) else like
    return torch.stack([zero if g is None else g for g in gradients])


def _unbound(used: Sequence[bool], *stacked: Tensor) -> list[Tensor | None]:
    """The rows of stacked gradients as views, for the layers that were used."""
    return [row if is_used else None for each in stacked for row, is_used in zip(each.unbind(), used, strict=True)]


def _by_layer(leaves: Sequence[Tensor], layers: int) -> list[Vectors]:
    """The vectors of every layer, from all magnitudes, all lambda_b and all lambda_d."""
    return [Vectors(*leaves[index::layers]) for index in range(layers)]


def _nearly_cancelled(state: _State) -> Tensor | None:
    """Which rows the updates nearly cancel; None without any, and on devices that would have to synchronise."""
    if not state.h.is_cpu:
        return None
    share, limit = state.h / state.u, NEAR_CANCELLATION**0.5
    return share < limit if share.numel() and share.min() < limit else None


def _saved_here() -> AbstractContextManager[object]:
    """Keep what is saved for a backward pass from the hooks around it.

    A checkpoint counts what is saved in both runs of its part, of which one may make factors and the other find them.
    """
    return saved_tensors_hooks(Tensor.detach, _itself) if saved_tensors_are_hooked() else nullcontext()


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _with_measured(
    rows: Tensor, packed: PackedFactors, vectors: Vectors, norm: FrozenNorm, settings: RowSettings
) -> PackedFactors:
    """The factors, with those of some rows computed from V' itself."""
    vectors, w = vectors.to(norm.w.dtype), norm.w[rows]
    beta = row_scale(vectors.lambda_b, norm.w, settings.scaling, settings.direction)[rows]
    with torch.set_grad_enabled(grad_recorded() and not settings.detach_norm):
        updated = norm.updated_rows(rows, beta, vectors.lambda_d)
        assert updated is not None
        n = w * measured_ratio(updated, w)
    g = vectors.magnitude[rows] / n
    trained, constant = torch.stack([g - 1, g * beta]), _constant(g, g - 1, beta)
    return packed._replace(
        trained=packed.trained.index_copy(1, rows, trained.to(w.dtype)),
        constant=packed.constant.index_copy(1, rows, constant.to(w.dtype)),
    )


def _differentiable_gradients(
    gradients: Sequence[Tensor | None],
    of_lambda_d: Sequence[Tensor | None],
    leaves: Sequence[Tensor],
    norms: Sequence[FrozenNorm],
    settings: RowSettings,
) -> list[Tensor | None]:
    """The gradients as a graph, for derivatives of higher order, and for batches of them."""
    graph, found = torch.is_grad_enabled(), list[list[Tensor | None]]()
    with torch.enable_grad():
        for layer, (gradient, d_lambda_d, norm) in enumerate(zip(gradients, of_lambda_d, norms, strict=True)):
            # Aliases: gradients end at them, whatever the vectors were computed from.
            vectors = Vectors(*(leaf.view_as(leaf) for leaf in leaves[layer :: len(norms)]))
            trained = [vector.requires_grad for vector in vectors]
            own: list[Tensor | None] = [None] * len(vectors)
            if gradient is not None and any(trained):
                wide = vectors.to(norm.w.dtype)
                beta = row_scale(wide.lambda_b, norm.w, settings.scaling, settings.direction)
                factors = F.row_factors(wide, norm, beta, settings.detach_norm)
                outputs = torch.stack([factors.gain_minus_one, factors.scale])
                own = gradients_of(outputs, vectors, gradient, graph)
            if d_lambda_d is not None and trained[-1]:
                own[-1] = d_lambda_d if own[-1] is None else own[-1] + d_lambda_d
            found.append(own)
    return [gradient for three in zip(*found, strict=True) for gradient in three]
