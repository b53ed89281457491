"""A DVoRA adapter written out as one of PEFT's DoRA: another file for the same weights.

    lora_A = A,  lora_B = diag(beta) B diag(lambda_d),  scaling 1,  magnitude m

A strength s makes `W' = (1 - s) W + s diag(g) V'`, which is a DoRA weight too: with f = 1 - s + s g, the update of
every row is scaled by s g / f, and the magnitude is f times the norm that the row has then.

Dimensions: I in, O out, R rank.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ... import functional as F
from ...functional import Vectors
from ...tensors import Float
from ..adapter_folder import PEFT_PREFIX
from ..config import own_config
from ..layer import DVoRALayer, layers_of
from ..layer_types import lookup
from .converted import Converted, exact_pattern, exact_targets, kept_settings, other_entries

_BIASES: dict[str, Literal["none", "all", "lora_only"]] = {"none": "none", "all": "all", "dvora_only": "lora_only"}


class Dora(NamedTuple):
    """One weight's adapter as DoRA has it, with a scaling of one."""

    A: Float[Tensor, "R I"]
    B: Float[Tensor, "O R"]
    magnitude: Float[Tensor, "O"]


def dora_of(
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    vectors: Vectors,
    beta: Float[Tensor, "O"],
    strength: float = 1.0,
) -> Dora:
    """The DoRA of a DVoRA; all tensors in float64.

    Args:
        weight: W.
        A, B: the shared matrices.
        vectors: the trained ones.
        beta: of `functional.row_scale`.
        strength: s.
    """
    w, updated = F.row_norm(weight), beta[:, None] * (B * vectors.lambda_d)
    n = F.row_norm(weight + updated @ A)
    g = torch.where(w > 0, vectors.magnitude / n, 1.0)
    factor = 1 - strength + strength * g
    scaled = (strength * g / factor)[:, None] * updated
    return Dora(A, scaled, factor * F.row_norm(weight + scaled @ A))


@torch.no_grad()
def to_dora(model: PeftModel, adapter_name: str = "default") -> Converted:
    """A DVoRA adapter as a PEFT DoRA: the same outputs and merged weights, up to rounding.

    What is trained further is another method: PEFT's DoRA trains A and B, and leaves the gradient through the norm out.

    Args:
        model: a PEFT model with the adapter.
        adapter_name: of the adapter.

    Raises:
        TypeError: PEFT's DoRA does not have a layer's type.
        ValueError: it cannot have a weight that the adapter makes.
    """
    config = own_config(model.peft_config[adapter_name])
    values = other_entries(model, adapter_name, "dvora_")
    values = {key: value for key, value in values.items() if not key.startswith("base_model.dvora_projections.")}
    ranks: dict[str, int] = {}
    for layer in layers_of(model, adapter_name):
        _check_supported(layer)
        dora = _dora_of_layer(layer, adapter_name)
        ranks[layer.name] = len(dora.A)
        values |= {f"{PEFT_PREFIX}{layer.name}.{key}": value for key, value in _entries(layer, dora).items()}
    pattern = exact_pattern(ranks, config.r)
    lora = LoraConfig(
        **kept_settings(config),
        r=config.r,
        lora_alpha=config.r,
        use_dora=True,
        target_modules=exact_targets(ranks, model.get_base_model()),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        lora_dropout=config.dvora_dropout,
        bias=_BIASES[config.bias],
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers_of(model, adapter_name)),
        trainable_token_indices=config.trainable_token_indices,
    )
    return Converted(lora, values)


def _dora_of_layer(layer: DVoRALayer, adapter_name: str) -> Dora:
    adapted, strength = layer.adapted(adapter_name), float(layer.strength(adapter_name))
    weight = layer.layer_type.layout.matrix(layer.unmerged()).double()
    vectors = layer.vectors(adapter_name).to(torch.float64)
    A, B = adapted.A(weight), adapted.B(weight)
    if not adapted.rank:
        # PEFT has no rank of zero.
        A, B, vectors = A.new_zeros(1, A.shape[1]), B.new_zeros(len(B), 1), vectors._replace(lambda_d=A.new_zeros(1))
    w = F.row_norm(weight)
    beta = adapted.scaling * vectors.lambda_b * (w if adapted.direction == "unit" else 1)
    dora = dora_of(weight, A, B, vectors, beta, strength)
    if not all(part.isfinite().all() for part in dora) or not F.row_norm(weight + dora.B @ dora.A).all():
        raise ValueError(
            f"{layer.name}: PEFT's DoRA divides by the norms of the updated rows, and one of them is zero (a row of "
            "zeros in the base's weight, or an adapter's strength that cancels the row); convert to dense instead"
        )
    return Dora(*(part.float() for part in dora))


def _entries(layer: DVoRALayer, dora: Dora) -> dict[str, Tensor]:
    """The layer's entries of a file, by the last parts of their names."""
    if layer.layer_type.low_rank is lookup:
        return {"lora_embedding_A": dora.A, "lora_embedding_B": dora.B, "lora_magnitude_vector": dora.magnitude}
    A, B, magnitude = dora
    if layer.layer_type.spatial:
        ones = (1,) * layer.layer_type.spatial
        A, B = A.view(len(A), *layer.unmerged().shape[1:]), B.view(*B.shape, *ones)
        magnitude = magnitude.view(1, -1, *ones)
    return {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": magnitude}


def _check_supported(layer: DVoRALayer) -> None:
    base, reason = layer.get_base_layer(), None
    if not layer.layer_type.has_weight:
        reason = "it is quantised; load the adapter onto the unquantised base model and convert it there"
    elif layer.layer_type.low_rank is None:
        reason = "its module reads the weight (attention, experts), where PEFT has no DoRA"
    elif layer.parameter_name not in base._parameters:
        reason = "it computes its weight in every pass (it is parametrized), and PEFT would merge without any effect"
    elif isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if base.groups > 1:
            reason = "PEFT's DoRA has no grouped convolutions"
        elif any(step > 1 for step in base.dilation):
            reason = "PEFT's convolutions with A ignore dilation"
        elif base.padding_mode != "zeros":
            reason = f"PEFT's convolutions with A pad with zeros only, not {base.padding_mode!r}"
    if reason is not None:
        raise TypeError(f"{layer.name} of type {type(base).__name__} cannot be converted to DoRA: {reason}")
