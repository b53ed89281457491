"""The row factors `(g - 1, scale, lambda_d)` of an adapter in one weight: values, gradients, and how long they last.

| where | computed |
|---|---|
| training | in every pass, with a gradient in closed form (`relative_factors`, `vector_gradients`) |
| evaluation | once, until a vector, the strength or the weight changes |
| compiled, exported or transformed; a trained or sharded weight | in every pass, by `functional` |

Factors that are kept belong to the addresses and versions of the vectors. PyTorch does not count writes through
`tensor.data` or NumPy, nor fused optimizers' steps; for these none are kept of what has a gradient, or through a
pass that trains.

Dimensions: N adapters, O out, I in, R rank.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional as F
from .engines import check_whole
from .functional import Vectors
from .tensors import (
    Float,
    as_dtype,
    full_precision,
    gathers_uncounted,
    grad_recorded,
    without_autocast,
)
from .weight import AdaptedWeight


class Factors(NamedTuple):
    """What the tokens of one layer need of an adapter, for all of them or for each row of a batch."""

    gain_minus_one: Float[Tensor, "*B O"]
    scale: Float[Tensor, "*B O"]
    lambda_d: Float[Tensor, "*B R"]
    gain: Float[Tensor, "*B O"] | None = None
    """`g`, without a gradient: precise where it is far below one. None for rows of a batch: it would be as large."""

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
    def row(self) -> Float[Tensor, "*N F"]:
        """The same of one adapter, or of N, as one tensor."""
        return torch.cat([self.gain_minus_one, self.scale, self.lambda_d], -1)


def factors_of(
    adapted: AdaptedWeight, vectors: Vectors, weight: Tensor | None = None, strength: float = 1.0
) -> Factors:
    """The factors of an adapter in a layer, now.

    Args:
        adapted, vectors: the adapter; of a sharded weight, the vectors of this process.
        weight: the base's as stored, or None where only its constants are in memory.
        strength: s of `W + s (W' - W)`.
    """
    if adapted.follow(weight):
        # Not every optimizer's step is counted as a write.
        adapted.kept = None
        return _defined(adapted, vectors, weight, strength)
    if grad_recorded() and vectors.are_trained():
        return _in_closed_form(adapted, vectors, strength)
    key, kept = _key(vectors, strength), adapted.kept
    if key is None or kept is None or kept[0] != key:
        # Inference tensors could not be used in a later pass that trains something else.
        with torch.inference_mode(False), torch.no_grad():
            # Of copies: where parts of a larger tensor are not aligned in memory, products round in another way.
            copies = Vectors(*(vector.clone() for vector in vectors))
            # With the memory of the vectors, or others could come to have their addresses.
            aliases = [vector.detach() for vector in vectors]
            adapted.kept = kept = key, _in_closed_form(adapted, copies, strength), aliases
    factors: Factors = kept[1]
    return factors


def factor_rows(weights: Sequence[AdaptedWeight], vectors: Float[Tensor, "N S"]) -> Float[Tensor, "N F"]:
    """The factor rows of N adapters, with a graph where one is recorded.

    Args:
        weights: of the layers, with constants of what the base is now.
        vectors: magnitude, lambda_b and lambda_d of every layer; lambda_b only where there is a rank.

    Returns:
        `g - 1`, scale and lambda_d of every layer, in the dtype of the constants.
    """
    lengths = [length for w in weights for length in (w.out_features, w.out_features if w.rank else 0, w.rank)]
    parts, rows = iter(vectors.split(lengths, -1)), list[Tensor]()
    for adapted in weights:
        m, b, d = next(parts), next(parts), next(parts)
        rows += _in_closed_form(adapted, Vectors(m, b if adapted.rank else torch.zeros_like(m), d), 1.0)[:3]
    return torch.cat(rows, -1)


def _key(vectors: Vectors, strength: float) -> tuple[object, ...] | None:
    """Equal keys mean equal vectors; None where writes may not be counted.

    `tensor.data` may be assigned without another version, so addresses belong to it.
    """
    m, b, d = vectors
    if m.grad is not None or b.grad is not None or d.grad is not None or gathers_uncounted():
        return None
    if m.is_inference() or b.is_inference() or d.is_inference():
        return None
    versions = m._version, b._version, d._version
    return *versions, m.data_ptr(), b.data_ptr(), d.data_ptr(), m.dtype, strength


def _in_closed_form(adapted: AdaptedWeight, vectors: Vectors, strength: float) -> Factors:
    """From the constants of a frozen weight, of one adapter or of N, with a graph where one is recorded."""
    vectors = vectors.to(adapted.w.dtype)
    with full_precision(adapted.w.device):
        if grad_recorded():
            gain_minus_one, scale, gain = _RowFactors.apply(*vectors, adapted, strength)
        else:
            (gain_minus_one, scale, gain), _ = _values(adapted, vectors, strength)
    return Factors(gain_minus_one, scale, vectors.lambda_d, gain)


def _defined(adapted: AdaptedWeight, vectors: Vectors, weight: Tensor | None, strength: float) -> Factors:
    """By the definition, differentiated by PyTorch, also with respect to a weight that is trained."""
    with full_precision(adapted.w.device):
        vectors = vectors.to(adapted.w.dtype)
        terms = adapted.terms(vectors.lambda_d, weight)
        gain_minus_one, scale, gain = F.row_factors(vectors, *terms, **adapted.settings)
    if strength != 1:
        gain_minus_one, scale, gain = _weakened(gain_minus_one, scale, gain, strength)
    return Factors(gain_minus_one, scale, vectors.lambda_d, gain)


def _weakened(gain_minus_one: Tensor, scale: Tensor, gain: Tensor, strength: float) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of `W + s (W' - W)`."""
    return strength * gain_minus_one, strength * scale, torch.lerp(torch.ones_like(gain), gain, strength)


class RelativeFactors(NamedTuple):
    """The factors of the rows from the terms of their norm, and what their gradient needs."""

    gain: Float[Tensor, "*N O"]
    scale: Float[Tensor, "*N O"]
    shrunk: Float[Tensor, "*N O"]
    """`m / s`, where s is the norm of each row of V' in units of that of W."""
    inverse: Float[Tensor, "*N O"]
    """`1 / s`."""
    kappa: Float[Tensor, "*N O"]
    inner: Float[Tensor, "*N O"]
    """`cross + kappa q`."""

    def weakened(self, strength: float) -> "RelativeFactors":
        """With gain and scale of `W + s (W' - W)`."""
        if strength == 1:
            return self
        return self._replace(gain=1 + strength * (self.gain - 1), scale=strength * self.scale)


def relative_factors(m: Tensor, lambda_b: Tensor, cross: Tensor, q: Tensor, adapted: AdaptedWeight) -> RelativeFactors:
    """`functional.row_factors` with few operations, and without a graph.

    Args:
        m, lambda_b: the vectors, (*N, O), in the dtype of w.
        cross, q: of `functional.update_terms`, (*N, O).
        adapted: the frozen side.
    """
    w, unit, one, zero_rows = adapted.row_constants
    kappa = lambda_b * unit
    inner = torch.addcmul(cross, kappa, q)
    inverse = torch.addcmul(one, kappa, cross + inner).clamp_min_(torch.finfo(w.dtype).eps ** 2).rsqrt_()
    shrunk = m * inverse
    gain, scale = shrunk / w, shrunk * kappa
    if zero_rows is not None:
        gain.masked_fill_(zero_rows, 1.0)
        if adapted.direction == "weight":
            scale = torch.where(zero_rows, lambda_b * adapted.scaling, scale)
    return RelativeFactors(gain, scale, shrunk, inverse, kappa, inner)


def vector_gradients(
    d_g: Tensor, d_scale: Tensor, factors: RelativeFactors, adapted: AdaptedWeight
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of m, lambda_b, cross and q / 2 from those of g and scale; of the last two None with `detach_norm`.

    With `t = m / s`, `g = t / w`, `scale = t kappa` and `s**2 = 1 + eps`, `eps = kappa (2 cross + kappa q)`:

        d_t     = d_g / w + d_scale kappa
        d_m     = d_t / s,   -2 d_eps = d_m t / s
        d_kappa = d_scale t + 2 d_eps (cross + kappa q)
        d_cross = 2 d_eps kappa,   d_q = d_eps kappa**2
    """
    w, unit, _, zero_rows = adapted.row_constants
    _, _, shrunk, inverse, kappa, inner = factors
    d_m = torch.addcmul(d_g / w, d_scale, kappa).mul_(inverse)
    if zero_rows is not None:
        d_m.masked_fill_(zero_rows, 0.0)
    d_kappa, d_cross, d_half_q = d_scale * shrunk, None, None
    if not adapted.detach_norm:
        minus_2_d_eps = (d_m * shrunk).mul_(inverse)
        d_kappa.addcmul_(minus_2_d_eps, inner, value=-1)
        d_cross = minus_2_d_eps.mul_(kappa).neg_()
        d_half_q = d_cross * kappa
    d_b = d_kappa.mul_(unit)
    if zero_rows is not None and adapted.direction == "weight":
        d_b = torch.where(zero_rows, d_scale * adapted.scaling, d_b)
    return d_m, d_b, d_cross, d_half_q


def _values(
    adapted: AdaptedWeight, vectors: Vectors, strength: float
) -> tuple[tuple[Tensor, Tensor, Tensor], RelativeFactors]:
    """`g - 1`, scale and `g` with a strength, and what they were made from."""
    m, lambda_b, lambda_d = vectors
    _, cross, q = adapted.terms(lambda_d)
    factors = relative_factors(m, lambda_b, cross, q, adapted)
    # Where it is used, `g - 1` is added to one or rounded to half precision: digits below those of g do not matter.
    # Not finite where the norm is not, whose inverse is zero.
    gain_minus_one = (factors.gain - adapted.row_constants.one).add_(factors.inner, alpha=0)
    outputs = gain_minus_one, factors.scale, factors.gain
    return outputs if strength == 1 else _weakened(*outputs, strength), factors


class _RowFactors(torch.autograd.Function):
    """`functional.row_factors` with a gradient in closed form; the gain has none."""

    @staticmethod
    def forward(
        ctx: Any, m: Tensor, lambda_b: Tensor, lambda_d: Tensor, adapted: AdaptedWeight, strength: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs, factors = _values(adapted, Vectors(m, lambda_b, lambda_d), strength)
        ctx.adapted, ctx.strength = adapted, strength
        ctx.save_for_backward(m, lambda_b, lambda_d, *factors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outputs[2])
        return outputs

    @staticmethod
    @without_autocast
    def backward(ctx: Any, d_g: Tensor | None, d_scale: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        adapted, strength = ctx.adapted, ctx.strength
        # Not every optimizer's step is counted as a write.
        adapted.kept = None
        m, lambda_b, lambda_d, *kept = ctx.saved_tensors
        if d_g is None and d_scale is None:
            return (None,) * 5
        d_g = torch.zeros_like(m) if d_g is None else d_g
        d_scale = torch.zeros_like(m) if d_scale is None else d_scale
        if needs_graph(d_g, d_scale):
            inputs = m, lambda_b, lambda_d
            return *differentiated(partial(_defined_factors, adapted, strength), inputs, (d_g, d_scale)), None, None
        if strength != 1:
            d_g, d_scale = strength * d_g, strength * d_scale
        d_m, d_b, d_cross, d_half_q = vector_gradients(d_g, d_scale, RelativeFactors(*kept), adapted)
        d_d = None
        if d_cross is not None and d_half_q is not None:
            d_d = adapted.terms_gradient(d_cross, d_half_q, lambda_d)
        return d_m, d_b, d_d, None, None


def needs_graph(*gradients: Tensor) -> bool:
    """Whether gradients are to be differentiated again, or come in batches; then PyTorch differentiates operations."""
    return torch.is_grad_enabled() or any(map(torch._C._functorch.is_legacy_batchedtensor, gradients))


def differentiated(
    outputs_of: Callable[..., Any], inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of inputs by PyTorch, as a graph where one is recorded."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: gradients end at them, whatever the inputs were computed from.
        aliases = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs]
        outputs = outputs_of(*aliases)
        return torch.autograd.grad(outputs, aliases, gradients, create_graph=create_graph, allow_unused=True)


def _defined_factors(adapted: AdaptedWeight, strength: float, *vectors: Tensor) -> tuple[Tensor, Tensor]:
    factors = _defined(adapted, Vectors(*vectors), None, strength)
    return factors.gain_minus_one, factors.scale


def delta_weight(adapted: AdaptedWeight, vectors: Vectors, weight: Tensor) -> Float[Tensor, "O I"]:
    """`W' - W` as a dense matrix, in float32 or float64.

    Raises:
        ValueError: the weight is sharded over processes.
    """
    check_whole(weight, adapted.name)
    gain_minus_one, scale, lambda_d, _ = factors_of(adapted, vectors, weight)
    with full_precision(scale.device):
        matrix = as_dtype(adapted.layout.matrix(weight), scale.dtype)
        return torch.addcmul(adapted.update(lambda_d, scale), matrix, gain_minus_one[:, None])
