"""The row factors `(g - 1, scale, lambda_d)`: made for all layers of one shape at once, and when they are made.

| where | computed | used until |
|---|---|---|
| training, within a pass of a model | when the pass begins, for the layers that ran in the last pass | it ends |
| evaluation, within a pass | as above | a vector or a weight changes |
| a layer by itself | when it asks | the same |
| compiled, exported or transformed; a trained or sharded weight | by `functional`, when asked | once |

Whether something has changed is one question for a whole model, asked when a pass begins: the vectors are compared by
identity, address and version, and on the CPU by value too, since writes through `tensor.data` or NumPy are not counted.
On other devices a comparison would synchronise. An entry that does not fit is ignored: it can be missing, never wrong.

Dimensions: L layers of one shape, N adapters of each, O out, R rank.
"""

import threading
import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from . import functional as F
from .engines import check_whole
from .functional import Vectors
from .tensors import (
    Float,
    as_dtype,
    full_precision,
    gathers_uncounted,
    grad_recorded,
    is_traced,
    saved_tensors_are_hooked,
    version_of,
    without_autocast,
)
from .weight import NEAR_CANCELLATION, AdaptedWeight

SMALLEST_GAIN = 1e-2
"""Layers with smaller gains are not folded: what their gradient is divided by would have too few digits."""


class FactorSource(NamedTuple):
    """What the row factors of one adapter in one layer are made from, besides the constants of the weight."""

    adapted: AdaptedWeight
    vectors: Vectors
    strength: Tensor | None = None
    """s of `W + s (W' - W)`, a tensor without dimensions; None means one."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """All tensors that may change."""
        return self.vectors if self.strength is None else (*self.vectors, self.strength)

    def is_trained(self) -> bool:
        """Whether some of them require a gradient."""
        (m, b, d), s = self.vectors, self.strength
        return m.requires_grad or b.requires_grad or d.requires_grad or (s is not None and s.requires_grad)

    def state(self) -> tuple[int, ...]:
        """Version and address of each: `tensor.data` may be assigned without another version."""
        (m, b, d), s = self.vectors, self.strength
        addresses = m.data_ptr(), b.data_ptr(), d.data_ptr()
        if m.is_inference() or b.is_inference() or d.is_inference():
            return addresses
        versions = m._version, b._version, d._version
        return versions + addresses if s is None else (*versions, *addresses, version_of(s), s.data_ptr())

    def is_same(self, other: "FactorSource") -> bool:
        """Whether both are of the same tensors, whatever is in them now."""
        (m, b, d), (other_m, other_b, other_d) = self.vectors, other.vectors
        return (
            self.adapted is other.adapted
            and m is other_m
            and b is other_b
            and d is other_d
            and self.strength is other.strength
        )


class Factors(NamedTuple):
    """What the tokens of one layer need of an adapter, for all of them or for each row of a batch."""

    gain_minus_one: Float[Tensor, "*B O"]
    scale: Float[Tensor, "*B O"]
    lambda_d: Float[Tensor, "*B R"]
    gain: Float[Tensor, "*B O"] | None = None
    """`g`, without a gradient: precise where it is far below one. None for rows of a batch: it would be as large."""
    folds: "Folds | None" = None
    """The folded factors of all layers of the shape, in training."""
    position: int = 0
    """Of this layer among them."""

    @classmethod
    def of_rows(cls, values: Float[Tensor, "B F"], rank: int, dimensions: int) -> "Factors":
        """Those of each row of a batch.

        Args:
            values: `g - 1` (O), scale (O) and lambda_d (R) of each row.
            rank: R.
            dimensions: of the tokens.
        """
        # Not len(), which would make a traced size a constant; nor the size itself: one row serves all in a graph.
        rows = values.view(-1, *(1,) * (dimensions - 2), values.shape[1])
        out_features = (values.shape[1] - rank) // 2
        gain_minus_one, scale, lambda_d = rows.split([out_features, out_features, rank], -1)
        return cls(gain_minus_one, scale, lambda_d)

    @property
    def row(self) -> Float[Tensor, "F"]:
        """The same of one adapter as one tensor."""
        return torch.cat([self.gain_minus_one, self.scale, self.lambda_d])


class StackConstants(NamedTuple):
    """The constants of L weights of one shape as one tensor each."""

    weights: list[AdaptedWeight]
    norms: list[Tensor]
    """w of each, by which a change is noticed."""
    w: Float[Tensor, "L 1 O"]
    """Row norms; one for zero rows."""
    C: Float[Tensor, "L O R"] | None
    """None where the layers keep it in half precision: widened one by one."""
    unit: Float[Tensor, "L 1 O"] | float
    """kappa of a lambda_b of one."""
    dead: Tensor | None
    """Which rows of W are zero; None: none."""
    dense: list[Tensor]
    """B, once it has been asked for."""

    @classmethod
    def of(cls, weights: Sequence[AdaptedWeight]) -> "StackConstants":
        """Those of weights with one `stack_key`, whose C become parts of one tensor."""
        norms, first = [weight.w for weight in weights], weights[0]
        w, dead = torch.stack(norms)[:, None], None
        if any(weight.has_zero_rows for weight in weights):
            dead = w == 0
            w = torch.where(dead, 1.0, w)
        unit: Tensor | float = first.scaling if first.direction == "unit" else first.scaling / w
        if dead is not None:
            unit = unit * (~dead).to(w.dtype)
        C = _joined([weight.C for weight in weights], w.dtype)
        if C is not None and len(weights) > 1:
            for weight, part in zip(weights, C.unbind(), strict=True):
                weight.C = part
                if weight.cache is not None:
                    # They would hold the matrix that it was.
                    weight.cache.constants = None
        return cls(list(weights), norms, w, C, unit, dead, [])

    def fit(self, weights: Sequence[AdaptedWeight]) -> bool:
        """Whether they are the constants of these weights as they are now."""
        return len(weights) == len(self.weights) and all(
            weight is own and weight.w is w for weight, own, w in zip(weights, self.weights, self.norms, strict=True)
        )

    def B(self) -> Float[Tensor, "O R"]:
        """The dense B, made once."""
        if not self.dense:
            with torch.inference_mode(False), torch.no_grad():
                self.dense.append(self.weights[0].B(self.w))
        return self.dense[0]

    # As batches of one row, so that a layer gets the same bits alone as with others.
    def cross(self, lambda_d: Float[Tensor, "L N R"]) -> Float[Tensor, "L N O"]:
        """`C lambda_d`."""
        if self.C is not None:
            return lambda_d @ self.C.mT
        return torch.stack([d @ weight.C.to(d.dtype).T for d, weight in zip(lambda_d, self.weights, strict=True)])

    def minus_cross_gradient(
        self, d_cross: Float[Tensor, "L N O"], twice: Float[Tensor, "L N R"]
    ) -> Float[Tensor, "L N R"]:
        """Minus the gradient of lambda_d, minus half of what is given."""
        if self.C is not None:
            return torch.baddbmm(twice, d_cross, self.C, beta=-0.5, alpha=-1)
        products = [d @ weight.C.to(d.dtype) for d, weight in zip(d_cross, self.weights, strict=True)]
        return twice.mul(-0.5).sub_(torch.stack(products))


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """Constants as one tensor: the one whose parts they are already, or a new one."""
    first, base = parts[0], parts[0]._base
    if first.dtype != dtype:
        return None
    if len(parts) == 1:
        return first[None]
    step = first.numel() * first.itemsize
    places = [first.data_ptr() + step * index for index in range(len(parts))]
    if base is not None and len(base) == len(parts) and [part.data_ptr() for part in parts] == places:
        return base
    return torch.stack(list(parts))


class FactorStacks:
    """From flat vectors of adapters to their factor rows, for all layers of one shape at once.

    A vector has magnitude, lambda_b and lambda_d of every layer, lambda_b only where there is a rank; a row has
    `g - 1`, scale and lambda_d. One gather brings the vectors into the order of the stacks, and one the factors back.

    Args:
        weights: of the layers, with the constants that they have now.
    """

    def __init__(self, weights: Sequence[AdaptedWeight]) -> None:
        stacks: dict[object, list[int]] = {}
        for position, weight in enumerate(weights):
            stacks.setdefault(weight.stack_key, []).append(position)
        self._constants = [StackConstants.of([weights[p] for p in positions]) for positions in stacks.values()]
        device, groups = weights[0].w.device, list(stacks.values())
        vectors = [(w.out_features, w.out_features if w.rank else 0, w.rank) for w in weights]
        self._vectors = _StackOrder.of(vectors, groups, device)
        self._rows = _StackOrder.of([(w.out_features, w.out_features, w.rank) for w in weights], groups, device)

    def rows(self, vectors: Float[Tensor, "N S"]) -> Float[Tensor, "N F"]:
        """The factor rows of N adapters, in the dtype of the constants, with a graph where one is recorded."""
        here, back, factors = self._vectors, self._rows, list[Tensor]()
        parts = iter(_Reordered.apply(vectors, here.order, here.inverse).split(here.lengths, -1))
        for constants in self._constants:
            m, b, d = (_by_layer(next(parts), len(constants.weights)).to(constants.w.dtype) for _ in range(3))
            b = b if b.shape == m.shape else torch.zeros_like(m)
            gain_minus_one, scale, _ = stacked_factors(Vectors(m, b, d), constants)
            factors += [factor.transpose(0, 1).flatten(1) for factor in (gain_minus_one, scale, d)]
        rows: Tensor = _Reordered.apply(torch.cat(factors, -1), back.inverse, back.order)
        return rows


def _by_layer(values: Float[Tensor, "N LO"], layers: int) -> Float[Tensor, "L N O"]:
    return values.view(len(values), layers, values.shape[-1] // layers).transpose(0, 1)


class _StackOrder(NamedTuple):
    """Parts of layers, three each, in the order of the stacks: all first ones of a stack, all second, all third."""

    order: Tensor
    """Where each value stands among the layers."""
    inverse: Tensor
    lengths: list[int]
    """Of the parts of all stacks."""

    @classmethod
    def of(
        cls, lengths: Sequence[tuple[int, int, int]], stacks: Sequence[Sequence[int]], device: torch.device
    ) -> "_StackOrder":
        places = torch.arange(sum(map(sum, lengths)), dtype=torch.int32).split([n for three in lengths for n in three])
        parts = [torch.cat([places[3 * layer + k] for layer in stack]) for stack in stacks for k in range(3)]
        order = torch.cat(parts)
        return cls(order.to(device), order.argsort().int().to(device), [len(part) for part in parts])


class _Reordered(torch.autograd.Function):
    """The last dimension in another order; the way back is a gather too, not a sum of what might be repeated."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.orders = inverse, order
        return values.index_select(-1, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Reordered.apply(gradient, *ctx.orders), None, None


def stacked_factors(
    vectors: Vectors, constants: StackConstants
) -> tuple[Float[Tensor, "L N O"], Float[Tensor, "L N O"], Float[Tensor, "L N O"]]:
    """`g - 1`, scale and `g` of N adapters in L layers; `g` has no gradient.

    Args:
        vectors: (L, N, O) and (L, N, R), in the dtype of the constants.
        constants: of the layers.
    """
    with full_precision(constants.w.device):
        factors: tuple[Tensor, Tensor, Tensor] = _RowFactors.apply(*vectors, constants)
        return factors


class _RowFactors(torch.autograd.Function):
    """`functional.row_factors` of all layers at once, with few kernels and a gradient in closed form.

        d_m     = (d_g / w + d_scale kappa) / s
        d_eps   = -(d_g g + d_scale scale) / (2 s**2)
        d_kappa = d_scale m / s + 2 d_eps (cross + kappa q)
        d_cross = 2 d_eps kappa,   d_q = d_eps kappa**2

    What is kept for the backward pass is computed here and never changes, so it is on the node, not among the saved
    tensors: several backward passes may reach the factors, and a checkpoint does not count it.
    """

    @staticmethod
    def forward(ctx: Any, m: Tensor, lambda_b: Tensor, lambda_d: Tensor, constants: StackConstants) -> Any:
        first, w, dead = constants.weights[0], constants.w, constants.dead
        kappa = lambda_b * constants.unit
        cross, q = constants.cross(lambda_d), first.squares(lambda_d)
        inner = torch.addcmul(cross, kappa, q)
        eps = (cross + inner).mul_(kappa)
        square = 1 + eps
        # On other devices than the CPU a look at the values would synchronise.
        cancelled = not eps.is_cpu or (eps.numel() > 0 and float(eps.min()) < NEAR_CANCELLATION - 1)
        if cancelled and eps.is_cpu:
            _measure_cancelled_rows(eps, square, kappa, lambda_d, constants)
        s = square.clamp_min_(torch.finfo(w.dtype).eps ** 2).sqrt_()
        mu = m / w
        if dead is not None:
            mu = torch.where(dead, 1.0, mu)
        gain_minus_one = (mu - 1).sub_(eps / (1 + s)).div_(s)
        scale, gain = (m * kappa).div_(s), mu.div_(s)
        if dead is not None and first.direction == "weight":
            scale = torch.where(dead, lambda_b * first.scaling, scale)
        ctx.constants, ctx.inputs = constants, (m, lambda_b, lambda_d)
        ctx.intermediates = kappa, inner, s, gain, scale
        ctx.cancelled = cancelled
        ctx.mark_non_differentiable(gain)
        ctx.set_materialize_grads(False)
        return gain_minus_one, scale, gain

    @staticmethod
    @without_autocast
    def backward(ctx: Any, d_g: Tensor | None, d_scale: Tensor | None, _: None) -> Any:
        constants: StackConstants = ctx.constants
        m, _lambda_b, lambda_d = ctx.inputs
        kappa, inner, s, gain, scale = ctx.intermediates
        if d_g is None and d_scale is None:
            return None, None, None, None
        d_g = torch.zeros_like(gain) if d_g is None else d_g
        d_scale = torch.zeros_like(gain) if d_scale is None else d_scale
        batched = any(map(torch._C._functorch.is_legacy_batchedtensor, (d_g, d_scale)))
        if torch.is_grad_enabled() or batched:
            return *_gradients_of_definition(ctx.inputs, constants, d_g, d_scale), None
        first, dead = constants.weights[0], constants.dead
        d_m = torch.addcmul(d_g / constants.w, d_scale, kappa).div_(s)
        if dead is not None:
            d_m.masked_fill_(dead, 0.0)
        d_kappa = (m / s).mul_(d_scale)
        d_lambda_d = None
        if not first.detach_norm:
            minus_2_d_eps = torch.addcmul(d_g * gain, d_scale, scale).div_(s.square())
            if dead is not None:
                minus_2_d_eps.masked_fill_(dead, 0.0)
            if ctx.cancelled:
                # A row that vanishes has its norm at the floor, where it is constant.
                minus_2_d_eps.masked_fill_(s <= torch.finfo(s.dtype).eps, 0.0)
            d_kappa.addcmul_(minus_2_d_eps, inner, value=-1)
            minus_d_cross = minus_2_d_eps.mul_(kappa)
            d_q = minus_d_cross * kappa
            of_squares = first.squares_gradient(d_q, lambda_d)
            d_lambda_d = constants.minus_cross_gradient(minus_d_cross, of_squares)
        d_lambda_b = d_kappa.mul_(constants.unit)
        if dead is not None and first.direction == "weight":
            d_lambda_b = torch.where(dead, d_scale * first.scaling, d_lambda_b)
        return d_m, d_lambda_b, d_lambda_d, None


def _gradients_of_definition(
    inputs: Sequence[Tensor], constants: StackConstants, d_g: Tensor, d_scale: Tensor
) -> list[Tensor | None]:
    """The gradients as a graph, for derivatives of higher order, and for batches of them."""
    first, create_graph = constants.weights[0], torch.is_grad_enabled()
    w = constants.w if constants.dead is None else torch.where(constants.dead, 0.0, constants.w)
    with torch.enable_grad():
        # Aliases: gradients end at them, whatever the vectors were computed from.
        vectors = Vectors(*(t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs))
        factors = F.row_factors(
            vectors,
            w,
            constants.cross(vectors.lambda_d),
            first.squares(vectors.lambda_d),
            scaling=first.scaling,
            direction=first.direction,
            detach_norm=first.detach_norm,
        )
        outputs = [factors.gain_minus_one, factors.scale]
        return list(torch.autograd.grad(outputs, vectors, [d_g, d_scale], create_graph=create_graph, allow_unused=True))


def _measure_cancelled_rows(
    eps: Float[Tensor, "L N O"],
    square: Float[Tensor, "L N O"],
    kappa: Float[Tensor, "L N O"],
    lambda_d: Float[Tensor, "L N R"],
    constants: StackConstants,
) -> None:
    """Replace eps and 1 + eps of rows that an update nearly cancels by what the dense rows say, if W is in memory.

    Terms that cancel lose digits: without this the norm of a row at a hundredth of its length would be off by 1e-3.
    """
    near = eps < NEAR_CANCELLATION - 1
    for layer, adapter in near.any(-1).nonzero().tolist():
        adapted, rows = constants.weights[layer], near[layer, adapter].nonzero()[:, 0]
        weight = adapted.weight()
        if weight is not None:
            matrix = adapted.layout.matrix(weight.detach())
            measured = adapted.updated_norms(matrix, rows, adapted.w, kappa[layer, adapter], lambda_d[layer, adapter])
            # Both, since 1 + eps in float32 would have lost digits again.
            eps[layer, adapter, rows] = (measured - 1).to(eps.dtype)
            square[layer, adapter, rows] = measured.to(square.dtype)


class Folds:
    """What folding needs of all layers of one shape, made at once when the first of them folds.

    Args:
        factors: `g - 1`, scale and `g`, (L, O), with their graph.
        lambda_d: (L, R), with its graph.
        constants: of the layers.
        used: the layers that get a gradient.
    """

    def __init__(
        self,
        factors: Sequence[Float[Tensor, "L O"]],
        lambda_d: Float[Tensor, "L R"],
        constants: StackConstants,
        used: set[int],
    ) -> None:
        self._factors, self._lambda_d, self._constants, self._used = factors, lambda_d, constants, used
        self._parts: list[tuple[Tensor, Tensor]] = []

    @cached_property
    def precise(self) -> bool:
        """Whether the gradient of g may be computed from the outputs, which divides by g."""
        gain = self._factors[2]
        # On other devices a look at the values would synchronise: there a tiny gain costs digits of its own gradient.
        return not gain.is_cpu or float(gain.min()) > SMALLEST_GAIN

    def of(self, index: int) -> tuple[Float[Tensor, "O R"], Float[Tensor, "O"]]:
        """`U = diag(scale) B diag(lambda_d)` of one layer, and a carrier.

        The values of a carrier mean nothing. What a layer returns as its gradient, `sum_t dy (y - bias)`, becomes a
        gradient of g for all layers at once.
        """
        if not self._parts:
            U, carrier = _Fold.apply(*self._factors, self._lambda_d, self._constants.B())
            parts = _Parts.apply(self._used, U, carrier)
            self._parts = list(zip(parts[: len(U)], parts[len(U) :], strict=True))
        return self._parts[index]


class _Fold(torch.autograd.Function):
    """The factors of L layers -> U (L, O, R) and the carriers (L, O).

    d_scale = rowsum(d_U * B diag(lambda_d)),   d_lambda_d = scale (d_U * B)
    d_g     = sum_t dy x W^T = (sum_t dy (y - bias) - scale d_scale) / g
    """

    @staticmethod
    def forward(ctx: Any, gain_minus_one: Tensor, scale: Tensor, gain: Tensor, lambda_d: Tensor, B: Tensor) -> Any:
        ctx.inputs = gain_minus_one, scale, gain, lambda_d, B
        return (B * lambda_d[:, None]).mul_(scale[..., None]), gain.view_as(gain)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, d_U: Tensor, d_carrier: Tensor) -> Any:
        gain_minus_one, scale, gain, lambda_d, B = ctx.inputs
        if torch.is_grad_enabled():
            gain = 1 + gain_minus_one
        products = d_U * B
        d_scale = (products @ lambda_d[..., None])[..., 0]
        d_lambda_d = (scale[:, None] @ products)[:, 0]
        if not gain.is_cpu:
            # There a gain may be zero (`precise`): its own gradient is left out then.
            gain = gain.masked_fill(gain == 0, float("inf"))
        d_g = torch.addcmul(d_carrier, scale, d_scale, value=-1) / gain
        return d_g, d_scale, None, d_lambda_d, None


def saved_here() -> AbstractContextManager[object]:
    """Within it, keep what is saved for a backward pass from the hooks around it.

    A checkpoint counts what is saved in both runs of its part, of which one may make factors and the other find them.
    """
    return saved_tensors_hooks(Tensor.detach, _itself) if saved_tensors_are_hooked() else nullcontext()


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def layer_factors(sources: Sequence[FactorSource], constants: StackConstants) -> list[Factors]:
    """The factors of one adapter in each of several layers of one shape, with a graph where one is recorded.

    Args:
        sources: with one `stack_key`.
        constants: of their weights.
    """
    used: set[int] = set()
    leaves = [vector for of_kind in zip(*(source.vectors for source in sources), strict=True) for vector in of_kind]
    vectors = Vectors(*(as_dtype(stack, constants.w.dtype) for stack in _Stacked.apply(used, *leaves)))
    stacks = stacked_factors(Vectors(*(of_kind[:, None] for of_kind in vectors)), constants)
    gain_minus_one, scale, gain = (stack.squeeze(1) for stack in stacks)
    if any(source.strength is not None for source in sources):
        one = constants.w.new_ones(())
        s = torch.stack([one if source.strength is None else source.strength for source in sources])[:, None]
        with saved_here():
            gain_minus_one, scale, gain = _weakened((gain_minus_one, scale, gain), s)
    trained = gain_minus_one.requires_grad and bool(vectors.lambda_d.shape[1])
    folds = Folds((gain_minus_one, scale, gain), vectors.lambda_d, constants, used) if trained else None
    parts = _Parts.apply(used, gain_minus_one, scale, vectors.lambda_d)
    count = len(sources)
    of_layers = zip(parts[:count], parts[count : 2 * count], parts[2 * count :], gain.unbind(), strict=True)
    return [Factors(*of_layer, folds, index) for index, of_layer in enumerate(of_layers)]


class _Stacked(torch.autograd.Function):
    """The leaves of L layers, all of one kind after the other, as three stacks; the way back from `_Parts`.

    Layers that were not used get no gradient, as they would alone: weight decay leaves them as they are.
    """

    @staticmethod
    def forward(ctx: Any, used: set[int], *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.used, count = used, len(leaves) // 3
        ctx.set_materialize_grads(False)
        return tuple(torch.stack(leaves[start : start + count]) for start in range(0, 3 * count, count))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        count = (len(ctx.needs_input_grad) - 1) // 3
        of_leaves: list[Tensor | None] = [None]
        for of_kind in gradients:
            parts = [None] * count if of_kind is None else of_kind.unbind()
            of_leaves += [part if layer in ctx.used else None for layer, part in enumerate(parts)]
        return tuple(of_leaves)


class _Parts(torch.autograd.Function):
    """Stacks as one tensor a layer, all of one stack after the other; notes which layers get a gradient."""

    @staticmethod
    def forward(ctx: Any, used: set[int], *stacks: Tensor) -> tuple[Tensor, ...]:
        ctx.used, ctx.count = used, len(stacks[0])
        ctx.set_materialize_grads(False)
        return tuple(part for stack in stacks for part in stack.unbind())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_stacks: list[Tensor | None] = [None]
        for start in range(0, len(gradients), ctx.count):
            parts = gradients[start : start + ctx.count]
            ctx.used.update(layer for layer, part in enumerate(parts) if part is not None)
            of_stacks.append(_stacked(parts))
        return tuple(of_stacks)


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The parts as one tensor, with zeros for those that are missing; None where all are."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    if len(present) < len(parts):
        zero = torch.zeros_like(present[0])
        present = [zero if part is None else part for part in parts]
    return torch.stack(present)


def factors_of(source: FactorSource, weight: Tensor | None, together: bool = True) -> Factors:
    """The factors of an adapter in a layer, now.

    Args:
        source: with the vectors of this process, of a sharded weight.
        weight: the base's as stored, or None where only its constants are in memory.
        together: make them with those of other layers when the model's next pass begins; not for one of thousands.
    """
    adapted = source.adapted
    if torch.compiler.is_compiling() or adapted.shard is not None:
        if weight is not None and not weight.requires_grad:
            adapted.check_traced()
        return _by_definition(source, weight)
    if is_traced():
        if weight is not None and not adapted.is_trained(weight):
            adapted.refresh_if_stale(weight)
        return _by_definition(source, weight)
    if weight is not None:
        if weight.requires_grad:
            adapted.forget_weight()
            return _by_definition(source, weight)
        version = adapted.weight_version
        if version is None or not version.is_of(weight):
            adapted.refresh_if_stale(weight)
    current = current_pass() if together else None
    if current is not None:
        current.sources[id(adapted)] = source
    cache = _cache_of(adapted)
    if not (grad_recorded() and source.is_trained()):
        return cache.evaluated_now(source, current)
    # Not every optimizer's step is counted as a write.
    cache.evaluated = None
    trained = cache.trained_now(source, current)
    if trained is not None:
        return trained
    if cache.constants is None:
        cache.constants = StackConstants.of([adapted])
    return layer_factors([source], cache.constants)[0]


def _by_definition(source: FactorSource, weight: Tensor | None) -> Factors:
    adapted, vectors, strength = source
    factors = adapted.factors(vectors, weight)
    gain_minus_one, scale, gain = factors if strength is None else _weakened(factors, strength)
    return Factors(gain_minus_one, scale, as_dtype(vectors.lambda_d, scale.dtype), gain)


def _weakened(factors: Sequence[Tensor], strength: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of `W + s (W' - W)`; for s = 1 these."""
    gain_minus_one, scale, gain = factors
    weaker = torch.lerp(torch.ones_like(gain), gain, strength.detach().to(gain.dtype))
    return strength * gain_minus_one, strength * scale, weaker


def delta_weight(adapted: AdaptedWeight, vectors: Vectors, weight: Tensor) -> Float[Tensor, "O I"]:
    """`W' - W` as a dense matrix, in float32 or float64.

    Raises:
        ValueError: the weight is sharded over processes.
    """
    check_whole(weight, adapted.name)
    factors = factors_of(FactorSource(adapted, vectors), weight)
    with full_precision(factors.scale.device):
        matrix, lambda_d = adapted.layout.matrix(weight), as_dtype(vectors.lambda_d, factors.scale.dtype)
        A, B = adapted.A(lambda_d), adapted.B(lambda_d)
        return F.rescaled_delta(matrix, A, B, lambda_d, factors.gain_minus_one, factors.scale)


class _Cache:
    """The factors of one weight that may be used again."""

    __slots__ = ("constants", "evaluated", "trained")

    def __init__(self) -> None:
        # The pass has them, not the weight: their graph holds the weight, and no collector of garbage sees a graph.
        self.trained: weakref.ref[Snapshot] | None = None
        self.evaluated: Snapshot | None = None
        # Of this weight alone; where they change, the whole cache goes.
        self.constants: StackConstants | None = None

    def evaluated_now(self, source: FactorSource, current: "Pass | None") -> Factors:
        """Factors without gradients."""
        cached = self.evaluated
        if cached is None or not cached.is_of(source) or not (cached.is_valid_in(current) or cached.is_unchanged()):
            cached = self.evaluated = Snapshot([source], compared=True)
        return cached.factors[id(source.adapted)]

    def trained_now(self, source: FactorSource, current: "Pass | None") -> Factors | None:
        """Those that were computed for the pass with gradients that this thread is in, if they are still right."""
        cached = None if self.trained is None else self.trained()
        if cached is None or not cached.is_of(source):
            return None
        # Checkpointing that is not reentrant runs a part of a pass again in the backward pass, in any thread.
        repeated = torch._C._current_graph_task_id() != -1 and saved_tensors_are_hooked()
        return cached.factors[id(source.adapted)] if repeated or cached.is_valid_in(current) else None


def _cache_of(adapted: AdaptedWeight) -> _Cache:
    if adapted.cache is None:
        adapted.cache = _Cache()
    cache: _Cache = adapted.cache
    return cache


class Snapshot:
    """The factors of any number of layers, computed at once, and the state of what they were computed from.

    Args:
        sources: one for each weight.
        before: of an earlier pass, whose constants are used again.
        compared: copy the vectors, to notice writes that PyTorch does not count; then there are no gradients.
    """

    def __init__(self, sources: Sequence[FactorSource], before: "Snapshot | None" = None, *, compared: bool) -> None:
        # Weakly: a pass has graphs, which hold the weights that hold this.
        self.valid_in: weakref.ref[Pass] | None = None
        """The pass for which they were computed or compared."""
        self._states = {id(s.adapted): (s, s.state(), s.adapted.w) for s in sources}
        self._inputs = [tensor for source in sources for tensor in source.inputs]
        self._copies: Tensor | None = None
        self._constants: dict[int, StackConstants] = {}
        """By the first weight."""
        self.factors: dict[int, Factors] = {}
        constants = {} if before is None else before._constants
        if not compared:
            self._compute(sources, constants)
            return
        # Inference tensors could not be used in a later pass that trains something else.
        with torch.inference_mode(False), torch.no_grad():
            # Copied before computing, and computed from the copies: another thread may write to the vectors meanwhile.
            self._copies = _joined_values(self._inputs)
            self.factors |= _unchanged_factors(sources)
            copied = list(sources) if self._copies is None else _with_values(sources, self._copies)
            self._compute([source for source in copied if id(source.adapted) not in self.factors], constants)

    def _compute(self, sources: Sequence[FactorSource], earlier: dict[int, StackConstants]) -> None:
        for group in _by_shape(sources):
            weights = [source.adapted for source in group]
            constants = earlier.get(id(weights[0]))
            if constants is None or not constants.fit(weights):
                constants = StackConstants.of(weights)
            self._constants[id(weights[0])] = constants
            self.factors |= zip(map(id, weights), layer_factors(group, constants), strict=True)

    def is_of(self, source: FactorSource) -> bool:
        """Whether the factors of this layer are of its tensors, and of the versions that they have."""
        entry = self._states.get(id(source.adapted))
        if entry is None:
            return False
        before, state, w = entry
        return before.is_same(source) and source.adapted.w is w and source.state() == state

    def is_of_all(self, sources: Sequence[FactorSource]) -> bool:
        """Whether they are the factors of the tensors of these layers and no others, whatever is in them now."""
        entries = (self._states.get(id(source.adapted)) for source in sources)
        same = (entry is not None and entry[0].is_same(source) for entry, source in zip(entries, sources, strict=True))
        return len(sources) == len(self._states) and all(same)

    def is_valid_in(self, current: "Pass | None") -> bool:
        """Whether they were computed, or compared, when this pass began."""
        return current is not None and self.valid_in is not None and self.valid_in() is current

    def is_unchanged(self) -> bool:
        """Whether all vectors have the values, and all weights the norms, that the factors were computed from."""
        if not all(source.adapted.w is w and source.state() == state for source, state, w in self._states.values()):
            return False
        if self._copies is None:
            # Gathered values have no versions, inference tensors neither, and a fused optimizer's step is not counted.
            unsure = any(t.is_inference() or (t.is_leaf and t.grad is not None) for t in self._inputs)
            return not (unsure or gathers_uncounted())
        now = _joined_values(self._inputs)
        return now is not None and now.dtype == self._copies.dtype and torch.equal(now, self._copies)


def _unchanged_factors(sources: Sequence[FactorSource]) -> dict[int, Factors]:
    """Factors of earlier passes that nothing has changed since; in another stack the last bit could be another one."""
    unchanged, factors = dict[Snapshot, bool](), dict[int, Factors]()
    for source in sources:
        cached = _cache_of(source.adapted).evaluated
        if cached is not None and cached.is_of(source):
            if cached not in unchanged:
                unchanged[cached] = cached.is_unchanged()
            if unchanged[cached]:
                factors[id(source.adapted)] = cached.factors[id(source.adapted)]
    return factors


def _joined_values(inputs: Sequence[Tensor]) -> Tensor | None:
    """Vectors, and strengths, which have no dimension, as one tensor; None unless all are on the CPU."""
    if not all(tensor.is_cpu for tensor in inputs):
        return None
    return torch.cat([tensor if tensor.dim() else tensor[None] for tensor in inputs]).detach()


def _with_values(sources: Sequence[FactorSource], copies: Tensor) -> list[FactorSource]:
    parts = iter(copies.split([tensor.numel() for source in sources for tensor in source.inputs]))
    copied = []
    for source in sources:
        vectors = Vectors(next(parts), next(parts), next(parts))
        copied.append(FactorSource(source.adapted, vectors, None if source.strength is None else next(parts)[0]))
    return copied


def _by_shape(sources: Iterable[FactorSource]) -> list[list[FactorSource]]:
    """Sources in groups whose factors are made at once."""
    groups: dict[object, list[FactorSource]] = {}
    for source in sources:
        groups.setdefault((*source.adapted.stack_key, source.vectors.magnitude.dtype), []).append(source)
    return list(groups.values())


class Pass:
    """One forward pass of one model in one thread, compared by identity."""

    def __init__(self) -> None:
        self.sources: dict[int, FactorSource] = {}
        """Of the layers that have run in it."""
        self.trained: Snapshot | None = None
        """The factors that were computed for it, with gradients."""


class _Passes(threading.local):
    def __init__(self) -> None:
        self.stack: list[tuple[object, Pass]] = []
        """Each with what began it."""


_passes = _Passes()


def current_pass() -> Pass | None:
    """The pass that this thread is in; None outside a model with a `FactorPass`."""
    return _passes.stack[-1][1] if _passes.stack else None


class FactorPass:
    """Computes the factors of one model's layers; `begin` and `end` are hooks around its forward.

    It knows the layers from the pass before: those that ran in the last one get their factors at the start of the next.
    So nothing has to be said to it when layers are added, replaced, frozen, moved or deleted.
    """

    def __init__(self) -> None:
        self._last: dict[bool, Pass] = {}
        """The last pass without and with gradients."""

    def begin(self, *_: object) -> None:
        """Enter a pass, in this thread, and compute the factors for it."""
        if is_traced():
            return
        recorded, current = grad_recorded(), Pass()
        last = self._last.get(recorded)
        self._last[recorded] = current
        # FSDP2 has the values of this pass only when a layer runs.
        if last is not None and not gathers_uncounted():
            trained, others = list[FactorSource](), list[FactorSource]()
            for source in filter(_can_be_stacked, list(last.sources.values())):
                (trained if recorded and source.is_trained() else others).append(source)
            if trained:
                _compute_trained(trained, last, current)
            if others:
                _compute_evaluated(others, current)
        _passes.stack.append((self, current))

    def end(self, *_: object) -> None:
        """Leave the pass, and those within it that an interruption has left open."""
        for index, (owner, _pass) in enumerate(_passes.stack):
            if owner is self and not is_traced():
                del _passes.stack[index:]
                return

    def __reduce__(self) -> "tuple[type[FactorPass], tuple[()]]":
        return FactorPass, ()


def _compute_trained(sources: list[FactorSource], last: Pass, current: Pass) -> None:
    """Compute the factors with gradients of these layers for a pass."""
    current.trained = Snapshot(sources, last.trained, compared=False)
    current.trained.valid_in = weakref.ref(current)
    for source in sources:
        _cache_of(source.adapted).trained = weakref.ref(current.trained)


def _compute_evaluated(sources: list[FactorSource], current: Pass) -> None:
    """Have the factors without gradients of these layers for a pass: those of an earlier one, if nothing changed."""
    cached = _cache_of(sources[0].adapted).evaluated
    if cached is None or not (cached.is_of_all(sources) and cached.is_unchanged()):
        cached = Snapshot(sources, cached, compared=True)
        for source in sources:
            _cache_of(source.adapted).evaluated = cached
    cached.valid_in = weakref.ref(current)


def _can_be_stacked(source: FactorSource) -> bool:
    """Whether the vectors are whole and where the weight is; what ZeRO-3 has partitioned is empty between passes."""
    adapted, (m, b, d), _ = source
    complete = m.numel() == b.numel() == adapted.out_features and d.numel() == adapted.rank
    return adapted.shard is None and complete and m.device == b.device == d.device == adapted.w.device


def add_factor_pass(model: nn.Module) -> None:
    """Make the factors of a model's layers together from now on; once is enough."""
    if not _own_hooks(model):
        factors = FactorPass()
        model.register_forward_pre_hook(factors.begin)
        model.register_forward_hook(factors.end, always_call=True)


def remove_factor_pass(model: nn.Module) -> None:
    """Take back `add_factor_pass`."""
    for key in _own_hooks(model):
        for hooks in (model._forward_pre_hooks, model._forward_hooks, model._forward_hooks_always_called):
            hooks.pop(key, None)


def _own_hooks(model: nn.Module) -> list[int]:
    hooks = [*model._forward_pre_hooks.items(), *model._forward_hooks.items()]
    return [key for key, hook in hooks if isinstance(getattr(hook, "__self__", None), FactorPass)]
