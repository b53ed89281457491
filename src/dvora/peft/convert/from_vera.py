"""An adapter of PEFT's VeRA as a DVoRA adapter: the same matrices and vectors, and the norms that its weights have.

    W' = W + diag(lambda_b) B diag(lambda_d) A     is DVoRA with direction "weight", alpha = rank and m = ||W'||_row

The matrices are drawn again from PEFT's seed (`matrices.vera`), so the file stays small and every process has them; the
price is that they have the size of the largest layer in memory, as in PEFT, and that torch must draw the same bits.
"""

from __future__ import annotations

import torch
from peft import PeftModel, VeraConfig
from peft.tuners.vera import VeraLayer, VeraModel
from torch import Tensor

from ... import functional as F
from ...matrices.vera import VeraSizes, drawn
from ...tensors import Float, norm_dtype
from ..adapter_folder import PEFT_PREFIX
from ..base_weight import fingerprint_of, readable_weight
from ..config import DVoRAConfig
from ..layer_types import layer_type_of
from .converted import Converted, exact_targets, kept_settings, other_entries


@torch.no_grad()
def from_vera(model: PeftModel, adapter_name: str = "default") -> Converted:
    """A VeRA adapter as a DVoRA adapter: the same outputs and merged weights, up to rounding.

    Args:
        model: a PEFT model with the VeRA adapter, unmerged.
        adapter_name: of the adapter.

    Raises:
        TypeError: it is an adapter of another method.
        ValueError: it is merged, or its matrices are not those that its seed gives here.
    """
    config, tuner = model.peft_config[adapter_name], model.base_model
    if not (isinstance(config, VeraConfig) and isinstance(tuner, VeraModel)):
        raise TypeError(f"expected an adapter of PEFT's VeRA, got one of type {config.peft_type}")
    A, B = tuner.vera_A[adapter_name], tuner.vera_B[adapter_name]
    sizes = VeraSizes(config.r, A.shape[1], B.shape[0])
    _check_drawn(A, B, config.projection_prng_key, sizes)
    values = other_entries(model, adapter_name, "vera_")
    fingerprints: dict[str, list[float]] = {}
    for name, layer in tuner.model.named_modules():
        if not (isinstance(layer, VeraLayer) and adapter_name in layer.vera_lambda_d):
            continue
        if layer.merged:
            raise ValueError(f"{name}: the adapter is merged; call unmerge_adapter first")
        base = layer.get_base_layer()
        layer_type = layer_type_of(base, name)
        weight = layer_type.layout.matrix(readable_weight(base, layer_type, "weight", name))
        lambda_b, lambda_d = layer.vera_lambda_b[adapter_name], layer.vera_lambda_d[adapter_name]
        magnitude = merged_norms(weight, A, B, lambda_b, lambda_d)
        vectors = F.Vectors(magnitude, lambda_b.to(magnitude), lambda_d.to(magnitude))
        for vector, value in vectors._asdict().items():
            values[f"{PEFT_PREFIX}{name}.dvora_{vector}"] = value.clone()
        fingerprints[name] = fingerprint_of(weight, F.row_norm(weight))
    dvora = DVoRAConfig(
        **kept_settings(config),
        r=config.r,
        target_modules=exact_targets(fingerprints, tuner.model),
        direction="weight",
        d_initial=config.d_initial,
        dvora_dropout=config.vera_dropout,
        projection_seed=config.projection_prng_key,
        projection_init=sizes.distribution,
        bias="dvora_only" if config.bias == "vera_only" else config.bias,
        base_probes=fingerprints,
    )
    dvora.check_fingerprint()
    return Converted(dvora, values)


def merged_norms(
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R N"],
    B: Float[Tensor, "M R"],
    lambda_b: Float[Tensor, "O"],
    lambda_d: Float[Tensor, "R"],
) -> Float[Tensor, "O"]:
    """Row norms of `W + diag(lambda_b) B diag(lambda_d) A`, with A and B cut to the weight; summed in float64."""
    out_features, in_features = weight.shape
    rows = lambda_b.double()[:, None] * B[:out_features].double() * lambda_d.double()
    norms = F.row_norm(weight.double() + rows @ A[:, :in_features].double())
    return norms.to(norm_dtype(weight.dtype))


def _check_drawn(A: Tensor, B: Tensor, seed: int, sizes: VeraSizes) -> None:
    """Refuse matrices that another process would not draw.

    Raises:
        ValueError: they are others, or rounded.
    """
    for name, used, made in zip(("vera_A", "vera_B"), (A, B), drawn(seed, sizes), strict=True):
        if used.dtype != made.dtype or not torch.equal(used.cpu(), made):
            raise ValueError(
                f"{name} of the adapter is not what projection_prng_key={seed} gives here ({used.dtype}; it was cast, "
                "drawn by another version of torch or on another kind of machine, or edited), and DVoRA keeps the seed "
                "instead of matrices, so the conversion would not be exact; convert where the adapter was trained, or "
                "merge it"
            )
