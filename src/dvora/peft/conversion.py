"""Conversion from PEFT's VeRA, and to PEFT's DoRA: other files for the same weights, up to rounding.

VeRA's `W' = W + diag(lambda_b) B diag(lambda_d) A` is DVoRA with direction "weight", alpha = rank and the magnitude
m = ||W'||_row. The matrices are drawn again from PEFT's seed (`matrices.vera`), so the file stays small and every
process has them; the price is that they have the size of the largest layer in memory, as in PEFT, and that torch must
draw the same bits.

DVoRA is DoRA with `lora_A = A'` (A scaled by lambda_d), `lora_B = diag(beta) B`, scaling 1 and magnitude m. A strength
s makes `W' = (1 - s) W + s diag(g) V'`, which is a DoRA weight too: with f = 1 - s + s g, the update of every row is
scaled by s g / f, and the magnitude is f times the norm that the row has then.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, VeraConfig
from peft.tuners.vera import VeraLayer, VeraModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, contiguous_format, nn
from transformers.pytorch_utils import Conv1D

from .. import functional as F
from ..adapter_file.fingerprint import fingerprint_of
from ..adapter_file.patterns import is_named
from ..adapter_file.settings import DVoRAConfig, own_config
from ..adapter_file.values_file import PEFT_PREFIX
from ..matrices.vera import VeraSizes, drawn
from ..tensors import norm_dtype
from .base_weight import readable_weight
from .layer import DVoRALayer, layers_of
from .layer_types import layer_type_of, lookup

_BIASES: dict[str, Literal["none", "all", "lora_only"]] = {"none": "none", "all": "all", "dvora_only": "lora_only"}


class Converted(NamedTuple):
    """An adapter that no model has yet."""

    config: PeftConfig
    values: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Write it into a folder as PEFT writes adapters."""
        folder.mkdir(exist_ok=True)
        # With bias="all" PEFT lists a head's bias twice, and a file takes no tensor twice.
        copies = {
            name: value.detach().cpu().clone(memory_format=contiguous_format) for name, value in self.values.items()
        }
        save_file(copies, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        self.config.save_pretrained(str(folder))


@torch.no_grad()
def from_vera(model: PeftModel, adapter_name: str = "default") -> Converted:
    """A VeRA adapter as a DVoRA adapter: the same outputs and merged weights.

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
    values = _entries_beside(model, adapter_name, "vera_")
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
        out_features, in_features = weight.shape
        # In float64; VeRA cuts its matrices to the layer.
        scaled_B = lambda_b.double()[:, None] * B[:out_features].double() * lambda_d.double()
        norms = F.row_norm(weight.double() + scaled_B @ A[:, :in_features].double()).to(norm_dtype(weight.dtype))
        for vector, value in F.Vectors(norms, lambda_b.to(norms), lambda_d.to(norms))._asdict().items():
            values[f"{PEFT_PREFIX}{name}.dvora_{vector}"] = value.clone()
        fingerprints[name] = fingerprint_of(weight, F.row_norm(weight))
    dvora = DVoRAConfig(
        **_common_settings(config),
        r=config.r,
        target_modules=_exact_targets(fingerprints, tuner.model),
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


@torch.no_grad()
def to_dora(model: PeftModel, adapter_name: str = "default") -> Converted:
    """A DVoRA adapter as a PEFT DoRA: the same outputs and merged weights.

    What is trained further is another method: PEFT's DoRA trains A and B, and leaves the gradient through the norm out.

    Args:
        model: a PEFT model with the adapter.
        adapter_name: of the adapter.

    Raises:
        TypeError: PEFT's DoRA does not have a layer's type.
        ValueError: it cannot have a weight that the adapter makes.
    """
    config = own_config(model.peft_config[adapter_name])
    values = _entries_beside(model, adapter_name, "dvora_")
    ranks: dict[str, int] = {}
    for layer in layers_of(model, adapter_name):
        _check_supported(layer)
        A, B, magnitude = _dora_of(layer, adapter_name)
        ranks[layer.name] = len(A)
        values |= {f"{PEFT_PREFIX}{layer.name}.{key}": v for key, v in _dora_entries(layer, A, B, magnitude).items()}
    # PEFT takes the first name that a layer's ends in: the longest come first.
    names = sorted(ranks, key=lambda name: (-len(name), name)) if not set(ranks.values()) <= {config.r} else []
    pattern = {name: ranks[name] for name in names}
    lora = LoraConfig(
        **_common_settings(config),
        r=config.r,
        lora_alpha=config.r,
        use_dora=True,
        target_modules=_exact_targets(ranks, model.get_base_model()),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        lora_dropout=config.dvora_dropout,
        bias=_BIASES[config.bias],
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers_of(model, adapter_name)),
        trainable_token_indices=config.trainable_token_indices,
    )
    return Converted(lora, values)


def _check_drawn(A: Tensor, B: Tensor, seed: int, sizes: VeraSizes) -> None:
    """Refuse matrices that another process would not draw: others, or rounded ones."""
    for name, used, expected in zip(("vera_A", "vera_B"), (A, B), drawn(seed, sizes), strict=True):
        if used.dtype != expected.dtype or not torch.equal(used.cpu(), expected):
            raise ValueError(
                f"{name} of the adapter is not what projection_prng_key={seed} gives here ({used.dtype}; it was cast, "
                "drawn by another version of torch or on another kind of machine, or edited), and DVoRA keeps the seed "
                "instead of matrices, so the conversion would not be exact; convert where the adapter was trained, or "
                "merge it"
            )


def _dora_of(layer: DVoRALayer, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
    """A (R, I), B (O, R) and the magnitude (O,) of the DoRA with scaling one that has the weight of an adapter."""
    adapted, s = layer.adapted(adapter_name), layer.strength(adapter_name)
    weight = layer.layer_type.layout.matrix(layer.unmerged()).double()
    magnitude, lambda_b, lambda_d = layer.vectors(adapter_name).to(torch.float64)
    A, B = adapted.A(weight), adapted.B(weight)
    if not adapted.rank:
        # PEFT has no rank of zero.
        A, B, lambda_d = A.new_zeros(1, A.shape[1]), B.new_zeros(len(B), 1), A.new_zeros(1)
    w = F.row_norm(weight)
    beta = adapted.scaling * lambda_b * (w if adapted.direction == "unit" else 1)
    A, B = F.scaled_columns(A, lambda_d.view(-1, len(A))), beta[:, None] * B
    g = torch.where(w > 0, magnitude / F.row_norm(weight + B @ A), 1.0)
    f = 1 - s + s * g
    B = (s * g / f)[:, None] * B
    norms = F.row_norm(weight + B @ A)
    dora = A, B, f * norms
    if not all(part.isfinite().all() for part in dora) or not norms.all():
        raise ValueError(
            f"{layer.name}: PEFT's DoRA divides by the norms of the updated rows, and one of them is zero (a row of "
            "zeros in the base's weight, or an adapter's strength that cancels the row); merge the adapter instead"
        )
    return A.float(), B.float(), (f * norms).float()


def _dora_entries(layer: DVoRALayer, A: Tensor, B: Tensor, magnitude: Tensor) -> dict[str, Tensor]:
    """The layer's entries of a file, by the last parts of their names."""
    if layer.layer_type.low_rank is lookup:
        return {"lora_embedding_A": A, "lora_embedding_B": B, "lora_magnitude_vector": magnitude}
    if layer.layer_type.spatial:
        ones = (1,) * layer.layer_type.spatial
        A, B = A.view(len(A), *layer.unmerged().shape[1:]), B.view(*B.shape, *ones)
        magnitude = magnitude.view(1, -1, *ones)
    return {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": magnitude}


def _check_supported(layer: DVoRALayer) -> None:
    """Refuse a layer that PEFT's DoRA does not have, or would not compute alike."""
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


def _common_settings(config: PeftConfig) -> dict[str, Any]:
    """The settings that do not depend on the method: the base, the task, and modules trained whole."""
    settings: Mapping[str, Any] = vars(config)
    names = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "modules_to_save")
    return {name: settings[name] for name in names} | {"inference_mode": True}


def _entries_beside(model: PeftModel, adapter_name: str, method: str) -> dict[str, Tensor]:
    """The entries of an adapter's file that do not belong to its method: heads, biases, tokens.

    Args:
        model: with the adapter.
        adapter_name: of the adapter.
        method: the beginning of the last part of the method's own names.
    """
    entries = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    of_method = re.compile(rf"\.{method}\w+$")
    return {key: value for key, value in entries.items() if not of_method.search(key)}


def _exact_targets(names: Iterable[str], model: nn.Module) -> list[str] | str:
    """Target modules that PEFT matches with these layers and no others: their names, or an expression if need be.

    PEFT takes a name for the end of one, so "layer" would target "encoder.layer" too.
    """
    wanted = sorted(names)
    others = {name for name, _ in model.named_modules()}.difference(wanted)
    if not any(is_named(wanted, other) for other in others):
        return wanted
    return "|".join(re.escape(name) for name in wanted)
