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
from ..ops.dtypes import full_precision, without_autocast
from ..ops.tracing import grad_recorded, gradients_of, is_batched, saved_tensors_are_hooked, version_of
from . import functional as F
from .functional import NEAR_CANCELLATION, Direction, Vectors, measured_ratio, row_scale
from .norm import FrozenNorm, crosses, crosses_gradient
from .packed_factors import PackedFactors, constant_factors


class RowSettings(NamedTuple):
    """What the layers of one call have in common besides their shape."""

    scaling: float
    """c = alpha / rank."""
    direction: Direction
    detach_norm: bool
    """Leave the gradient through the norm out (DoRA, section 4.3)."""


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
        leaves = [vector for three in zip(*vectors, strict=True) for vector in three]
        state, trained, lambdas_d = _made(leaves, norms, settings)
        packed = list(map(PackedFactors, trained, state.constant.unbind(), lambdas_d))
        measured = _measurable(state, norms)
        for layer, rows in measured:
            with saved_here():
                packed[layer] = _with_measured(rows, packed[layer], vectors[layer], norms[layer], settings)
        return StackedFactors(packed, state.vectors, bool(measured))


class FactorsOfMany(NamedTuple):
    """The factors of N adapters in L layers of one shape."""

    trained: Float[Tensor, "L N 2 O"]
    lambda_d: Float[Tensor, "L N R"]


def row_factors_of_many(vectors: Vectors, norms: Sequence[FrozenNorm], settings: RowSettings) -> FactorsOfMany:
    """The same of many adapters at once.

    Args:
        vectors: (L, N, O) and (L, N, R).
        norms, settings: as for `row_factors`.
    """
    with full_precision(norms[0].w.device):
        count = vectors.magnitude.shape[1]
        leaves = [of_kind.flatten(0, 1) for of_kind in vectors]
        state, (trained,), (lambda_d,) = _made(leaves, norms, settings)
        if measured := _measurable(state, norms):
            index = torch.tensor([entry for entry, _ in measured])
            patched = []
            for entry, rows in measured:
                own = Vectors(*(leaf[entry] for leaf in leaves))
                packed = PackedFactors(trained[entry], state.constant[entry], own.lambda_d)
                with saved_here():
                    patched.append(_with_measured(rows, packed, own, norms[entry // count], settings))
            trained = trained.index_copy(0, index, torch.stack([packed.trained for packed in patched]))
        shape = (len(norms), count)
        return FactorsOfMany(trained.unflatten(0, shape), lambda_d.unflatten(0, shape))


def _made(
    leaves: Sequence[Tensor], norms: Sequence[FrozenNorm], settings: RowSettings
) -> tuple["_State", Sequence[Tensor], Sequence[Tensor]]:
    """Factors and every lambda_d, as many tensors as there are of each vector in the leaves (`_in_stacks`)."""
    if grad_recorded():
        # What is not a saved tensor would outlive a checkpoint around it.
        keeps = not saved_tensors_are_hooked()
        state, *made = _RowFactors.apply(norms, settings, keeps, *leaves)
        return state, made[: len(made) // 2], made[len(made) // 2 :]
    state = _forward(_in_stacks(leaves), norms, settings, trains=False, keeps_half_dq=False)
    trained, lambda_d = _as_leaves(leaves, state.trained, state.vectors.lambda_d)
    return state, trained, lambda_d


def _are_stacked(leaves: Sequence[Tensor]) -> bool:
    return leaves[0].dim() > 1


def _in_stacks(leaves: Sequence[Tensor]) -> Vectors:
    """All magnitudes, all lambda_b and all lambda_d as three tensors: what the leaves are, or are stacked to."""
    if _are_stacked(leaves):
        return Vectors(*leaves)
    layers = len(leaves) // 3
    return Vectors(*(torch.stack(leaves[start : start + layers]) for start in range(0, len(leaves), layers)))  # type: ignore[arg-type]


def _as_leaves(leaves: Sequence[Tensor], *stacks: Tensor) -> list[tuple[Tensor, ...]]:
    """Stacks as the leaves are: whole, or one tensor a layer."""
    # A view, since a function may not return its inputs.
    return [(stack.view_as(stack),) if _are_stacked(leaves) else stack.unbind() for stack in stacks]


class _State(NamedTuple):
    """Factors, and what their gradients are computed from; L is layers, or those of one adapter after the other."""

    trained: Float[Tensor, "L 2 O"]
    constant: Float[Tensor, "L 2 O"]
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
    vectors: Vectors, norms: Sequence[FrozenNorm], settings: RowSettings, trains: bool, keeps_half_dq: bool
) -> _State:
    norm = norms[0]
    w = torch.stack([of_layer.w for of_layer in norms])
    # The vectors may have been cast to half precision; the norm is not computed in it.
    m, lambda_b, lambda_d = vectors.to(w.dtype)
    if len(m) > len(w):
        w = w.repeat_interleave(len(m) // len(w), 0)
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

    trained, constant = (torch.empty(len(w), 2, w.shape[1], dtype=w.dtype, device=w.device) for _ in range(2))
    of_unit = m / k
    torch.div(of_unit, h, out=constant[:, 0])
    torch.div(of_unit.sub_(u).sub_(change.div_(u + h)), h, out=trained[:, 0])
    torch.div(m * b, h, out=trained[:, 1])
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
        # What backward reads again must not have been written to in between.
        ctx.read_again = [(n.matrix, version_of(n.matrix)) for n in norms if n.C is None and n.matrix is not None]
        trains = not settings.detach_norm
        keeps_half_dq = keeps and trains and any(ctx.needs_input_grad[-len(leaves) // 3 :])
        state = ctx.state = _forward(_in_stacks(leaves), norms, settings, trains, keeps_half_dq)
        ctx.set_materialize_grads(False)
        trained, lambda_d = _as_leaves(leaves, state.trained, state.vectors.lambda_d)
        return state, *trained, *lambda_d

    @staticmethod
    @without_autocast
    def backward(ctx: Any, _: None, *all_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        norms, settings, each = ctx.norms, ctx.settings, len(all_gradients) // 2
        gradients, of_lambda_d = all_gradients[:each], all_gradients[each:]
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
        d_g, d_scale = _stacked(gradients, state.trained, ctx.leaves).unbind(1)
        d_m = torch.addcmul(d_g / k, b, d_scale).div_(h)
        d_beta = gain * d_scale
        if live is not None:
            d_m, d_beta = torch.where(live, d_m, 0.0), torch.where(live, d_beta, d_scale)
        d_lambda_d = _stacked(of_lambda_d, vectors.lambda_d, ctx.leaves)
        if fixed is not None:
            minus_d_h = torch.addcmul(gain * d_g, scale, d_scale).div_(h)
            minus_d_h.masked_fill_(fixed if live is None else fixed | ~live, 0.0)
            kh = k * h
            d_beta.addcmul_(minus_d_h, state.inner / kh, value=-1)
            minus_d_change = minus_d_h.mul_(b)
            half = norms[0].squares_half_gradient((minus_d_change * b).div_(h), vectors.lambda_d, state.half_dq)
            # The largest of what is kept; another backward pass makes it again.
            ctx.state = state._replace(half_dq=None)
            d_lambda_d = d_lambda_d - half.add_(crosses_gradient(norms, minus_d_change.div_(kh)))
        used = [not (g is None and d is None) for g, d in zip(gradients, of_lambda_d, strict=True)]
        found = _as_leaves(ctx.leaves, d_m, d_beta * beta_unit, d_lambda_d)
        return (
            None,
            None,
            None,
            *(d if is_used else None for each in found for d, is_used in zip(each, used, strict=True)),
        )


def _stacked(gradients: Sequence[Tensor | None], like: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """Gradients of all layers, zero for those that were not used."""
    if _are_stacked(leaves):
        return torch.zeros_like(like) if gradients[0] is None else gradients[0]
    zero = torch.zeros_like(like[0]) if any(g is None for g in gradients) else like
    return torch.stack([zero if g is None else g for g in gradients])


def _measurable(state: _State, norms: Sequence[FrozenNorm]) -> list[tuple[int, Tensor]]:
    """The rows that updates nearly cancel, by place in the stacks, where they can be measured from the weight.

    On other devices than the CPU that would synchronise.
    """
    if not state.h.is_cpu or not state.h.numel():
        return []
    share, limit = state.h / state.u, NEAR_CANCELLATION**0.5
    if share.min() >= limit:
        return []
    near, count = share < limit, len(state.h) // len(norms)
    entries = near.any(1).nonzero()[:, 0].tolist()
    return [(entry, near[entry].nonzero()[:, 0]) for entry in entries if norms[entry // count].matrix is not None]


def saved_here() -> AbstractContextManager[object]:
    """Within it, keep what is saved for a backward pass from the hooks around it.

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
    trained, constant = torch.stack([g - 1, g * beta]), constant_factors(g, g - 1)
    assert packed.constant is not None
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
    if _are_stacked(leaves):
        return _differentiable_gradients_of_stacks(gradients[0], of_lambda_d[0], leaves, norms, settings)
    graph, found = torch.is_grad_enabled(), list[list[Tensor | None]]()
    with torch.enable_grad():
        for layer, (gradient, d_lambda_d) in enumerate(zip(gradients, of_lambda_d, strict=True)):
            norm = norms[layer * len(norms) // len(gradients)]
            # Aliases: gradients end at them, whatever the vectors were computed from.
            vectors = Vectors(*(leaf.view_as(leaf) for leaf in leaves[layer :: len(gradients)]))
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


def _differentiable_gradients_of_stacks(
    gradient: Tensor | None,
    of_lambda_d: Tensor | None,
    leaves: Sequence[Tensor],
    norms: Sequence[FrozenNorm],
    settings: RowSettings,
) -> list[Tensor | None]:
    """The same for leaves that are stacks."""
    none = [None] * len(leaves[0])
    each = [of_kind for leaf in leaves for of_kind in leaf.unbind()]
    found = _differentiable_gradients(
        none if gradient is None else gradient.unbind(),
        none if of_lambda_d is None else of_lambda_d.unbind(),
        each,
        norms,
        settings,
    )
    kinds = [found[start : start + len(none)] for start in range(0, len(found), len(none))]
    return [None if of_kind[0] is None else torch.stack(of_kind) for of_kind in kinds]  # type: ignore[arg-type]
