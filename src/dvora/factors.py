"""The row factors `(g - 1, scale, lambda_d)` of an adapter in one weight: values, gradients, and how long they last.

| where | computed |
|---|---|
| training | in every pass, with a gradient in closed form (`relative_factors`, `vector_gradients`) |
| evaluation | once, until a vector, the strength or the weight changes |
| compiled, exported or transformed; a trained or sharded weight | in every pass, by `functional` |

Factors that are kept belong to the addresses and versions of the vectors. PyTorch does not count writes through
`tensor.data` or NumPy, nor fused optimizers' steps; for these none are kept of what has a gradient, or through a
pass that trains.

Dimensions: N adapters, O out, I in, R rank, K values of lambda_d.
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
from .weight import AdaptedWeight, JoinedWeights, RowConstants

_TOGETHER = 2**16
"""Values by row up to which layers share operations: more would leave a processor's cache between two of them."""


class Factors(NamedTuple):
    """What the tokens of one layer need of an adapter, for all of them or for each row of a batch."""

    gain_minus_one: Float[Tensor, "*B O"]
    scale: Float[Tensor, "*B O"]
    lambda_d: Float[Tensor, "*B K"]
    gain: Float[Tensor, "*B O"] | None = None
    """`g`, without a gradient: precise where it is far below one. None for rows of a batch: it would be as large."""

    @classmethod
    def of_rows(cls, values: Float[Tensor, "B F"], lambda_d_size: int, dimensions: int) -> "Factors":
        """Those of each row of a batch.

        Args:
            values: `g - 1` (O), scale (O) and lambda_d (K) of each row.
            lambda_d_size: K.
            dimensions: of the tokens.
        """
        # Not len(), which would make a traced size a constant; nor the size itself: one row serves all in a graph.
        rows = values.view(-1, *(1,) * (dimensions - 2), values.shape[1])
        out_features = (values.shape[1] - lambda_d_size) // 2
        gain_minus_one, scale, lambda_d = rows.split([out_features, out_features, lambda_d_size], -1)
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
    lengths = [n for w in weights for n in (w.out_features, w.out_features if w.rank else 0, w.lambda_d_size)]
    parts, rows = vectors.split(lengths, -1), list[Tensor]()
    together = max(1, _TOGETHER // max(1, len(vectors) * max(w.out_features for w in weights)))
    for first in range(0, len(weights), together):
        joined, of_joined = JoinedWeights(weights[first : first + together]), parts[3 * first : 3 * (first + together)]
        m, b, d = of_joined[::3], of_joined[1::3], of_joined[2::3]
        b = tuple(part if part.shape[1] else torch.zeros_like(like) for part, like in zip(b, m, strict=True))
        factors = _in_closed_form(joined, Vectors(torch.cat(m, -1), torch.cat(b, -1), torch.cat(d, -1)), 1.0)
        columns = zip(factors[0].split(joined.rows, -1), factors[1].split(joined.rows, -1), d, strict=True)
        rows += [column for of_layer in columns for column in of_layer]
    return torch.cat(rows, -1).to(weights[0].w.dtype)


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


def _in_closed_form(adapted: AdaptedWeight | JoinedWeights, vectors: Vectors, strength: float) -> Factors:
    """From the constants of a frozen weight, of one adapter or of N, with a graph where one is recorded."""
    vectors = vectors.to(adapted.w.dtype)
    with full_precision(adapted.w.device):
        if grad_recorded():
            gain_minus_one, scale, gain = _RowFactors.apply(*vectors, adapted, strength)
        else:
            (gain_minus_one, scale, gain), _ = _values(adapted, vectors, strength)
    return Factors(gain_minus_one, scale, vectors.lambda_d, gain)


def _defined(
    adapted: AdaptedWeight | JoinedWeights, vectors: Vectors, weight: Tensor | None, strength: float
) -> Factors:
    """By the definition, differentiated by PyTorch, also with respect to a weight that is trained."""
    with full_precision(adapted.w.device):
        vectors = vectors.to(adapted.w.dtype)
        terms = adapted.terms(vectors.lambda_d, weight)
        gain_minus_one, scale, gain = F.row_factors(vectors, *terms, **adapted.settings)
    if strength != 1:
        gain_minus_one, scale = strength * gain_minus_one, strength * scale
        gain = torch.lerp(torch.ones_like(gain), gain, strength)
    return Factors(gain_minus_one, scale, vectors.lambda_d, gain)


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

    def weakened(self, strength: float) -> tuple[Tensor, Tensor]:
        """Gain and scale of `W + s (W' - W)`."""
        if strength == 1:
            return self.gain, self.scale
        return torch.lerp(torch.ones_like(self.gain), self.gain, strength), strength * self.scale


def relative_factors(m: Tensor, lambda_b: Tensor, cross: Tensor, q: Tensor, constants: RowConstants) -> RelativeFactors:
    """`functional.row_factors` with few operations, and without a graph.

    Args:
        m, lambda_b: the vectors, (*N, O), in the dtype of w.
        cross, q: of `functional.update_terms`, (*N, O).
        constants: of the rows.
    """
    w, unit, one, zero_rows, zero_scale = constants
    kappa = lambda_b * unit
    inner = torch.addcmul(cross, kappa, q)
    inverse = torch.addcmul(one, kappa, cross + inner).clamp_min_(torch.finfo(w.dtype).eps ** 2).rsqrt_()
    shrunk = m * inverse
    gain, scale = shrunk / w, shrunk * kappa
    if zero_rows is not None:
        gain.masked_fill_(zero_rows, 1.0)
    if zero_scale is not None:
        scale.addcmul_(lambda_b, zero_scale)
    return RelativeFactors(gain, scale, shrunk, inverse, kappa, inner)


def vector_gradients(
    d_g: Tensor, d_scale: Tensor, factors: RelativeFactors, constants: RowConstants, detach_norm: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of m, lambda_b, cross and q / 2 from those of g and scale; of the last two None with `detach_norm`.

    With `t = m / s`, `g = t / w`, `scale = t kappa` and `s**2 = 1 + eps`, `eps = kappa (2 cross + kappa q)`:

        d_t     = d_g / w + d_scale kappa
        d_m     = d_t / s,   -2 d_eps = d_m t / s
        d_kappa = d_scale t + 2 d_eps (cross + kappa q)
        d_cross = 2 d_eps kappa,   d_q = d_eps kappa**2
    """
    w, unit, _, zero_rows, zero_scale = constants
    _, _, shrunk, inverse, kappa, inner = factors
    d_m = torch.addcmul(d_g / w, d_scale, kappa).mul_(inverse)
    if zero_rows is not None:
        d_m.masked_fill_(zero_rows, 0.0)
    d_kappa, d_cross, d_half_q = d_scale * shrunk, None, None
    if not detach_norm:
        minus_2_d_eps = (d_m * shrunk).mul_(inverse)
        d_kappa.addcmul_(minus_2_d_eps, inner, value=-1)
        d_cross = minus_2_d_eps.mul_(kappa).neg_()
        d_half_q = d_cross * kappa
    d_b = d_kappa.mul_(unit)
    if zero_scale is not None:
        d_b.addcmul_(d_scale, zero_scale)
    return d_m, d_b, d_cross, d_half_q


def _values(
    adapted: AdaptedWeight | JoinedWeights, vectors: Vectors, strength: float
) -> tuple[tuple[Tensor, Tensor, Tensor], RelativeFactors]:
    """`g - 1`, scale and `g` with a strength, and what they were made from."""
    m, lambda_b, lambda_d = vectors
    constants = adapted.row_constants
    factors = relative_factors(m, lambda_b, *adapted.terms(lambda_d)[1:], constants)
    gain, scale = factors.weakened(strength)
    # Where it is used, `g - 1` is added to one or rounded to half precision: digits below those of g do not matter.
    # Not finite where the norm is not, whose inverse is zero.
    gain_minus_one = (gain - constants.one).add_(factors.inner, alpha=0)
    return (gain_minus_one, scale, gain), factors


class _RowFactors(torch.autograd.Function):
    """`functional.row_factors` with a gradient in closed form; the gain has none."""

    @staticmethod
    def forward(
        ctx: Any,
        m: Tensor,
        lambda_b: Tensor,
        lambda_d: Tensor,
        adapted: AdaptedWeight | JoinedWeights,
        strength: float,
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
            return *differentiated(partial(defined_factors, adapted, strength), inputs, (d_g, d_scale)), None, None
        if strength != 1:
            d_g, d_scale = strength * d_g, strength * d_scale
        factors, constants = RelativeFactors(*kept), adapted.row_constants
        d_m, d_b, d_cross, d_half_q = vector_gradients(d_g, d_scale, factors, constants, adapted.detach_norm)
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


def defined_factors(adapted: AdaptedWeight | JoinedWeights, strength: float, *vectors: Tensor) -> tuple[Tensor, Tensor]:
    """`g - 1` and scale by the definition, for PyTorch to differentiate."""
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
