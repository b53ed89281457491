"""How far training has moved one adapted weight, as plain numbers."""

import torch
from torch import Tensor

from ..method import functional as F
from ..method.functional import Vectors
from ..ops.dtypes import full_precision
from .adapted_weight import AdaptedWeight


@torch.no_grad()
def diagnostics(adapted: AdaptedWeight, vectors: Vectors, weight: Tensor | None) -> dict[str, float]:
    """Norm ratios, angles (degrees) and gains of the adapted rows, shares of rows at risk, and bytes of constants.

    Args:
        adapted: the frozen side.
        vectors: the trained vectors.
        weight: as stored, or None.
    """
    norm = adapted.norm(weight)
    vectors = vectors.to(norm.w.dtype)
    with full_precision(norm.w.device):
        beta = F.row_scale(vectors.lambda_b, norm.w, adapted.scaling, adapted.direction)
        s = F.relative_norm(norm, vectors.lambda_d, beta).ratio
        angle = F.row_angle(norm, vectors.lambda_d, beta).rad2deg()
        g1 = F.row_factors(vectors, norm, beta).gain_minus_one.abs()
    metrics = {
        "norm_ratio_mean": s.mean(),
        "norm_ratio_max": s.max(),
        "angle_degrees_mean": angle.mean(),
        "angle_degrees_max": angle.max(),
        "gain_distance_mean": g1.mean(),
        "gain_distance_max": g1.max(),
        "near_cancellation_share": (s.square() < 1e-3).to(s.dtype).mean(),
        "zero_row_share": (norm.w == 0).to(s.dtype).mean(),
    }
    kept = adapted.w.nbytes + (0 if adapted.C is None else adapted.C.nbytes)
    return {**{name: float(value) for name, value in metrics.items()}, "constant_bytes": kept}
